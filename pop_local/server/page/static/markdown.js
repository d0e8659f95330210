// Renders an answer's Markdown. DOMPurify sanitizes all HTML generated from it.

import { button, h } from "./dom.js";
import DOMPurify from "./vendor/purify.es.mjs";
import { Marked, Tokenizer } from "./vendor/marked.esm.js";

const TAGS = "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre strong ul"
  + " table tbody td th thead tr";
const SHOWN = { ALLOWED_TAGS: TAGS.split(" "), ALLOWED_ATTR: ["href", "start"] };

const MAX_DEPTH = 30; // of nested quotes, lists and emphasis, which marked parses recursively
let depth = 0;

// Returns a tokenizer that reads deeper nesting as plain text.
const bounded = (name) => function (...given) {
  if (depth >= MAX_DEPTH) return undefined;
  depth += 1;
  try {
    return Tokenizer.prototype[name].apply(this, given);
  } finally {
    depth -= 1;
  }
};

const NESTED = ["blockquote", "list", "emStrong", "del", "link", "reflink"];
// HTML and images in an answer are shown as source.
const escaped = (text) => h("p", {}, text).innerHTML;
const markdown = new Marked({
  tokenizer: Object.fromEntries(NESTED.map((name) => [name, bounded(name)])),
  renderer: { html: ({ text }) => escaped(text), image: ({ raw }) => escaped(raw) },
});

async function copy(text, shown) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // the clipboard API needs https
    const field = shown.parentElement.appendChild(h("textarea", { value: text }));
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  shown.textContent = "Copied";
  setTimeout(() => (shown.textContent = "Copy"), 1500);
}

export const copier = (text, label) => button("Copy", ({ target }) => copy(text, target), label);

// Returns an answer's HTML, or its plain text if it cannot be rendered.
function rendered(text) {
  try {
    return DOMPurify.sanitize(markdown.parse(text), { ...SHOWN, RETURN_DOM_FRAGMENT: true });
  } catch {
    return h("p", {}, text);
  }
}

export function markdownView(text) {
  const shown = rendered(text);
  for (const link of shown.querySelectorAll("a")) {
    Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  }
  for (const code of shown.querySelectorAll("pre")) {
    code.after(h("div", { className: "code" }, copier(code.textContent, "Copy this code")));
    code.nextSibling.prepend(code);
  }
  return h("div", { className: "body" }, shown);
}

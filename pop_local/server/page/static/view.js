// Builds the elements of messages. DOMPurify sanitizes all HTML generated from Markdown.

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

export function h(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter(Boolean));
  return element;
}

export const button = (words, onclick, ariaLabel = words) =>
  h("button", { type: "button", onclick, ariaLabel }, words);

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

const copier = (text, label) => button("Copy", ({ target }) => copy(text, target), label);

// Returns an answer's HTML, or its plain text if it cannot be rendered.
function rendered(text) {
  try {
    return DOMPurify.sanitize(markdown.parse(text), { ...SHOWN, RETURN_DOM_FRAGMENT: true });
  } catch {
    return h("p", {}, text);
  }
}

function answerView(text) {
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

export const number = (n) => n.toLocaleString("en");
const seconds = (s) => `${s.toFixed(s < 10 ? 2 : 1)} s`;
export const megabytes = (n) => `${number(Math.ceil(n / 1e6))} MB`;

function figuresView(usage) {
  const { pop, prompt_tokens: n, prompt_tokens_details: cached } = usage ?? {};
  const kinds = usage && [
    cached.cached_tokens && `${number(cached.cached_tokens)} cached`,
    pop.n_pruned && `${number(pop.n_pruned)} pruned`,
    pop.n_skipped_exact && `${number(pop.n_skipped_exact)} skipped exactly`,
    pop.reading === "short" && "too short for pruning",
  ].filter(Boolean).join(", ");
  const figures = usage && [
    `First token after ${seconds(pop.ttft_s)}`,
    pop.queued_s > 0.1 && `waited ${seconds(pop.queued_s)}`,
    `prompt of ${number(n)} tokens${kinds && ` (${kinds})`}`,
    pop.decode_s > 0 && `${(usage.completion_tokens / pop.decode_s).toFixed(1)} tokens/s`,
  ].filter(Boolean).join(" · ");
  return h("p", { className: "figures" }, figures);
}

// Returns a file as a list item, with a button that calls `remove`, if given.
export function fileView({ name, text, url, isBusy }, remove) {
  const size = isBusy ? "reading" : text && `${number(text.length)} characters`;
  return h("li", { className: "file" },
    url && h("img", { src: url, alt: "" }),
    name,
    size && h("span", { className: "quiet" }, size),
    remove && !isBusy && button("×", remove, `Remove ${name}`));
}

const sideView = ({ name, text, usage }) => h("section", {},
  h("h3", {}, name),
  h("p", { className: "time" }, usage ? seconds(usage.pop.ttft_s) : "…"),
  h("p", { className: "quiet" }, "to the first token"),
  answerView(text),
  figuresView(usage));

function comparedView(sides) {
  const [full, pruned] = sides.map(({ usage }) => usage?.pop.ttft_s);
  const ratio = full && pruned && `The first token came ${(full / pruned).toFixed(2)} times as fast`
    + " with pruning (measured once, without the cache).";
  return h("div", { className: "body" },
    h("div", { className: "sides" }, ...sides.map(sideView)),
    ratio && h("p", { className: "ratio" }, ratio));
}

// Returns a message as an article. `action` has the label and handler of a second button, if any.
export function messageView({ role, text, files = [], sides, note, usage }, action, isBusy) {
  const isMine = role === "user";
  const said = isMine ? h("div", { className: "body" }, text) : answerView(text);
  return h("article", { className: role, ariaBusy: String(isBusy) },
    h("h2", { className: "unseen" }, isMine ? "You" : "Answer"),
    h("ul", { className: "files" }, ...files.map((file) => fileView(file))),
    sides ? comparedView(sides) : said,
    !isBusy && note && h("p", { className: "note" }, note),
    !sides && figuresView(usage),
    !isBusy && h("div", { className: "actions" },
      text && copier(text, "Copy this message"),
      action && button(...action)));
}

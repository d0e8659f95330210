// How messages look: elements, and Markdown that is text until it was sanitised.

import DOMPurify from "./vendor/purify.es.mjs";
import { Marked } from "./vendor/marked.esm.js";

const TAGS =
  "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre strong table tbody td th thead tr ul";
const SHOWN = {
  ALLOWED_TAGS: TAGS.split(" "),
  ALLOWED_ATTR: ["align", "href", "start"],
  RETURN_DOM_FRAGMENT: true,
};
const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
const escaped = (text) => text.replace(/[&<>"]/g, (letter) => ENTITIES[letter]);

// HTML in an answer is shown as it was written, and no picture is fetched.
const markdown = new Marked({
  renderer: { html: ({ text }) => escaped(text), image: ({ raw }) => escaped(raw) },
});

export function h(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter(Boolean));
  return element;
}

export const button = (words, onclick, more = {}) =>
  h("button", { type: "button", onclick, ...more }, words);

async function copy(text, shown) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // without https only this is there
    const field = h("textarea", { value: text });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  shown.textContent = "Copied";
  setTimeout(() => (shown.textContent = "Copy"), 1500);
}

const copier = (text, label) =>
  button("Copy", (event) => copy(text(), event.currentTarget), { ariaLabel: label });

export function showAnswer(element, text) {
  const content = DOMPurify.sanitize(markdown.parse(text), SHOWN);
  for (const link of content.querySelectorAll("a")) {
    Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  }
  for (const code of content.querySelectorAll("pre")) {
    const text = code.textContent;
    code.tabIndex = 0; // so that keys can scroll it
    const block = h("div", { className: "code" });
    code.replaceWith(block);
    block.append(code, copier(() => text, "Copy this code"));
  }
  for (const table of content.querySelectorAll("table")) {
    const wide = h("div", { className: "wide", tabIndex: 0 });
    table.replaceWith(wide);
    wide.append(table);
  }
  element.replaceChildren(content);
}

const number = (n) => n.toLocaleString("en");
export const seconds = (s) => `${s.toFixed(s < 10 ? 2 : 1)} s`;
export const megabytes = (n) => `${number(Math.ceil(n / 1e6))} MB`;

// The figures of an answer; "" where it has none.
export function figures(usage) {
  if (!usage) return "";
  const { pop, prompt_tokens: n, completion_tokens: nWritten } = usage;
  const nCached = usage.prompt_tokens_details.cached_tokens;
  const parts = [
    nCached && `${number(nCached)} cached`,
    pop.n_pruned && `${number(pop.n_pruned)} pruned`,
    pop.n_skipped_exact && `${number(pop.n_skipped_exact)} skipped exactly`,
    pop.reading === "short" && "too short to be pruned",
  ].filter(Boolean);
  const read = `${number(n)} tokens read${parts.length ? ` (${parts.join(", ")})` : ""}`;
  return [
    `First token after ${seconds(pop.ttft_s)}`,
    pop.queued_s > 0.1 && `waited ${seconds(pop.queued_s)}`,
    read,
    pop.decode_s > 0 && `${(nWritten / pop.decode_s).toFixed(1)} tokens/s`,
  ].filter(Boolean).join(" · ");
}

// A file as a list's item; `remove` is what takes it away, if anything does.
export function fileView(file, remove) {
  const size = file.isBusy ? "being read" : file.url ? "" : `${number(file.text.length)} characters`;
  return h("li", { className: "file" },
    file.url && h("img", { src: file.url, alt: "" }),
    h("span", {}, file.name),
    size && h("span", { className: "quiet" }, size),
    remove && button("×", remove, { ariaLabel: `Remove ${file.name}` }));
}

function sideView(side) {
  const body = h("div", { className: "body" });
  showAnswer(body, side.text);
  return h("section", {},
    h("h3", {}, side.name),
    h("p", { className: "time" }, side.usage ? seconds(side.usage.pop.ttft_s) : "…"),
    h("p", { className: "quiet" }, "to the first token"),
    body,
    h("p", { className: "figures" }, figures(side.usage)));
}

function compared(sides) {
  const [full, pruned] = sides.map((side) => side.usage?.pop.ttft_s);
  const times = full && pruned ? (full / pruned).toFixed(2) : "";
  return h("div", {},
    h("div", { className: "sides" }, ...sides.map(sideView)),
    times && h("p", { className: "ratio" },
      `Pruned: ${times} times as fast to the first token, in one reading each, nothing cached.`));
}

// A message as an article. `actions`: (words, what is done) pairs.
export function messageView(message, actions, isBusy) {
  const isMine = message.role === "user";
  const body = h("div", { className: "body" });
  if (isMine) body.textContent = message.text;
  else if (message.sides) body.append(compared(message.sides));
  else showAnswer(body, message.text);
  const files = message.files ?? [];
  return h("article", { className: message.role, ariaBusy: String(isBusy) },
    h("h2", { className: "unseen" }, isMine ? "You" : "Answer"),
    files.length > 0 && h("ul", { className: "files" }, ...files.map((file) => fileView(file))),
    body,
    !isBusy && message.note && h("p", { className: "note" }, message.note),
    h("p", { className: "figures" }, message.sides ? "" : figures(message.usage)),
    !isBusy && h("div", { className: "actions" },
      !message.sides && message.text && copier(() => message.text, "Copy this message"),
      ...actions.map(([words, done]) => button(words, done))));
}

// Builds the elements of messages.

import { button, counted, h, icon, number, seconds } from "./dom.js";
import { copier, markdownView } from "./markdown.js";

function figuresView(usage) {
  const { pop, prompt_tokens: n, prompt_tokens_details: cached } = usage ?? {};
  const kinds = usage && [
    cached.cached_tokens && `${number(cached.cached_tokens)} cached`,
    pop.n_pruned && `${number(pop.n_pruned)} with fast reading`,
    pop.n_skipped_exact && `${number(pop.n_skipped_exact)} skipped exactly`,
    pop.reading === "short" && "too short for fast reading",
  ].filter(Boolean).join(", ");
  const figures = usage && [
    `First token after ${seconds(pop.ttft_s)}`,
    pop.queued_s > 0.1 && `waited ${seconds(pop.queued_s)}`,
    `prompt of ${counted(n, "token")}${kinds && ` (${kinds})`}`,
    pop.decode_s > 0 && `${(usage.completion_tokens / pop.decode_s).toFixed(1)} tokens/s`,
  ].filter(Boolean).join(" · ");
  return h("p", { className: "figures" }, figures);
}

// Returns a file as a list item, with a button that calls `remove`, if given.
export function fileView({ name, text, url, isBusy }, remove) {
  const size = isBusy ? "reading" : text && counted(text.length, "character");
  return h("li", { className: "file" },
    url && h("img", { src: url, alt: "" }),
    name,
    size && h("span", { className: "quiet" }, size),
    remove && !isBusy && button(icon("remove"), remove, `Remove ${name}`));
}

// `waiting` is shown until the text arrives; `isNext`: the side starts when the other one has ended.
function sideView({ name, text, usage, note, first_s }, waiting, isNext) {
  const first = usage?.pop.ttft_s ?? first_s;
  return h("section", {},
    h("h3", {}, name),
    h("p", { className: "time" }, first === undefined ? "…" : seconds(first)),
    h("p", { className: "quiet" },
      isNext ? "Starts after the other answer ends, so that the answers do not slow each other down" : "to the first token"),
    text || !waiting ? markdownView(text) : waiting,
    note && h("p", { className: "note" }, note),
    figuresView(usage));
}

function comparedView(sides, waiting) {
  const [full, pruned] = sides.map(({ usage }) => usage?.pop.ttft_s);
  const isPruned = sides[1]?.usage?.pop.n_pruned > 0;
  const ratio = full && pruned && isPruned && `The first token came ${(full / pruned).toFixed(2)} times as fast`
    + " with fast reading (measured once, without the cache).";
  const current = sides.find(({ usage }) => !usage);
  return h("div", { className: "body" },
    h("div", { className: "sides" },
      ...sides.map((side) => sideView(
        side, side === current && waiting, waiting && !side.usage && side !== current))),
    ratio && h("p", { className: "ratio" }, ratio));
}

// Returns a message as an article. `action` is a second button, if any. While the answer is being
// generated, the element `waiting` is shown instead of text that has not arrived.
export function messageView({ role, text, files = [], sides, note, usage }, action, waiting) {
  const isMine = role === "user";
  const isBusy = Boolean(waiting);
  const said = isMine ? h("div", { className: "body" }, text)
    : text || !waiting ? markdownView(text) : waiting;
  return h("article", { className: role, ariaBusy: String(isBusy) },
    h("h2", { className: "unseen" }, isMine ? "You" : "Answer"),
    h("ul", { className: "files" }, ...files.map((file) => fileView(file))),
    sides ? comparedView(sides, waiting) : said,
    !isBusy && note && h("p", { className: "note" }, note),
    !sides && figuresView(usage),
    !isBusy && h("div", { className: "actions" }, text && copier(text, "Copy this message"), action));
}

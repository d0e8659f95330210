// The progress of reading a prompt, shown where the answer will appear, with an estimate of the time.

import { announce, counted, duration, h } from "./dom.js";

const MIN_ROWS = 64; // the speed of shorter prompts depends mostly on other work
const label = h("span");
const bar = h("progress", { ariaLabel: "Reading the prompt" });
export const reading = h("div", { className: "reading" }, label, bar);

let words = "";
let endsAt = 0; // milliseconds since the page was opened (0: unknown)
let timer = 0;

const speedKey = (model, isFast) => `${isFast ? "fast" : "full"} tokens/s of ${model}`;

function paint() {
  const left = (endsAt - performance.now()) / 1000;
  label.textContent = endsAt ? `${words}, about ${duration(Math.max(left, 1))} left` : words;
}

// Shows words without an estimate, such as the position in the queue.
export function startReading(shown) {
  [words, endsAt] = [shown, 0];
  bar.removeAttribute("value");
  clearInterval(timer);
  timer = setInterval(paint, 500);
  paint();
  announce(shown);
}

// Shows the server's progress. Before the first batch, the estimate uses the speed of earlier prompts.
export function showProgress({ total, cache, processed, time_ms }, asked) {
  const [done, all] = [processed - cache, total - cache];
  const known = Number(localStorage[speedKey(asked.model, asked.pop)]) || 0;
  const speed = done > 0 && time_ms > 0 ? done / time_ms : known / 1000;
  const isFirst = bar.position < 0;
  words = `Reading ${counted(all, "token")}`;
  endsAt = speed ? performance.now() + (all - done) / speed : 0;
  Object.assign(bar, { max: all || 1, value: done });
  paint();
  if (isFirst) announce(label.textContent);
}

export const endReading = () => clearInterval(timer);

// Stores the speed of reading, for the next estimate.
export function keepSpeed(asked, { prompt_tokens, prompt_tokens_details: cached, pop }) {
  const n = prompt_tokens - cached.cached_tokens;
  if (n < MIN_ROWS || !pop.prefill_s) return;
  localStorage[speedKey(asked.model, asked.pop)] = (n / pop.prefill_s).toFixed(1);
}

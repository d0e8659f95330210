// The use of the context: the tokens of the chat and of attached files, out of the model's context.

import { $, number, tell } from "./dom.js";
import { count } from "./server.js";
import { model, requestOf, session } from "./session.js";

const NEARLY_FULL = 0.9;
let counting = null; // the abort controller of the current request

// Returns the tokens that the latest answer left in the context (0: unknown).
function used(messages) {
  for (const { usage, sides } of messages.toReversed()) {
    const latest = usage ?? sides?.findLast((side) => side.usage)?.usage;
    if (latest) return latest.prompt_tokens + latest.completion_tokens;
  }
  return 0;
}

// Shows the use of the context. `isNext`: the tokens include the attached files.
export function showTokens(n, isNext = false) {
  const size = model()?.pop?.n_ctx;
  $("context").hidden = !size;
  if (!size) return;
  const [, label, bar] = $("context").children;
  label.textContent = `${number(n)} of ${number(size)} tokens`;
  Object.assign(bar, { max: size, value: Math.min(n, size) });
  $("context").classList.toggle("full", n > NEARLY_FULL * size);
  $("context").dataset.hint = isNext ? "Context usage, including the attached files"
    : n > NEARLY_FULL * size ? "The context is nearly full. Start a new chat."
      : "Context usage: documents, questions, and answers";
}

// Shows the use of the context. With attached files, the server counts the tokens of the next prompt.
export async function showContext(messages, files) {
  counting?.abort();
  showTokens(used(messages));
  const texts = files.filter(({ isBusy }) => !isBusy);
  // Counting would open a closed model.
  if (!texts.length || session.running || !model()?.pop?.loaded) return;
  const mine = (counting = new AbortController());
  const next = { role: "user", text: "", files: texts };
  const asked = requestOf({ ...session.chat, messages: [...messages, next] });
  try {
    showTokens(await count(asked, mine.signal), true);
  } catch ({ code, message, figures }) {
    if (mine !== counting || code !== "context_length_exceeded") return;
    showTokens(figures.n_prompt_tokens, true);
    tell(message);
  }
}

// The shown chat: its messages, its answers, and comparisons.

import * as chats from "./chats.js";
import { edit, isEditing, leave, showForm, showUse, take } from "./composer.js";
import { showTokens } from "./context.js";
import { $, announce, button, number, tell } from "./dom.js";
import { endReading, keepSpeed, reading, showProgress, startReading } from "./reading.js";
import { answer, tokensBehind } from "./server.js";
import { fresh, model, requestOf, session } from "./session.js";
import { showSettings } from "./settings.js";
import { showList, unkept } from "./sidebar.js";
import { messageView } from "./view.js";

const COMPARED_TOKENS = 400;

const showEnd = () => ($("scroll").scrollTop = $("scroll").scrollHeight);

function actionOf(message, index, isLast) {
  if (session.running) return null;
  if (message.role === "user") {
    return button("Edit", () => edit(index), "Edit", "Replaces this message and all later messages");
  }
  return isLast && button("Try again", again, "Try again", "Replaces this answer");
}

export function show() {
  const { chat, running } = session;
  const hadFocus = $("log").contains(document.activeElement);
  $("log").replaceChildren(...chat.messages.map((message, index) => {
    const isLast = index === chat.messages.length - 1;
    const waiting = running?.chat === chat && isLast ? reading : null;
    return messageView(message, actionOf(message, index, isLast), waiting);
  }));
  if (hadFocus) $("question").focus();
  document.title = chat.title || "pop-local";
  showForm();
  showUse();
  showSettings();
}

// Shows the growing answer, and scrolls with it unless the user has scrolled up.
function showLast() {
  const { scrollHeight, scrollTop, clientHeight } = $("scroll");
  $("log").lastChild.replaceWith(messageView(session.chat.messages.at(-1), null, reading));
  if (scrollHeight - scrollTop - clientHeight < 80) showEnd();
}

export async function keep(kept) {
  const before = kept.id;
  await chats.save(kept).catch(unkept);
  if (kept === session.chat) history.replaceState(null, "", `#${kept.id}`);
  if (kept.id !== before) tell("Another tab changed this chat, so your version was saved as a copy.");
  await showList().catch(unkept);
}

export async function open(id) {
  const { running } = session;
  const found = running?.chat.id === id ? running.chat : await chats.load(id).catch(unkept);
  if (id !== location.hash.slice(1)) return; // the user has opened another chat
  session.chat = found ?? fresh();
  leave();
  try {
    show();
  } catch {
    session.chat = fresh();
    show();
    tell("This chat is damaged, so it cannot be shown.");
  }
  showEnd();
  await showList().catch(unkept);
}

// Shows the change that another tab has made to a chat (undefined: to several chats).
export async function followTab(id) {
  const { chat, running } = session;
  if (id === chat.id && running?.chat !== chat && !isEditing()) {
    session.chat = (await chats.load(id)) ?? chat;
    show();
  }
  await showList();
}

const again = () => reply(session.chat.messages.pop().sides ? compare : single);

export const ask = (how) => take() && reply(how);

async function reply(how) {
  const { chat } = session;
  const asked = requestOf(chat);
  const message = { role: "assistant", text: "", note: "This answer is unfinished." };
  const mine = (session.running = { chat, stop: new AbortController() });
  chat.messages.push(message);
  tell("");
  startReading("Waiting for the server");
  show();
  showEnd();
  mine.ended = keep(chat)
    .then(() => how(mine, message, asked))
    .catch((error) => (mine.stop.signal.aborted ? "This answer was stopped." : error.message))
    .then((note) => (message.note = note));
  await mine.ended;
  session.running = null;
  endReading();
  await keep(chat);
  show();
  announce(message.note || "The answer is complete.");
  const { usage } = message.sides?.at(-1) ?? message;
  if (usage) await watchCatchingUp(chat, asked.model, usage.pop.job);
}

export const single = (mine, message, asked) =>
  stream(mine, message, { ...asked, pop: $("pruning").checked });

// Bypasses the cache and samples greedily, so that only pruning differs.
export async function compare(mine, message, asked) {
  const isOn = $("pruning").checked;
  const alike = { ...asked, cache_prompt: false, temperature: 0, max_tokens: COMPARED_TOKENS };
  // Warm up, so that the first measured prompt does not wait for the disk.
  const short = { messages: [{ role: "user", content: "Hi" }], max_tokens: 1, pop: false };
  await stream(mine, { text: "" }, { ...alike, ...short });
  message.sides = [{ name: "Full reading", text: "" }, { name: "Fast reading", text: "" }];
  for (const [pop, side] of [[false, message.sides[0]], [true, message.sides[1]]]) {
    side.note = await stream(mine, side, { ...alike, pop });
    if (pop === isOn) message.text = side.text; // the conversation continues with this text
  }
  return "";
}

// Streams into a message or one of its sides; resolves to a note for the user ("": no note).
async function stream(mine, target, asked) {
  let [note, due, askedAt] = ["", 0, performance.now()];
  const paint = () => {
    due = 0;
    if (session.running === mine && session.chat === mine.chat) showLast();
  };
  const keeper = setInterval(() => keep(mine.chat), 2000);
  startReading("Waiting for the server");
  try {
    target.usage = await answer(asked, mine.stop.signal, {
      comment(words) {
        const [kind, place] = words.split(" ");
        askedAt = performance.now(); // waiting in the queue does not count
        if (kind === "queued") startReading(`Position ${place} in the queue`);
      },
      progress(read) {
        showProgress(read, asked);
        if (session.chat === mine.chat) showTokens(read.total);
      },
      text(piece) {
        target.first_s ??= (performance.now() - askedAt) / 1000; // until the server sends its time
        target.text += piece;
        due ||= setTimeout(paint, 60);
      },
      end: (reason) => (note = reason === "length" ? "The answer reached its length limit." : ""),
    });
    if (target.usage) keepSpeed(asked, target.usage);
    if (target.usage?.pop.is_repeating) note = "The answer was stopped because it repeated itself.";
    if (model()?.id === asked.model) model().pop.loaded = true;
  } finally {
    clearInterval(keeper);
    paint();
  }
  return note;
}

// Shows how many of a chat's own tokens have caught up, until all have or another prompt is read.
async function watchCatchingUp(chat, name, job) {
  const [label, bar] = $("refilling").children;
  const isOver = () => session.running || session.chat !== chat;
  let most = 0;
  // If the server is down, the next question shows the error.
  for (let n; !isOver() && (n = await tokensBehind(name, job).catch(() => 0)); ) {
    most = Math.max(most, n);
    label.textContent = `Catching up: ${number(most - n)} of ${number(most)} tokens`;
    Object.assign(bar, { max: most, value: most - n });
    $("refilling").hidden = isOver();
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
  $("refilling").hidden = true;
}

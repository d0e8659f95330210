// The page: its state, and what keys, buttons, drops and other tabs do to it.

import * as chats from "./chats.js";
import { answer, askKeyBy, call, readByServer, refillable } from "./server.js";
import { button, fileView, h, megabytes, messageView } from "./view.js";

const MOST_BYTES = { document: 100_000_000, picture: 32 * 2 ** 20 };
const COMPARED_TOKENS = 400;
const CUT = "Cut off: the page was left.";

const $ = (id) => document.getElementById(id);

let models = [];
let chat = fresh();
let files = []; // to go with the next question
let editing = -1; // the message that the next question replaces
let running = null; // the answer that is being written: its chat, and how to stop it

function fresh() {
  return { id: chats.newId(), title: "", messages: [] };
}

const model = () => models.find(({ id }) => id === $("model").value);
const isRunning = () => running?.chat === chat;

function tell(words) {
  $("notice").textContent = words;
  $("notice").hidden = !words;
}

// Showing

function show() {
  const last = chat.messages.length - 1;
  const views = chat.messages.map((message, index) => {
    const actions = [];
    if (!running && message.role === "user") actions.push(["Edit", () => edit(index)]);
    if (!running && message.role !== "user" && index === last) {
      actions.push(["Try again", () => again(message)]);
    }
    return messageView(message, actions, isRunning() && index === last);
  });
  $("log").replaceChildren(...views);
  $("empty").hidden = chat.messages.length > 0;
  document.title = chat.title ? `${chat.title} · pop-local` : "pop-local";
  showComposer();
}

// Shows the answer that grows, and follows it unless somebody has scrolled up.
function showLast() {
  const view = $("scroll");
  const follows = view.scrollHeight - view.scrollTop - view.clientHeight < 80;
  $("log").lastElementChild.replaceWith(messageView(chat.messages.at(-1), [], true));
  if (follows) view.scrollTop = view.scrollHeight;
}

function showComposer() {
  $("files").replaceChildren(...files.map((file) => fileView(file, () => {
    files = files.filter((one) => one !== file);
    showComposer();
    $("question").focus();
  })));
  const isWaiting = !model() || files.some(({ isBusy }) => isBusy);
  $("send").disabled = $("compare").disabled = isWaiting;
  $("compare").hidden = $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  $("editing").hidden = editing < 0;
}

function showBar(id, words, done, total) {
  const [label, bar] = $(id).children;
  if (words) label.textContent = words;
  $(id).hidden = false;
  if (total) Object.assign(bar, { value: done, max: total });
  else bar.removeAttribute("value");
}

async function showList() {
  const heads = await chats.list();
  $("list").replaceChildren(...heads.map(({ id, title }) => {
    const link = h("a", { href: `#${id}`, onclick: () => $("chats").hidePopover() }, title);
    if (id === chat.id) link.ariaCurrent = "page";
    return h("li", {}, link, button("×", () => forget(id, title), { ariaLabel: `Delete ${title}` }));
  }));
}

function showModel() {
  const pop = model()?.pop;
  $("context").textContent = pop ? `context ${pop.n_ctx.toLocaleString("en")} tokens` : "";
  const canPrune = Boolean(pop && (pop.boundary || pop.exact));
  $("pruning").disabled = !canPrune;
  $("pruning").checked = canPrune && localStorage.getItem("pruning") !== "off";
  $("compare").title = canPrune ? "Read in full, then pruned" : "This model is not pruned";
  showComposer();
}

// Chats

async function keep(kept) {
  try {
    const before = kept.id;
    await chats.save(kept);
    if (kept === chat) history.replaceState(null, "", `#${kept.id}`);
    if (kept.id !== before) tell("Another tab changed this chat: this is a copy of it.");
    await showList();
  } catch (error) {
    tell(`This browser does not keep the chat: ${error?.message || "its storage is full"}.`);
  }
}

async function open(id) {
  const found = running?.chat.id === id ? running.chat : id && (await chats.load(id));
  if (id !== location.hash.slice(1)) return; // somebody has gone on meanwhile
  chat = found || fresh();
  leave();
  tell("");
  show();
  $("scroll").scrollTop = $("scroll").scrollHeight;
  await showList();
}

async function forget(id, title) {
  if (!confirm(`Delete "${title}"?`)) return;
  if (running?.chat.id === id) running.stop.abort();
  await running?.ended;
  await chats.remove(id);
  if (chat.id === id) location.hash = "";
  await showList();
}

// Questions and answers

function edit(index) {
  const { text, files: sent } = chat.messages[index];
  editing = index;
  files = [...sent];
  $("question").value = text;
  showComposer();
  $("question").focus();
}

function leave() {
  if (editing >= 0) {
    files = [];
    $("question").value = "";
  }
  editing = -1;
  showComposer();
  $("question").focus();
}

function again({ sides }) {
  chat.messages.pop();
  reply(Boolean(sides));
}

function ask(isCompared) {
  const text = $("question").value.trim();
  if (running || $("send").disabled || !(text || files.length)) return;
  if (editing >= 0) chat.messages.length = editing;
  chat.messages.push({ role: "user", text, files });
  chat.title ||= (text || files[0].name).slice(0, 60);
  [files, editing, $("question").value] = [[], -1, ""];
  reply(isCompared);
}

// Questions that got no answer are sent as one with the next.
function conversation(messages) {
  const sent = [];
  for (const { role, text, files: shown = [] } of messages) {
    if (!text && !shown.length) continue;
    const texts = shown.flatMap((file) => file.text ?? []);
    const pictures = shown.filter(({ url }) => url);
    const content = [
      ...pictures.map(({ url }) => ({ type: "image_url", image_url: { url } })),
      { type: "text", text: [...texts, text].join("\n\n") },
    ];
    if (sent.at(-1)?.role === role) sent.at(-1).content.push(...content);
    else sent.push({ role, content });
  }
  return sent;
}

async function reply(isCompared) {
  const asked = chat;
  const messages = conversation(asked.messages);
  const message = { role: "assistant", text: "", note: CUT };
  asked.messages.push(message);
  const stop = new AbortController();
  running = { chat: asked, stop };
  running.ended = (async () => {
    try {
      await keep(asked);
      message.note = await write(asked, message, messages, isCompared, stop.signal);
    } catch (error) {
      message.note = stop.signal.aborted ? "Stopped." : error.message;
    }
  })();
  tell("");
  show();
  $("scroll").scrollTop = $("scroll").scrollHeight;
  await running.ended;
  running = null;
  $("reading").hidden = true;
  await keep(asked);
  show();
  $("question").focus();
  watchRefilling();
}

// Writes an answer, or two side by side; resolves to a note for the reader, "" for none.
async function write(asked, message, messages, isCompared, signal) {
  const body = { model: $("model").value, messages };
  const isOn = $("pruning").checked;
  const pop = $("pruning").disabled ? {} : { pop: isOn };
  if (!isCompared) return stream(asked, message, message, { ...body, ...pop }, signal);
  // As if each were new, and without chance, so that pruning is all that differs.
  const alike = { ...body, repeatable: true, temperature: 0, max_tokens: COMPARED_TOKENS };
  message.sides = [
    { name: "In full", text: "", pop: false },
    { name: "Pruned", text: "", pop: true },
  ];
  // The first reading of all would wait for the disk.
  const warm = { ...alike, messages: [{ role: "user", content: "Hi" }], max_tokens: 1, pop: false };
  await stream(asked, message, { text: "" }, warm, signal);
  for (const side of message.sides) {
    await stream(asked, message, side, { ...alike, pop: side.pop }, signal);
    if (side.pop === isOn) message.text = side.text; // the conversation goes on from it
  }
  return "";
}

// Streams into `target`, the message or a side of it.
async function stream(asked, message, target, body, signal) {
  let isDue = false;
  let note = "";
  const paint = () => {
    isDue = false;
    if (running?.chat === asked && chat === asked) showLast();
  };
  const keeper = setInterval(() => keep(asked), 2000);
  showBar("reading", "Reading");
  try {
    target.usage = await answer(body, signal, {
      comment(words) {
        const [, ahead] = /^queued (\d+)$/.exec(words) ?? [];
        const [, done, total] = /^read (\d+) of (\d+)$/.exec(words) ?? [];
        if (ahead) showBar("reading", `Waiting, ${ahead} before this`);
        if (total) showBar("reading", `Reading, ${done} of ${total} tokens`, done, total);
      },
      text(piece) {
        target.text += piece;
        $("reading").hidden = true;
        if (!isDue) setTimeout(paint, 60);
        isDue = true;
      },
      end(reason) {
        if (reason === "length") note = "Ended at the limit of its length.";
      },
    });
  } finally {
    clearInterval(keeper);
    paint();
  }
  return note;
}

let watch = 0;

async function watchRefilling() {
  const mine = ++watch;
  let total = 0;
  try {
    for (let n; !running && mine === watch && (n = await refillable()); ) {
      total = Math.max(total, n);
      showBar("refilling", "", total - n, total);
      await new Promise((resolve) => setTimeout(resolve, 500));
    }
  } catch {
    // The next question tells of it.
  }
  if (mine === watch) $("refilling").hidden = true;
}

// Files

async function add(given) {
  tell("");
  for (const file of given) await addOne(file).catch((error) => tell(error.message));
  $("question").focus();
}

async function addOne(given) {
  const kind = given.type.startsWith("image/") ? "picture" : "document";
  if (kind === "picture" && !model()?.pop.images) {
    throw new Error(`${given.name}: this model reads no pictures.`);
  }
  if (given.size > MOST_BYTES[kind]) {
    const most = megabytes(MOST_BYTES[kind]);
    throw new Error(`${given.name} is too large: ${megabytes(given.size)} of at most ${most}.`);
  }
  const file = { name: given.name, isBusy: true };
  files.push(file);
  showComposer();
  try {
    const text = await readByServer(given);
    if (kind === "document") file.text = text;
    else file.url = await asUrl(given);
    delete file.isBusy;
  } finally {
    if (file.isBusy) files = files.filter((one) => one !== file);
    showComposer();
  }
}

const asUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
  reader.readAsDataURL(file);
});

// What a person does

$("ask").onsubmit = (event) => {
  event.preventDefault();
  ask(false);
};
$("compare").onclick = () => {
  if ($("pruning").disabled) tell("This model is not pruned: there is nothing to compare.");
  else ask(true);
};
$("stop").onclick = () => running?.stop.abort();
$("leave").onclick = leave;
$("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask(false);
};
document.onkeydown = (event) => {
  if (event.key !== "Escape") return;
  if (running) running.stop.abort();
  else if (editing >= 0) leave();
};
$("attach").onclick = () => $("file").click();
$("file").onchange = async () => {
  await add([...$("file").files]);
  $("file").value = "";
};
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
document.ondragover = (event) => {
  if (hasFiles(event)) event.preventDefault();
  document.body.classList.toggle("dropping", hasFiles(event));
};
document.ondragleave = (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
};
document.ondrop = (event) => {
  document.body.classList.remove("dropping");
  if (!hasFiles(event)) return;
  event.preventDefault();
  add([...event.dataTransfer.files]);
};
document.onpaste = ({ clipboardData }) => add([...clipboardData.files]);
$("pruning").onchange = () =>
  localStorage.setItem("pruning", $("pruning").checked ? "on" : "off");
$("model").onchange = () => {
  localStorage.setItem("model", $("model").value);
  showModel();
};

const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme || (dark.matches && "dark")) === "dark";
const showTheme = () => ($("theme").textContent = isDark() ? "Light" : "Dark");
$("theme").onclick = () => {
  const theme = isDark() ? "light" : "dark";
  localStorage.setItem("theme", theme);
  document.documentElement.dataset.theme = theme;
  showTheme();
};
dark.onchange = showTheme;

askKeyBy((wasWrong) => new Promise((resolve) => {
  $("wanted").textContent = wasWrong ? "That key is wrong" : "This server asks for its API key";
  $("entry").onclose = () => resolve($("key").value);
  $("key").value = "";
  if (!$("entry").open) $("entry").showModal();
}));

window.onhashchange = () => open(location.hash.slice(1));
chats.onChange(async (id) => {
  if (id === chat.id && !isRunning() && editing < 0) {
    chat = (await chats.load(id)) ?? chat;
    show();
  }
  await showList();
});

showTheme();
try {
  await open(location.hash.slice(1));
} catch (error) {
  tell(`This browser keeps no chats: ${error.message}.`);
}
try {
  models = (await (await call("v1/models")).json()).data;
  $("model").replaceChildren(...models.map(({ id }) => h("option", {}, id)));
  const chosen = localStorage.getItem("model");
  if (models.some(({ id }) => id === chosen)) $("model").value = chosen;
} catch (error) {
  tell(error.message);
}
showModel();

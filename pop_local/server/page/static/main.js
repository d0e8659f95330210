// The page's state, and its handlers for keys, buttons, drops and other tabs.

import * as chats from "./chats.js";
import { answer, call, readByServer, refillable } from "./server.js";
import { button, fileView, h, megabytes, messageView, number } from "./view.js";

const MOST_BYTES = { document: 100_000_000, image: 32 * 2 ** 20 };
const COMPARED_TOKENS = 400;

const $ = (id) => document.getElementById(id);
const fresh = () => ({ id: chats.newId(), title: "", messages: [] });

let models = [];
let chat = fresh();
let files = []; // attached to the next question
let editing = -1; // the message that the next question replaces
let running = null; // the current answer: its chat, abort controller and end

const model = () => models.find(({ id }) => id === $("model").value);
const tell = (words) => Object.assign($("notice"), { textContent: words, hidden: !words });
const unkept = (error) => void tell(`This browser cannot store chats: ${error?.message || "its storage is full"}.`);
const showEnd = () => ($("scroll").scrollTop = $("scroll").scrollHeight);

function show() {
  $("log").replaceChildren(...chat.messages.map((message, index) => {
    const isMine = message.role === "user";
    const isLast = index === chat.messages.length - 1;
    const action = isMine ? ["Edit", () => edit(index)] : isLast && ["Try again", again];
    return messageView(message, !running && action, running?.chat === chat && isLast);
  }));
  document.title = chat.title || "pop-local";
  showForm();
}

// Shows the growing answer, and scrolls with it unless the user has scrolled up.
function showLast() {
  const { scrollHeight, scrollTop, clientHeight } = $("scroll");
  $("log").lastChild.replaceWith(messageView(chat.messages.at(-1), null, true));
  if (scrollHeight - scrollTop - clientHeight < 80) showEnd();
}

function showForm() {
  $("files").replaceChildren(...files.map((file) => fileView(file, () => drop(file))));
  $("send").disabled = $("compare").disabled = !model() || files.some(({ isBusy }) => isBusy);
  $("compare").hidden = $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  $("editing").hidden = editing < 0;
}

function showBar(id, ariaLabel, done, total) {
  const [label, bar] = $(id).children;
  const counted = total && `${ariaLabel}: ${number(done)} of ${number(total)} tokens`;
  label.textContent = counted || ariaLabel;
  Object.assign(bar, { ariaLabel, max: total || 1, value: done || 0 });
  if (!total) bar.removeAttribute("value");
  $(id).hidden = false;
}

const showList = async () => $("list").replaceChildren(
  ...(await chats.list()).map(([id, title]) => h("li", {},
    h("a", { href: `#${id}`, ariaCurrent: id === chat.id ? "page" : null }, title),
    button("×", () => forget(id, title), `Delete ${title}`))));

function showModel() {
  const pop = model()?.pop;
  const canPrune = Boolean(pop?.boundary || pop?.exact);
  $("context").textContent = pop ? `context of ${number(pop.n_ctx)} tokens` : "";
  $("pruning").disabled = !canPrune;
  $("pruning").checked = canPrune && localStorage.pruning !== "off";
  showForm();
}

async function keep(kept) {
  const before = kept.id;
  await chats.save(kept).catch(unkept);
  if (kept === chat) history.replaceState(null, "", `#${kept.id}`);
  if (kept.id !== before) tell("Another tab changed this chat, so your version was saved as a copy.");
  await showList().catch(unkept);
}

async function open(id) {
  const found = running?.chat.id === id ? running.chat : await chats.load(id).catch(unkept);
  if (id !== location.hash.slice(1)) return; // the user has opened another chat
  chat = found ?? fresh();
  leave();
  try {
    show();
  } catch {
    chat = fresh();
    show();
    tell("This chat is damaged, so it cannot be shown.");
  }
  showEnd();
  await showList().catch(unkept);
}

async function forget(id, title) {
  if (!confirm(`Delete "${title}"?`)) return;
  if (running?.chat.id === id) running.stop.abort();
  await running?.ended;
  await chats.remove(id).then(showList).catch(unkept);
  if (chat.id === id) location.hash = "";
}

// Loads a message into the form (-1: stops editing).
function edit(index) {
  const { text = "", files: sent = [] } = chat.messages[index] ?? {};
  [editing, files, $("question").value] = [index, [...sent], text];
  showForm();
  $("question").focus();
}

const leave = () => editing >= 0 && edit(-1);
const again = () => reply(chat.messages.pop().sides ? compare : single);

function ask(how) {
  const text = $("question").value.trim();
  if (running || $("send").disabled || !(text || files.length)) return;
  if (editing >= 0) chat.messages.length = editing;
  chat.messages.push({ role: "user", text, files });
  chat.title ||= (text || files[0].name).slice(0, 60);
  edit(-1);
  reply(how);
}

// Returns the messages for the server; an unanswered question is merged with the next question.
function conversation() {
  const sent = [];
  for (const { role, text, files: shown = [] } of chat.messages) {
    const texts = [...shown.map((file) => file.text), text].filter(Boolean);
    const content = shown.filter(({ url }) => url)
      .map(({ url }) => ({ type: "image_url", image_url: { url } }));
    if (texts.length) content.push({ type: "text", text: texts.join("\n\n") });
    if (sent.at(-1)?.role === role) sent.at(-1).content.push(...content);
    else if (content.length) sent.push({ role, content });
  }
  return sent;
}

async function reply(how) {
  const asked = { model: $("model").value, messages: conversation() };
  const message = { role: "assistant", text: "", note: "This answer is unfinished." };
  const mine = (running = { chat, stop: new AbortController() });
  chat.messages.push(message);
  tell("");
  show();
  showEnd();
  mine.ended = keep(mine.chat)
    .then(() => how(mine, message, asked))
    .catch((error) => (mine.stop.signal.aborted ? "This answer was stopped." : error.message))
    .then((note) => (message.note = note));
  await mine.ended;
  running = null;
  $("reading").hidden = true;
  await keep(mine.chat);
  show();
  watchRefilling();
}

const single = (mine, message, asked) =>
  stream(mine, message, { ...asked, pop: $("pruning").checked });

// Bypasses the cache and samples greedily, so that only pruning differs.
async function compare(mine, message, asked) {
  const isOn = $("pruning").checked;
  const alike = { ...asked, cache_prompt: false, temperature: 0, max_tokens: COMPARED_TOKENS };
  // Warm up, so that the first measured prompt does not wait for the disk.
  const short = { messages: [{ role: "user", content: "Hi" }], max_tokens: 1, pop: false };
  await stream(mine, { text: "" }, { ...alike, ...short });
  message.sides = [{ name: "In full", text: "" }, { name: "Pruned", text: "" }];
  for (const [pop, side] of [[false, message.sides[0]], [true, message.sides[1]]]) {
    await stream(mine, side, { ...alike, pop });
    if (pop === isOn) message.text = side.text; // the conversation continues with this text
  }
  return "";
}

// Streams into a message or one of its sides; resolves to a note for the user ("": no note).
async function stream(mine, target, asked) {
  let [note, due] = ["", 0];
  const paint = () => {
    due = 0;
    if (running === mine && chat === mine.chat) showLast();
  };
  const keeper = setInterval(() => keep(mine.chat), 2000);
  showBar("reading", "Reading");
  try {
    target.usage = await answer(asked, mine.stop.signal, {
      comment(words) {
        const [kind, n, , total] = words.split(" ");
        if (kind === "queued") showBar("reading", `Position ${n} in the queue`);
        if (kind === "read") showBar("reading", "Reading", Number(n), Number(total));
      },
      text(piece) {
        target.text += piece;
        $("reading").hidden = true;
        due ||= setTimeout(paint, 60);
      },
      end: (reason) => (note = reason === "length" ? "The answer reached its length limit." : ""),
    });
  } finally {
    clearInterval(keeper);
    paint();
  }
  return note;
}

async function watchRefilling() {
  let most = 0;
  // If the server is down, the next question shows the error.
  for (let n; !running && (n = await refillable().catch(() => 0)); ) {
    most = Math.max(most, n);
    showBar("refilling", "Catching up", most - n, most);
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
  $("refilling").hidden = true;
}

function drop(file) {
  files = files.filter((one) => one !== file);
  showForm();
  $("question").focus();
}

async function add(given) {
  const refused = [];
  for (const file of given) await addOne(file).catch(({ message }) => refused.push(message));
  tell(refused.join("\n"));
  $("question").focus();
}

async function addOne(given) {
  const { name, size, type } = given;
  const most = MOST_BYTES[type.startsWith("image/") ? "image" : "document"];
  const cannotSee = type.startsWith("image/") && !model()?.pop?.images;
  if (cannotSee) throw new Error(`${name} is an image, but the model cannot read images.`);
  if (size > most) throw new Error(`${name} is too large: the limit is ${megabytes(most)}.`);
  const busy = { name, isBusy: true };
  files.push(busy);
  showForm();
  const read = await readByServer(given).finally(() => drop(busy));
  files.push(read);
  showForm();
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  ask(single);
};
$("compare").onclick = () =>
  $("pruning").disabled ? tell("This model cannot be pruned. Convert it with `pop-local convert` to compare.") : ask(compare);
$("stop").onclick = () => running?.stop.abort();
$("leave").onclick = leave;
$("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask(single);
};
document.onkeydown = ({ key }) => {
  if (key === "Escape" && running) running.stop.abort();
  else if (key === "Escape") leave();
};
$("attach").onclick = () => $("file").click();
$("file").onchange = () => add([...$("file").files]).then(() => ($("file").value = ""));
document.ondragover = document.ondrop = (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  if (event.type === "drop") add([...event.dataTransfer.files]);
};
$("pruning").onchange = () => (localStorage.pruning = $("pruning").checked ? "on" : "off");
$("model").onchange = () => {
  localStorage.model = $("model").value;
  showModel();
};
$("theme").onclick = () => {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  localStorage.theme = (localStorage.theme || system) === "dark" ? "light" : "dark";
  document.documentElement.style.colorScheme = localStorage.theme;
};
$("chats").onclick = ({ target }) => target.closest("a") && $("chats").hidePopover();
window.onhashchange = () => open(location.hash.slice(1));

chats.onChange(async (id) => {
  if (id === chat.id && running?.chat !== chat && editing < 0) {
    chat = (await chats.load(id)) ?? chat;
    show();
  }
  await showList();
});

await open(location.hash.slice(1));
$("question").focus();
await call("v1/models").then(async (response) => (models = (await response.json()).data))
  .catch(({ message }) => tell(message));
$("model").replaceChildren(...models.map(({ id }) => h("option", {}, id)));
if (models.some(({ id }) => id === localStorage.model)) $("model").value = localStorage.model;
showModel();

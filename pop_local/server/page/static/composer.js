// The form for the next question: its text, its files, and the message that it replaces.

import { showContext } from "./context.js";
import { $, button, h, megabytes, tell } from "./dom.js";
import { call, readByServer } from "./server.js";
import { model, session } from "./session.js";
import { showSettings } from "./settings.js";
import { fileView } from "./view.js";

const MOST_BYTES = { document: 100_000_000, image: 32 * 2 ** 20 };

let files = []; // attached to the next question
let editing = -1; // the message that the next question replaces

export const isEditing = () => editing >= 0;

export function showForm() {
  const isRunning = session.running !== null;
  $("files").replaceChildren(...files.map((file) => fileView(file, () => drop(file))));
  $("send").disabled = $("compare").disabled = !model() || files.some(({ isBusy }) => isBusy);
  $("compare").hidden = $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  $("editing").hidden = editing < 0;
}

// Shows the use of the context by the chat and the attached files.
export const showUse = () => {
  const { messages } = session.chat;
  return showContext(editing < 0 ? messages : messages.slice(0, editing), files);
};

function showFiles() {
  showForm();
  showUse();
}

// Loads a message into the form (-1: stops editing).
export function edit(index) {
  const { text = "", files: sent = [] } = session.chat.messages[index] ?? {};
  [editing, files, $("question").value] = [index, [...sent], text];
  showFiles();
  $("question").focus();
}

export const leave = () => editing >= 0 && edit(-1);

// Adds the question to the chat, and clears the form. Returns false if nothing can be sent.
export function take() {
  const text = $("question").value.trim();
  if (session.running || $("send").disabled || !(text || files.length)) return false;
  const { chat } = session;
  if (editing >= 0) chat.messages.length = editing;
  chat.messages.push({ role: "user", text, files });
  chat.title ||= (text || files[0].name).slice(0, 60);
  edit(-1);
  return true;
}

function drop(file) {
  files = files.filter((one) => one !== file);
  tell("");
  showFiles();
  $("question").focus();
}

export async function add(given) {
  const refused = [];
  tell("");
  for (const file of given) await addOne(file).catch(({ message }) => refused.push(message));
  if (refused.length) tell(refused.join("\n"));
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
  const read = await readByServer(given).finally(() => (files = files.filter((one) => one !== busy)))
    .catch((error) => {
      showForm();
      throw error;
    });
  files.push(read);
  showFiles();
}

const ask = (words) => Object.assign($("question"), { value: words }).focus();

// Small models answer lookups best at temperature 0.
async function addExample() {
  ask("What rule was painted above the lamp-room door?");
  session.chat.settings = { ...session.chat.settings, temperature: 0 };
  showSettings();
  const text = await (await call("page/example.md")).text();
  files = [{ name: "lighthouse.md", text }];
  showFiles();
}

function chooseFile(words) {
  ask(words);
  $("file").click();
}

const EXAMPLES = [
  ["Ask about a sample story", () => addExample().catch(({ message }) => tell(message))],
  ["Summarize a document", () => chooseFile("Summarize this document in five sentences.")],
  ["Find the errors in a log", () => chooseFile("Which errors does this log contain, and what caused them?")],
  ["Explain a piece of code", () => chooseFile("Explain step by step what this code does.")],
];

export const showExamples = () =>
  $("examples").replaceChildren(...EXAMPLES.map(([words, act]) => h("li", {}, button(words, act))));

// Calls `send` when the user sends the question with Enter or the button.
export function watchForm(send) {
  $("ask").onsubmit = (event) => {
    event.preventDefault();
    send();
  };
  $("question").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  };
  $("leave").onclick = leave;
  $("attach").onclick = () => $("file").click();
  $("file").onchange = () => add([...$("file").files]).then(() => ($("file").value = ""));
  document.ondragover = document.ondrop = (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    if (event.type === "drop") add([...event.dataTransfer.files]);
  };
}

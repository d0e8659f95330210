// Chats as files: exports all chats as JSON and one chat as Markdown, and checks files to import.

import * as chats from "./chats.js";
import { counted, h, megabytes, number, seconds } from "./dom.js";
import { messageView } from "./view.js";

const FORMAT = "pop-local chats";
const VERSION = 1;
const MOST_BYTES = 400_000_000; // browsers limit strings to about 500 MB

function download(parts, name, type) {
  const url = URL.createObjectURL(new Blob(parts, { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

const today = () => new Date().toLocaleDateString("sv"); // YYYY-MM-DD

function markdownOf({ role, text, files = [], sides, note }) {
  const parts = [`## ${role === "user" ? "Question" : "Answer"}`];
  for (const { name, text: content } of files) {
    parts.push(`*Attached: ${name}${content ? ` (${counted(content.length, "character")})` : ""}*`);
  }
  for (const { name, text: said, usage } of sides ?? []) {
    const time = usage ? `, first token after ${seconds(usage.pop.ttft_s)}` : "";
    parts.push(`### ${name}${time}`, said);
  }
  if (!sides) parts.push(text);
  if (note) parts.push(`*${note}*`);
  return parts.filter(Boolean).join("\n\n");
}

// Downloads one chat. The documents' texts are left out.
export async function exportMarkdown(id) {
  const { title, messages } = await chats.load(id);
  const name = title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "chat";
  const text = [`# ${title}`, ...messages.map(markdownOf)].join("\n\n");
  download([text, "\n"], `${name}.md`, "text/markdown");
}

const isText = (value) => typeof value === "string";
const isId = (value) => isText(value) && /^[0-9a-z]{1,200}$/.test(value);
const isTextOrNothing = (value) => value === undefined || isText(value);
const isNumberIn = (value, least, most) =>
  value === undefined || (Number.isFinite(value) && value >= least && value <= most);

function isFile(file) {
  const isImage = isText(file?.url) && /^data:image\/[\w.+-]+;base64,/.test(file.url);
  return isText(file?.name) && (isImage || (isText(file.text) && file.url === undefined));
}

function isMessage(message) {
  const { role, text, files = [], sides, note } = message ?? {};
  const areSides = sides === undefined || (Array.isArray(sides) && sides.length === 2
    && sides.every((side) => isText(side?.name) && isText(side.text)));
  if (!["user", "assistant"].includes(role) || !isText(text) || !isTextOrNothing(note)) return false;
  if (!areSides || !Array.isArray(files) || !files.every(isFile)) return false;
  try {
    messageView(message); // the figures
    return true;
  } catch {
    return false;
  }
}

function isChat(chat) {
  const { id, title, version, messages, settings = {} } = chat ?? {};
  const areSettings = typeof settings === "object" && settings !== null
    && isTextOrNothing(settings.system) && isNumberIn(settings.temperature, 0, 10)
    && isNumberIn(settings.maxTokens, 1, 1e9);
  return isId(id) && isId(version) && isText(title) && title && areSettings
    && Array.isArray(messages) && messages.every(isMessage);
}

// Downloads all chats that could be imported, and resolves to a sentence. Throws an Error if no chat
// exists, or if the file would be too large to import.
export async function exportAll() {
  const parts = [];
  let [size, damaged] = [0, 0];
  await chats.each((chat) => {
    if (!isChat(chat)) return void (damaged += 1);
    const part = JSON.stringify(chat);
    size += part.length;
    parts.push(parts.length ? ",\n" : "", part);
  });
  if (!parts.length) throw new Error("No chats are stored in this browser yet.");
  if (size > MOST_BYTES) throw new Error(`The export is larger than ${megabytes(MOST_BYTES)}. Delete some chats.`);
  const head = JSON.stringify({ format: FORMAT, version: VERSION, exported: new Date().toISOString() });
  const name = `pop-local-chats-${today()}.json`;
  download([head.slice(0, -1), ',"chats":[\n', ...parts, "\n]}\n"], name, "application/json");
  const without = damaged ? ` ${counted(damaged, "damaged chat")} left out.` : "";
  return `Exported ${counted(parts.length / 2, "chat")}.${without}`;
}

async function parsed(file) {
  try {
    return JSON.parse(await file.text());
  } catch {
    return null;
  }
}

// Adds the chats of an exported file, and resolves to a sentence about them. Throws an Error with one
// sentence, and imports nothing, if the file is not an undamaged export.
export async function importFile(file) {
  const { name, size } = file;
  if (size > MOST_BYTES) throw new Error(`${name} is too large: the limit is ${megabytes(MOST_BYTES)}.`);
  const found = await parsed(file);
  if (found?.format !== FORMAT) throw new Error(`${name} is not a file of exported chats, or it is cut off.`);
  if (found.version !== VERSION) throw new Error(`${name} comes from a newer version of pop-local: update pop-local first.`);
  const wrong = Array.isArray(found.chats) ? found.chats.findIndex((chat) => !isChat(chat)) : 0;
  if (wrong >= 0) throw new Error(`${name} is damaged at chat ${wrong + 1}, so no chat was imported.`);
  const { added, present } = await chats.addAll(found.chats).catch((error) => {
    throw new Error(`No chat was imported: ${error?.message || "the browser's storage is full"}.`);
  });
  const already = present ? ` ${number(present)} ${present === 1 ? "was" : "were"} already here.` : "";
  return `Imported ${counted(added, "chat")}.${already}`;
}

// The list of chats: search, rename, download, and delete.

import * as chats from "./chats.js";
import { $, announce, button, counted, h, icon, tell } from "./dom.js";
import { session } from "./session.js";
import { exportAll, exportMarkdown, importFile } from "./transfer.js";

const SEARCH_DELAY_MS = 200;
let shown = ""; // describes the current items, which are replaced only if something changed
let searched = { key: "", found: [] }; // the latest search, because searching reads all chats
let due = 0;

export const unkept = (error) =>
  void tell(`This browser cannot store chats: ${error?.message || "its storage is full"}.`);

const textsOf = ({ title, messages }) => [
  title,
  ...[messages].flat().flatMap((message) => [
    message?.text,
    ...[message?.files ?? []].flat().map((file) => file?.name),
    ...[message?.sides ?? []].flat().map((side) => side?.text),
  ]),
];

// Resolves to [id, title] of the chats whose title, messages or file names contain the words.
async function matches(words) {
  const wanted = words.toLowerCase();
  const contains = (text) => typeof text === "string" && text.toLowerCase().includes(wanted);
  const found = [];
  await chats.each((chat) => textsOf(chat).some(contains) && found.push([chat.id, chat.title]));
  return found;
}

async function listed(words) {
  const all = await chats.list();
  if (!words) return all;
  const key = JSON.stringify([words, all]);
  if (key !== searched.key) searched = { key, found: await matches(words) };
  return searched.found;
}

const item = ([id, title]) => h("li", {},
  h("a", { href: `#${id}`, ariaCurrent: id === session.chat.id ? "page" : null }, title),
  button(icon("rename"), ({ currentTarget }) => rename(id, title, currentTarget.parentElement),
    `Rename ${title}`, "Rename"),
  button(icon("save"), () => exportMarkdown(id).catch(({ message }) => tell(message)),
    `Download ${title} as Markdown`, "Download as Markdown"),
  button(icon("remove"), () => forget(id, title), `Delete ${title}`, "Delete"));

// Shows the chats that match the search. Keeps the focus, and waits while a title is edited.
export async function showList() {
  const words = $("search").value.trim();
  const found = await listed(words);
  if (words !== $("search").value.trim() || $("list").querySelector("input")) return;
  const wanted = JSON.stringify([found, session.chat.id, words]);
  if (wanted === shown) return;
  shown = wanted;
  const focused = $("list").contains(document.activeElement) && document.activeElement.ariaLabel;
  const none = words ? `No chat contains “${words}”.` : "Your chats appear here.";
  $("list").replaceChildren(...(found.length ? found.map(item) : [h("li", { className: "quiet" }, none)]));
  if (focused) [...$("list").querySelectorAll("button")].find((one) => one.ariaLabel === focused)?.focus();
  if (words) announce(found.length ? `${counted(found.length, "chat")} found` : none);
}

async function saveTitle(id, title) {
  const current = session.running?.chat.id === id ? session.running.chat : session.chat;
  const chat = current.id === id ? current : await chats.load(id);
  if (chat === session.chat) document.title = title;
  await chats.save(Object.assign(chat, { title }));
}

// Replaces a chat's link with a field. Enter and leaving the field save the title, Escape does not.
function rename(id, title, row) {
  const field = h("input", { value: title, maxLength: 200, ariaLabel: "New title" });
  const end = async (isSaved) => {
    if (!field.isConnected) return;
    field.onblur = null;
    const words = field.value.trim();
    field.remove();
    if (isSaved && words && words !== title) await saveTitle(id, words).catch(unkept);
    shown = "";
    await showList().catch(unkept);
    $("list").querySelector(`a[href="#${id}"]`)?.focus();
  };
  field.onblur = () => end(true);
  field.onkeydown = (event) => {
    if (event.key === "Escape") event.preventDefault(); // keeps the list open on small screens
    if (event.key === "Enter" || event.key === "Escape") end(event.key === "Enter");
    event.stopPropagation();
  };
  row.replaceChildren(field);
  field.select();
}

async function forget(id, title) {
  if (!confirm(`Delete "${title}"?`)) return;
  const { running } = session;
  if (running?.chat.id === id) {
    running.stop.abort();
    await running.ended;
  }
  await chats.remove(id).then(showList).catch(unkept);
  if (session.chat.id === id) location.hash = "";
}

// Shows the result of an export or import, or its error.
async function report(work) {
  const shownAt = $("transferred");
  shownAt.textContent = "";
  shownAt.textContent = await work.catch(({ message }) => message);
  await showList().catch(unkept);
}

export function watchSidebar() {
  $("search").oninput = () => {
    clearTimeout(due);
    due = setTimeout(() => showList().catch(unkept), SEARCH_DELAY_MS);
  };
  $("search").onkeydown = (event) => {
    if (event.key !== "Escape" || !$("search").value) return;
    event.preventDefault();
    event.stopPropagation();
    $("search").value = "";
    showList().catch(unkept);
  };
  $("export").onclick = () => report(exportAll());
  $("import").onclick = () => $("chosen").click();
  $("chosen").onchange = () => {
    report(importFile($("chosen").files[0]));
    $("chosen").value = "";
  };
  $("chats").onclick = ({ target }) => target.closest("a") && $("chats").hidePopover();
}

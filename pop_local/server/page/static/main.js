// Starts the page, and connects its controls.

import * as chats from "./chats.js";
import { leave, showExamples, showForm, showUse, watchForm } from "./composer.js";
import { ask, compare, followTab, keep, open, single } from "./conversation.js";
import { $, h, icon, tell } from "./dom.js";
import { watchHints } from "./hints.js";
import { call } from "./server.js";
import { model, session } from "./session.js";
import { showSettings, watchSettings } from "./settings.js";
import { watchSidebar } from "./sidebar.js";

function showModel() {
  const pop = model()?.pop;
  const canPrune = Boolean(pop?.boundary || pop?.exact);
  $("pruning").disabled = !canPrune;
  $("pruning").checked = canPrune && localStorage.pruning !== "off";
  showForm();
  showUse();
}

async function showModels() {
  session.models = (await (await call("v1/models")).json()).data;
  $("model").replaceChildren(...session.models.map(({ id }) => h("option", {}, id)));
  if (session.models.some(({ id }) => id === localStorage.model)) $("model").value = localStorage.model;
  showModel();
}

for (const name of ["attach", "settings", "theme"]) $(name).append(icon(name));
$("compare").onclick = () => {
  if (!$("pruning").disabled) ask(compare);
  else tell("This model does not support fast reading. To compare, convert the model with `pop-local convert`.");
};
$("stop").onclick = () => session.running?.stop.abort();
document.onkeydown = ({ key }) => {
  if (key !== "Escape" || document.querySelector("dialog[open], #chats:popover-open")) return;
  if (session.running) session.running.stop.abort();
  else leave();
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
window.onhashchange = () => open(location.hash.slice(1));
chats.onChange(followTab);
watchForm(() => ask(single));
watchHints();
watchSidebar();
watchSettings(() => {
  showSettings();
  if (session.chat.messages.length) keep(session.chat);
});

showExamples();
await open(location.hash.slice(1));
$("question").focus();
await showModels().catch(({ message }) => tell(message));

// The dialog for a chat's settings: system prompt, temperature, and answer length.

import { $, tell } from "./dom.js";
import { call } from "./server.js";
import { model, session } from "./session.js";

const FIELDS = ["system", "temperature", "maxTokens"];

// Shows whether the chat's settings differ from the defaults.
export function showSettings() {
  const isChanged = Object.keys(session.chat.settings ?? {}).length > 0;
  $("settings").classList.toggle("changed", isChanged);
  $("settings").dataset.hint = isChanged
    ? "Settings of this chat (changed)" : "System prompt, temperature, and answer length";
}

async function showDefaults() {
  const name = model()?.id;
  if (!name) return;
  const { default_generation_settings: defaults } =
    await (await call(`props?model=${encodeURIComponent(name)}`)).json();
  const { temperature } = defaults.params;
  $("temperature").placeholder = temperature === null ? "" : `Default: ${temperature}`;
}

function open() {
  for (const name of FIELDS) $(name).value = session.chat.settings?.[name] ?? "";
  $("adjust").showModal();
  showDefaults().catch(() => {}); // the next question shows the error
}

function read() {
  const settings = {};
  const system = $("system").value.trim();
  if (system) settings.system = system;
  for (const name of ["temperature", "maxTokens"]) {
    if ($(name).value !== "") settings[name] = $(name).valueAsNumber;
  }
  return settings;
}

// Calls `onSave` after the user has changed the current chat's settings.
export function watchSettings(onSave) {
  $("settings").onclick = open;
  $("reset").onclick = () => FIELDS.forEach((name) => ($(name).value = ""));
  $("dismiss").onclick = () => $("adjust").close();
  $("adjusting").onsubmit = () => {
    session.chat.settings = read();
    localStorage.settings = JSON.stringify(session.chat.settings);
    tell("");
    onSave();
  };
}

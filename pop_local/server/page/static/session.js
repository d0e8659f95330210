// The page's state, which several modules read, and the requests that follow from it.

import { newId } from "./chats.js";
import { $ } from "./dom.js";

function storedSettings() {
  try {
    return { ...JSON.parse(localStorage.settings) };
  } catch {
    return {};
  }
}

export const fresh = () => ({ id: newId(), title: "", messages: [], settings: storedSettings() });

// `running` is the current answer: its chat, abort controller, and end.
export const session = { models: [], chat: fresh(), running: null };

export const model = () => session.models.find(({ id }) => id === $("model").value);

// Returns the server's messages for a chat; an unanswered question is merged with the next question.
function messagesOf({ messages, settings = {} }) {
  const sent = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const { role, text, files: shown = [] } of messages) {
    const texts = [...shown.map((file) => file.text), text].filter(Boolean);
    const content = shown.filter(({ url }) => url)
      .map(({ url }) => ({ type: "image_url", image_url: { url } }));
    if (texts.length) content.push({ type: "text", text: texts.join("\n\n") });
    if (sent.at(-1)?.role === role) sent.at(-1).content.push(...content);
    else if (content.length) sent.push({ role, content });
  }
  return sent;
}

// Returns the fields of a request that answers a chat's last question.
export function requestOf(chat) {
  const { temperature, maxTokens } = chat.settings ?? {};
  return {
    model: $("model").value,
    messages: messagesOf(chat),
    ...(temperature !== undefined && { temperature }),
    ...(maxTokens !== undefined && { max_tokens: maxTokens }),
  };
}

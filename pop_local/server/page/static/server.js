// Sends requests to the server, with an API key if required, and reads the events of a stream.

let asking = null;

const askKey = () => new Promise((resolve) => {
  const [entry, key] = ["entry", "key"].map((id) => document.getElementById(id));
  Object.assign(key, { value: "", placeholder: sessionStorage.apiKey ? "This key is wrong" : "" });
  entry.onclose = () => resolve(key.value);
  entry.showModal();
});

const because = (words) => (error) => {
  throw error?.name === "AbortError" ? error : new Error(words);
};

const sentence = (words) => `${words[0].toUpperCase()}${words.slice(1)}${/[.!?]$/.test(words) ? "" : "."}`;

// Returns an Error with the server's reason, its `code`, and its `figures`.
function refused({ message, ...figures }) {
  return Object.assign(new Error(sentence(message)), { code: figures.code, figures });
}

// Fetches a path. Throws an Error with the server's reason, or AbortError.
export async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.apiKey;
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers })
      .catch(because("The server does not respond. Is it running?"));
    if (response.ok) return response;
    if (response.status !== 401) {
      const body = await response.json().catch(() => null);
      throw refused(body?.error ?? { message: `The server refused the request (${response.status})` });
    }
    asking ??= askKey().finally(() => (asking = null));
    sessionStorage.apiKey = await asking;
  }
}

// Yields { comment } and { data }. Throws if the stream ends early.
async function* events(response) {
  const cut = because("The answer was cut off: the connection closed.");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read().catch(cut);
    if (done) cut();
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
      if (!line.startsWith("data: ")) continue;
      const data = JSON.parse(line.slice("data: ".length));
      if (data.error) throw refused(data.error);
      yield { data };
    }
  }
}

function post(path, content, signal) {
  const headers = { "Content-Type": "application/json" };
  return call(path, { method: "POST", headers, body: JSON.stringify(content), signal });
}

// Streams an answer to `on.comment`, `on.progress`, `on.text` and `on.end` (finish reason). Returns
// the usage.
export async function answer(asked, signal, on) {
  const how = { stream: true, stream_options: { include_usage: true }, return_progress: true };
  const response = await post("v1/chat/completions", { ...asked, ...how }, signal);
  let usage = null;
  for await (const { comment, data } of events(response)) {
    const choice = data?.choices[0];
    if (comment) on.comment(comment);
    if (data?.prompt_progress) on.progress(data.prompt_progress);
    if (choice?.delta.content) on.text(choice.delta.content);
    if (choice?.finish_reason) on.end(choice.finish_reason);
    usage = data?.usage ?? usage;
  }
  return usage;
}

// Uploads a file; resolves to a document's `text` or an image's `url`.
export async function readByServer(file) {
  const body = await file.arrayBuffer().catch(because(`${file.name} cannot be read.`));
  const headers = { "Content-Type": file.type || "application/octet-stream" };
  const path = `page/file?name=${encodeURIComponent(file.name)}`;
  return (await call(path, { method: "POST", headers, body })).json();
}

// Resolves to the number of tokens in the prompt that a request would send.
export async function count(asked, signal) {
  const response = await post("v1/chat/completions/input_tokens", asked, signal);
  return (await response.json()).input_tokens;
}

// Resolves to the number of an answer's cached tokens that have not caught up. The number is 0 if a
// later prompt uses the answer's slot. `job` is from the answer's usage.
export async function tokensBehind(model, job) {
  const slots = await (await call(`slots?model=${encodeURIComponent(model)}`)).json();
  return slots.find((slot) => slot.job === job)?.n_behind ?? 0;
}

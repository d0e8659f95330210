// Requests to the server, with its key where it has one, and the events of a stream.

const KEY = "pop-local key";
const CUT = "The answer was cut off: the connection ended.";

let wantKey = null;

// Names what asks a person for the key: it gets whether one was wrong, and promises the next.
export function askKeyBy(ask) {
  wantKey = ask;
}

// Fetches. Throws an Error with the server's reason, or AbortError.
export async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      throw isAbort(error) ? error : new Error("The server does not answer.");
    });
    if (response.ok) return response;
    if (response.status !== 401) throw new Error(await reasonOf(response));
    sessionStorage.setItem(KEY, await wantKey(key !== null));
  }
}

async function reasonOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server refused: ${response.status}.`;
  }
}

const isAbort = (error) => error.name === "AbortError";

// Yields { comment } and { data }. Throws when the stream ends before its last word.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw isAbort(error) ? error : new Error(CUT);
    });
    if (done) throw new Error(CUT);
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const data = JSON.parse(line.slice("data: ".length));
      if (data.error) throw new Error(data.error.message);
      yield { data };
    }
  }
}

// Streams an answer: `on.comment`, `on.text` and `on.end` (finish reason), then its usage.
export async function answer(asked, signal, on) {
  const body = { ...asked, stream: true, stream_options: { include_usage: true } };
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  let usage = null;
  for await (const { comment, data } of events(response)) {
    if (comment) on.comment(comment);
    const choice = data?.choices[0];
    if (choice?.delta.content) on.text(choice.delta.content);
    if (choice?.finish_reason) on.end(choice.finish_reason);
    usage = data?.usage ?? usage;
  }
  return usage;
}

// Sends a file's bytes to the server's readers; resolves to a document's text, null of a picture.
export async function readByServer(file) {
  const body = await file.arrayBuffer().catch(() => {
    throw new Error(`${file.name} cannot be read.`);
  });
  const headers = { "Content-Type": file.type || "application/octet-stream" };
  const path = `page/file?name=${encodeURIComponent(file.name)}`;
  return (await (await call(path, { method: "POST", headers, body })).json()).text;
}

// The cached tokens that are still to be refilled.
export async function refillable() {
  const text = await (await call("metrics")).text();
  const found = text.matchAll(/^pop_refillable_tokens(?:\{.*\})? (\S+)$/gm);
  return [...found].reduce((sum, [, n]) => sum + Number(n), 0);
}

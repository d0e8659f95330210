"""Drive the chat page in a browser: ask questions, and feed answers to it."""

import base64
import json
from typing import Any

from support.paths import TESTS

SHOTS = TESTS / "page" / "build"
ANSWERED = "article.assistant[aria-busy=false] .actions"
# Replaces the server's streams by ones that a test feeds.
FED = """
const ask = window.fetch;
window.fetch = async (path, options) => {
  if (!path.endsWith("chat/completions")) return ask(path, options);
  (window.asked ??= []).push(JSON.parse(options.body));
  options.signal.onabort = () => control.error(options.signal.reason);
  return new Response(new ReadableStream({ start: (control) => (window.control = control) }));
};
window.feed = (text) => control.enqueue(new TextEncoder().encode(text));
"""
DROP = """([name, type, content]) => {
  const transfer = new DataTransfer();
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  transfer.items.add(new File([bytes], name, { type }));
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
}"""

# Stores a chat with the given messages.
STORE = """async (messages) => {
  const opening = indexedDB.open("pop-local", 1);
  await new Promise((resolve) => (opening.onsuccess = resolve));
  const chats = opening.result.transaction("chats", "readwrite").objectStore("chats");
  chats.put({ id: "zz", title: "Damaged", messages });
  await new Promise((resolve) => (chats.transaction.oncomplete = resolve));
}"""


def drop(page: Any, name: str, content: bytes, kind: str = "") -> None:
    page.evaluate(DROP, [name, kind, base64.b64encode(content).decode()])


def ask(page: Any, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")


def said(page: Any) -> str:
    text: str = page.locator("article.assistant").last.locator(".body").first.text_content()
    return text


def event(text: str = "", **more: Any) -> str:
    """Return an event of a stream."""
    choice = {"delta": {"content": text}, "finish_reason": None}
    return f"data: {json.dumps({'choices': [choice]} | more)}\n\n"


def progress(n_done: int, time_ms: int, total: int = 2048) -> str:
    """Return an event with the progress of reading a prompt without cached tokens."""
    read = {"total": total, "cache": 0, "processed": n_done, "time_ms": time_ms}
    return event(prompt_progress=read)


def usage(n_prompt: int = 20, n_answer: int = 10, **pop: Any) -> str:
    """Return the event with an answer's usage."""
    times = {"ttft_s": 2.0, "queued_s": 0.0, "prefill_s": 2.0, "decode_s": 1.0}
    figures = {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_answer,
        "prompt_tokens_details": {"cached_tokens": 0},
        "pop": {"n_pruned": 0, "n_skipped_exact": 0, "reading": "full", "job": "own"} | times | pop,
    }
    return f"data: {json.dumps({'choices': [], 'usage': figures})}\n\n"


def feed(page: Any, *pieces: str) -> None:
    page.wait_for_function("() => window.control")
    for piece in pieces:
        page.evaluate("(piece) => feed(piece)", piece)


def answer(page: Any, text: str, *more: str) -> None:
    """Feed a complete answer, with further events at its end."""
    feed(page, event(text), *more, "data: [DONE]\n\n")
    page.evaluate("control = null")
    page.wait_for_selector(ANSWERED)


def new_chat(page: Any, question: str, text: str) -> None:
    page.click("#chats :text('New chat')")
    page.wait_for_selector("#empty", state="visible")
    ask(page, question)
    answer(page, text)


def titles(page: Any) -> list[str]:
    texts: list[str] = page.locator("#list a").all_text_contents()
    return texts


def shot(page: Any, name: str) -> None:
    page.screenshot(path=SHOTS / f"{name}.png")

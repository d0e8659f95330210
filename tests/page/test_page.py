"""A chat in a browser: documents, streams, comparison, storage, and bad input."""

import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from support.browser import (
    ANSWERED,
    STORE,
    answer,
    ask,
    drop,
    event,
    feed,
    progress,
    said,
    shot,
    usage,
)
from support.converted import tiny
from support.paths import ROOT
from support.serving import served
from support.synthetic import TEMPLATE

pytestmark = pytest.mark.slow

STORY = ROOT / "pop_local" / "data" / "document.md"
QUESTION = "What rule was painted above the lamp-room door?"
BODY = "document.querySelector('.assistant .body')?.textContent"
LATE_MS = 120_000


def test_dropped_document_is_answered(page):
    shot(page, "empty")
    drop(page, "story.md", STORY.read_bytes())
    page.wait_for_selector("#files :text('characters')")
    ask(page, QUESTION)
    page.wait_for_selector("article .reading :text('Reading')")
    shot(page, "reading")
    page.wait_for_function(f"() => {BODY}")
    begun = said(page).strip()
    page.wait_for_selector(ANSWERED, timeout=LATE_MS)
    assert said(page).startswith(begun) and len(said(page)) > len(begun)
    figures = page.text_content(".assistant .figures")
    assert "First token after" in figures and "with fast reading" in figures
    page.wait_for_selector("#refilling", state="visible")
    shot(page, "answer")
    page.wait_for_selector("#refilling", state="hidden", timeout=LATE_MS)
    whole = said(page)
    page.reload()
    page.wait_for_selector(ANSWERED)
    assert said(page) == whole
    assert page.text_content("#list a") == QUESTION
    page.click("#theme")
    shot(page, "dark")
    page.set_viewport_size({"width": 390, "height": 800})
    shot(page, "phone")
    wide = "document.documentElement.scrollWidth > innerWidth"
    assert not page.evaluate(wide)
    page.click("#menu")
    shot(page, "phone-chats")
    page.click("#chats :text('New chat')")
    page.wait_for_selector("#empty", state="visible")
    assert not page.is_visible("#chats")


def test_compare_shows_both_readings(page):
    drop(page, "story.md", STORY.read_bytes())
    page.wait_for_selector("#files :text('characters')")
    page.fill("#question", QUESTION)
    page.click("#compare")
    page.wait_for_selector(".ratio", timeout=LATE_MS)
    full, pruned = (float(text.split()[0]) for text in page.locator(".time").all_text_contents())
    ratio = float(page.text_content(".ratio").split()[4])
    assert full > 0 and pruned > 0
    assert ratio == pytest.approx(full / pruned, abs=0.02)
    figures = page.locator(".sides .figures").all_text_contents()
    assert "fast reading" not in figures[0] and "with fast reading" in figures[1]
    assert "cached" not in "".join(figures)
    page.locator("#scroll").evaluate("(view) => (view.scrollTop = 0)")
    shot(page, "compare")


def test_compare_shows_times_and_stop_reasons(fed):
    fed.fill("#question", "Hi")
    fed.click("#compare")
    done = "data: [DONE]\n\n"
    feed(fed, event("Hello"), done)  # the warm-up
    fed.wait_for_function("() => window.asked.length === 2")
    assert "Starts after the other answer" in fed.text_content(".sides section:last-child")
    feed(fed, event("Once"))
    fed.wait_for_selector(".sides section:first-child .time:text(' s')")
    assert fed.locator(".time").last.text_content() == "…", "the second answer has not started"
    feed(fed, usage(is_repeating=True), done)
    fed.wait_for_selector(".sides section:first-child .time:text('2.00 s')")
    fed.wait_for_function("() => window.asked.length === 3")
    assert "Starts after" not in fed.text_content(".sides")
    feed(fed, event("upon"), usage(ttft_s=1.0, n_pruned=9), done)
    fed.wait_for_selector(".sides section:first-child .note:text('repeated itself')")
    fed.wait_for_selector(".ratio:text('2.00 times')")


def test_compare_shows_no_speedup_if_nothing_was_pruned(fed):
    fed.fill("#question", "Hi")
    fed.click("#compare")
    done = "data: [DONE]\n\n"
    feed(fed, event("Hello"), done)  # the warm-up
    for n_asked, ttft_s in ((2, 2.0), (3, 1.0)):
        fed.wait_for_function(f"() => window.asked.length === {n_asked}")
        feed(fed, event("Once"), usage(ttft_s=ttft_s, reading="short"), done)
    fed.wait_for_selector(".sides section:last-child .time:text('1.00 s')")
    fed.wait_for_selector(".sides section:last-child .figures:text('too short for fast reading')")
    assert fed.locator(".ratio").count() == 0


def test_escape_stops_and_keeps_the_text(page, server):
    ask(page, "Count from 1 to 500.")
    page.wait_for_function(f"() => {BODY}.length > 9")
    page.keyboard.press("Escape")
    page.wait_for_selector(".note:text('This answer was stopped.')")
    assert len(said(page)) > 9
    while not server.metrics().get('pop_requests_total{path="/v1/chat/completions",status="499"}'):
        time.sleep(0.1)
    page.reload()
    page.wait_for_selector(".note:text('This answer was stopped.')")
    assert len(said(page)) > 9


def test_html_in_answer_stays_text(fed):
    ask(fed, "<b>Hello</b>")
    answer(
        fed,
        "<script>window.is_hacked = 1</script> <img src=x onerror='window.is_hacked = 1'>\n\n"
        "![pixel](http://evil.example/a.png) [run](javascript:is_hacked=1) [go](http://a.example)"
        "\n\n```html\n<script>alert(1)</script>\n```\n\n| a | b |\n|---|---|\n| 1 | **2** |\n",
    )
    assert fed.text_content(".user .body") == "<b>Hello</b>"
    assert "<script>window.is_hacked = 1</script>" in said(fed)
    assert "![pixel](http://evil.example/a.png)" in said(fed)
    assert fed.locator(".body :is(script, img)").count() == 0
    assert fed.locator(".body [onerror], .body [href^=javascript]").count() == 0
    assert fed.get_attribute(".body a[href]", "rel") == "noopener noreferrer"
    assert fed.text_content(".body td strong") == "2"
    assert fed.evaluate("window.is_hacked") is None
    fed.click(".code button")
    fed.wait_for_selector(".code :text('Copied')")
    assert fed.evaluate("navigator.clipboard.readText()") == "<script>alert(1)</script>\n"
    shot(fed, "markdown")


DEEP = {
    "quotes": "> " * 1_900 + "deep",
    "lists": "\n".join("  " * level + "- deep" for level in range(840)),
    "emphasis": "*a **b " * 2_000 + "deep" + "** *" * 2_000,
    "links": "[" * 5_000 + "deep" + "](http://a.example)" * 5_000,
}


@pytest.mark.parametrize("kind", DEEP)
def test_deeply_nested_answer_ends_and_is_stored(fed, kind):
    ask(fed, "First")
    answer(fed, "Short.")
    fed.click("#chats :text('New chat')")
    ask(fed, "Deep")
    answer(fed, DEEP[kind])
    assert "deep" in said(fed)
    depth = "(body) => Math.max(...[...body.querySelectorAll('*')].map((one) => {"
    depth += " let n = 0; for (; one !== body; one = one.parentElement) n += 1; return n; }))"
    assert fed.locator("article.assistant .body").evaluate(depth) < 100
    fed.reload()
    fed.wait_for_selector(ANSWERED)
    assert "deep" in said(fed)
    assert fed.locator("#list a").all_text_contents() == ["Deep", "First"]


@pytest.mark.parametrize("messages", [None, [None], [{"role": "assistant", "usage": {}}]])
def test_damaged_chat_hides_no_other_chat(fed, messages):
    ask(fed, "First")
    answer(fed, "Short.")
    fed.evaluate(STORE, messages)
    fed.goto("/#zz")
    fed.reload()
    fed.wait_for_selector("#notice:text('damaged')")
    assert fed.locator("#list a").all_text_contents() == ["Damaged", "First"]
    fed.click("#list a:text('First')")
    fed.wait_for_selector(ANSWERED)
    assert said(fed).strip() == "Short."


def test_streamed_markdown_and_progress_bar(fed):
    ask(fed, "Hello")
    feed(fed, ": queued 2\n\n")
    fed.wait_for_selector(".reading :text('Position 2 in the queue')")
    feed(fed, progress(0, 0), progress(512, 2000))
    fed.wait_for_selector(".assistant .reading :text('Reading 2,048 tokens')")
    assert fed.locator(".reading progress").evaluate("(bar) => bar.position") == 0.25
    shot(fed, "bar")
    whole = event("# A title\n\n**bo")
    feed(fed, whole[:9], whole[9:])  # cut within an event
    fed.wait_for_selector(".body h1:text('A title')")
    assert not fed.is_visible(".reading")
    assert fed.get_attribute("article.assistant", "aria-busy") == "true"
    answer(fed, "ld**")
    assert fed.text_content(".body strong") == "bold"


def test_question_can_be_edited_and_retried(fed):
    ask(fed, "One")
    answer(fed, "1")
    ask(fed, "Two")
    answer(fed, "2")
    fed.click(".user >> nth=0 >> text=Edit")
    assert fed.input_value("#question") == "One"
    fed.keyboard.press("Escape")
    assert fed.input_value("#question") == "" and fed.locator(".user").count() == 2
    fed.click(".user >> nth=0 >> text=Edit")
    ask(fed, "Three")
    answer(fed, "3")
    assert fed.locator("article .body").all_text_contents() == ["Three", "3\n"]
    fed.click("text=Try again")
    answer(fed, "4")
    assert fed.locator("article .body").all_text_contents() == ["Three", "4\n"]
    messages = [[one["role"] for one in body["messages"]] for body in fed.evaluate("asked")]
    assert [len(roles) for roles in messages] == [1, 3, 1, 1]
    fed.click("#pruning")
    ask(fed, "Five")
    answer(fed, "5")
    assert [body["pop"] for body in fed.evaluate("asked")][-2:] == [True, False]
    fed.click(".assistant >> nth=0 >> text=Copy")
    fed.wait_for_selector("text=Copied")
    assert fed.evaluate("navigator.clipboard.readText()") == "4"


def test_keyboard_reaches_every_control(fed):
    fed.keyboard.type("a")
    fed.keyboard.press("Shift+Enter")
    fed.keyboard.type("b")
    fed.keyboard.press("Enter")
    answer(fed, "c")
    assert fed.text_content(".user .body") == "a\nb"
    fed.focus("#question")
    reached = []
    for _ in range(30):
        fed.keyboard.press("Tab")
        reached.append(
            fed.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent")
        )
    names = ["Files", "Compare", "Send", "New chat", "Search chats", "Export", "Import", "Model"]
    names += ["Rename a\nb", "Download a\nb as Markdown", "Delete a\nb", "Settings"]
    names += ["Switch between dark and light", "Copy this message", "Edit", "Try again"]
    assert set(names) <= set(reached)


def test_concurrent_tabs_lose_no_message(fed, context):
    ask(fed, "One")
    answer(fed, "1")
    other = context.new_page()
    other.goto(fed.url)
    other.wait_for_selector(ANSWERED)
    ask(fed, "Two")
    other.wait_for_selector(".user:has-text('Two')")  # by a broadcast
    answer(fed, "2")
    other.wait_for_selector(".assistant:has-text('2')")
    ask(other, "Three")
    ask(fed, "Four")
    answer(fed, "4")
    answer(other, "3")
    fed.wait_for_selector("#list a:text('(copy)')")
    assert fed.url != other.url
    for page, last in ((fed, "Four4"), (other, "Three3")):
        before = page.locator(".body").all_text_contents()
        page.reload()
        page.wait_for_selector(ANSWERED)
        assert page.locator(".body").all_text_contents() == before
        words = "".join(before).replace("\n", "")
        assert words.startswith("One1Two2") and words.endswith(last)


def test_truncated_answer_is_kept(fed):
    ask(fed, "One")
    feed(fed, event("Half an an"))
    fed.evaluate("control.close()")
    fed.wait_for_selector(".note:text('cut off')")
    assert said(fed) == "Half an an\n"
    fed.reload()
    fed.wait_for_selector(".note:text('cut off')")
    assert said(fed) == "Half an an\n"


def test_reload_keeps_the_question(fed):
    ask(fed, "One")
    feed(fed, event("Half"))
    fed.wait_for_selector(".body :text('Half')")
    fed.wait_for_function("() => location.hash")
    fed.reload()
    fed.wait_for_selector(".note:text('This answer is unfinished.')")
    assert fed.text_content(".user .body") == "One"


def test_oversized_document_is_refused_before_reading(page, tmp_path):
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.truncate(500_000_000)
    page.fill("#question", "kept")
    page.set_input_files("#file", path)
    page.wait_for_selector("#notice:text('huge.txt is too large: the limit is 100 MB.')")
    assert page.input_value("#question") == "kept"
    assert page.locator("#files li").count() == 0
    shot(page, "refused")


def _bomb() -> bytes:
    """Return a PNG whose header declares 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 60_000))
        + chunk(b"IEND", b"")
    )


def test_image_is_shown_and_bomb_is_refused(fed):
    drop(fed, "bomb.png", _bomb(), "image/png")
    fed.wait_for_selector("#notice:text('bomb.png is an image, but the model cannot read images.')")
    fed.route("**/v1/models", _with_vision)
    fed.reload()
    fed.wait_for_selector("#send:enabled")
    drop(fed, "bomb.png", _bomb(), "image/png")
    fed.wait_for_selector("#notice:text('bomb.png has more than 50 million pixels')")
    drop(fed, "broken.pdf", b"%PDF-1.7 nothing")
    fed.wait_for_selector("#notice:text('broken.pdf cannot be read as PDF')")
    assert fed.locator("main img:not(#empty img)").count() == 0
    content = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(content, "PNG")
    drop(fed, "teal.png", content.getvalue(), "image/png")
    fed.wait_for_selector("#files img")
    ask(fed, "Which colour?")
    answer(fed, "Teal.")
    assert fed.locator(".user img").evaluate("(image) => image.naturalWidth") == 40
    ((message,),) = [body["messages"] for body in fed.evaluate("asked")]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]


def _with_vision(route: Any) -> None:
    response = route.fetch()
    body = response.json()
    body["data"][0]["pop"]["images"] = True
    route.fulfill(response=response, json=body)


def test_page_requests_the_api_key(browser, tmp_path):
    model = tiny(tmp_path, chat_template=TEMPLATE)
    with served(model, "--api-key", "secret") as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.root)
        for key in ("wrong", "secret"):
            page.wait_for_selector("#entry[open]")
            page.fill("#key", key)
            page.press("#key", "Enter")
        page.wait_for_selector("#send:enabled")
        page.reload()
        page.wait_for_selector("#send:enabled")
        page.set_input_files("#file", Path(STORY))
        page.wait_for_selector("#files :text('characters')")
        context.close()

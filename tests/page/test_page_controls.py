"""The page's settings, meters, hints, examples, and small screens."""

import re
from typing import Any

import pytest

from support.browser import (
    ANSWERED,
    answer,
    ask,
    drop,
    event,
    feed,
    new_chat,
    progress,
    said,
    shot,
    usage,
)

pytestmark = pytest.mark.slow

SIZES = [(360, 740), (900, 700), (1440, 900)]
# Controls without a name that a screen reader could read.
UNNAMED = """() => [...document.querySelectorAll("button, a, input, select, textarea, progress")]
  .filter((one) => !(one.ariaLabel || one.labels?.length || one.textContent.trim()
    || one.ariaHidden === "true"))
  .map((one) => one.outerHTML)"""
OUTSIDE = """() => [...document.querySelectorAll("main :is(button, select, textarea, p, li)")]
  .filter((one) => one.checkVisibility() && !one.closest(".unseen"))
  .filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
  .map((one) => one.outerHTML)"""


def set_up(page: Any, **settings: str) -> None:
    page.click("#settings")
    for name, value in settings.items():
        page.fill(f"#{name}", value)
    page.click("#adjust :text('Save')")


def asked(page: Any) -> dict[str, Any]:
    request: dict[str, Any] = page.evaluate("asked.at(-1)")
    return request


def test_settings_are_sent_and_saved_with_the_chat(fed):
    ask(fed, "One")
    answer(fed, "1")
    assert "temperature" not in asked(fed) and "max_tokens" not in asked(fed)
    set_up(fed, system="Be brief.", temperature="0.2", maxTokens="50")
    ask(fed, "Two")
    answer(fed, "2")
    sent = asked(fed)
    assert (sent["temperature"], sent["max_tokens"]) == (0.2, 50)
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [one["role"] for one in sent["messages"]] == ["system", "user", "assistant", "user"]
    first = fed.url
    new_chat(fed, "Three", "3")
    assert asked(fed)["messages"][0]["role"] == "system"  # new chats start with these settings
    fed.click("#settings")
    fed.click("#reset")
    fed.click("#adjust :text('Save')")
    ask(fed, "Four")
    answer(fed, "4")
    assert asked(fed).keys() & {"temperature", "max_tokens"} == set()
    assert asked(fed)["messages"][0]["role"] == "user"
    fed.goto(first)
    fed.reload()
    fed.wait_for_selector(ANSWERED)
    fed.click("#settings")
    values = [fed.input_value(f"#{name}") for name in ("system", "temperature", "maxTokens")]
    assert values == ["Be brief.", "0.2", "50"]
    shot(fed, "settings")


def test_settings_reject_invalid_values_and_close_on_escape(fed):
    fed.click("#settings")
    fed.wait_for_selector("#temperature[placeholder='Default: 0.8']")
    fed.fill("#temperature", "11")
    fed.click("#adjust :text('Save')")
    assert fed.is_visible("#adjust")
    fed.fill("#temperature", "1")
    fed.fill("#maxTokens", "0")
    fed.click("#adjust :text('Save')")
    assert fed.is_visible("#adjust")
    fed.keyboard.press("Escape")
    assert not fed.is_visible("#adjust")
    assert fed.evaluate("document.activeElement.id") == "settings"
    ask(fed, "One")
    answer(fed, "1")
    assert asked(fed).keys() & {"temperature", "max_tokens"} == set()


def test_escape_in_a_dialog_does_not_stop_the_answer(fed):
    ask(fed, "One")
    feed(fed, event("Half"))
    fed.wait_for_selector(".body :text('Half')")
    fed.click("#settings")
    fed.keyboard.press("Escape")
    assert not fed.is_visible("#adjust") and fed.is_visible("#stop")
    answer(fed, " done")
    assert said(fed) == "Half done\n"


def test_settings_limit_a_real_answer(page):
    set_up(page, temperature="0", maxTokens="5")
    ask(page, "Count from 1 to 500.")
    page.wait_for_selector(".note:text('length limit')")


def test_context_meter_shows_used_tokens(fed, server):
    assert fed.text_content("#context").strip() == "Context: 0 of 4,096 tokens"
    ask(fed, "One")
    answer(fed, "1", usage(3800, 90))
    assert "3,890 of 4,096 tokens" in fed.text_content("#context")
    assert fed.locator("#context").get_attribute("class") == "quiet full"
    fed.click("#chats :text('New chat')")
    fed.wait_for_selector("#context :text('0 of 4,096')")
    document = "A lamp. " * 300
    drop(fed, "lamps.txt", document.encode())
    said = {"role": "user", "content": document}
    n = server.post("chat/completions/input_tokens", messages=[said]).json()["input_tokens"]
    fed.wait_for_selector(f"#context :text('{n:,} of 4,096 tokens')")
    drop(fed, "long.txt", b"A lamp. " * 1600)
    fed.wait_for_selector("#notice:text('The context is too small: the prompt has')")
    assert re.search(r"--ctx \d+", fed.text_content("#notice"))
    fed.click("[aria-label='Remove long.txt']")
    fed.wait_for_selector(f"#context :text('{n:,} of 4,096 tokens')")
    assert not fed.is_visible("#notice")


def test_reading_estimate_precedes_the_answer(fed):
    ask(fed, "One")
    feed(fed, progress(0, 0))
    label = fed.locator("article.assistant .reading span")
    fed.wait_for_selector(".reading :text('Reading 2,048 tokens')")
    assert "left" not in label.text_content()  # the speed is unknown
    feed(fed, progress(512, 4000))
    fed.wait_for_selector(".reading :text('about 12 s left')")
    shot(fed, "estimate")
    fed.wait_for_selector(".reading :text('about 11 s left')")
    answer(fed, "1", usage(2048, prefill_s=16.0))
    assert fed.locator(".reading").count() == 0
    ask(fed, "Two")
    feed(fed, progress(0, 0, total=12800))
    fed.wait_for_selector(".reading :text('Reading 12,800 tokens, about 2 min left')")
    assert "about 2 min left" in fed.text_content("#status")
    answer(fed, "2")


def test_catching_up_counts_only_tokens_of_the_chat(fed):
    behind = {"own": 900, "other": 5000}

    def slots(route: Any) -> None:
        assert "model=" in route.request.url
        route.fulfill(json=[{"job": job, "n_behind": n} for job, n in behind.items()])

    fed.route("**/slots?*", slots)
    ask(fed, "One")
    answer(fed, "1", usage())
    fed.wait_for_selector("#refilling :text('Catching up: 0 of 900 tokens')")
    behind["own"] = 300
    fed.wait_for_selector("#refilling :text('Catching up: 600 of 900 tokens')")
    del behind["own"]  # another prompt took the slot
    fed.wait_for_selector("#refilling", state="hidden")


def test_hints_appear_on_hover_and_focus(fed):
    fed.hover("#compare")
    fed.wait_for_selector("#hint:text('Answers twice')")
    shot(fed, "hint")
    fed.keyboard.press("Escape")
    assert not fed.is_visible("#hint")
    ask(fed, "One")
    fed.hover("#stop")
    fed.wait_for_selector("#hint:text('Stops the answer')")
    fed.click("#stop")
    fed.wait_for_selector("#send:visible")  # appears under the pointer
    fed.wait_for_timeout(800)
    assert not fed.is_visible("#hint")
    fed.hover("#question")
    fed.focus("#question")
    fed.keyboard.press("Tab")
    fed.wait_for_selector("#hint:text('Attaches documents')")
    assert fed.get_attribute("#attach", "aria-describedby") == "hint"
    fed.keyboard.press("Shift+Tab")
    assert not fed.is_visible("#hint")
    assert fed.get_attribute("#attach", "aria-describedby") is None


def test_examples_fill_the_question_field(page):
    page.click("text=Ask about a sample story")
    page.wait_for_selector("#files :text('lighthouse.md')")
    assert page.input_value("#question") == "What rule was painted above the lamp-room door?"
    page.click("#settings")
    assert page.input_value("#temperature") == "0"
    page.keyboard.press("Escape")
    with page.expect_file_chooser():
        page.click("text=Summarize a document")
    assert page.input_value("#question").startswith("Summarize")
    assert page.evaluate("document.activeElement.id") == "question"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page_fits_each_size_and_theme(fed, theme):
    fed.emulate_media(color_scheme=theme)
    text = "# A title\n\nWords and `code`.\n\n```\n" + "x" * 200 + "\n```\n"
    for width, height in SIZES:
        fed.set_viewport_size({"width": width, "height": height})
        fed.goto("/")
        fed.reload()
        fed.wait_for_selector("#send:enabled")
        shot(fed, f"empty-{theme}-{width}")
        assert fed.evaluate(OUTSIDE) == []
        ask(fed, "A long word: " + "w" * 300)
        answer(fed, text, usage(3000))
        shot(fed, f"answer-{theme}-{width}")
        assert fed.evaluate(OUTSIDE) == []
        assert not fed.evaluate("document.documentElement.scrollWidth > innerWidth")
        send, compare = (fed.locator(name).bounding_box() for name in ("#send", "#compare"))
        assert send["y"] == compare["y"]  # in one row
        fed.click("#settings")
        box = fed.locator("#adjust").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        assert box["y"] >= 0 and box["y"] + box["height"] <= height
        fed.keyboard.press("Escape")
        assert fed.evaluate(UNNAMED) == []


def test_phone_shows_chat_list_on_request(fed):
    fed.set_viewport_size({"width": 360, "height": 740})
    ask(fed, "One")
    answer(fed, "1")
    assert not fed.is_visible("#chats")
    fed.click("#menu")
    fed.click("[aria-label='Rename One']")
    fed.keyboard.press("Escape")  # only ends the renaming
    fed.wait_for_selector("#list a:text('One')")
    shot(fed, "phone-chats")
    fed.keyboard.press("Escape")
    assert not fed.is_visible("#chats")
    assert fed.evaluate("document.activeElement.id") == "menu"

"""The list of chats: search, rename, delete, export and import."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.browser import (
    ANSWERED,
    STORE,
    answer,
    ask,
    drop,
    event,
    feed,
    new_chat,
    said,
    titles,
    usage,
)

pytestmark = pytest.mark.slow

LISTED = """(titles) => titles.join() ===
  [...document.querySelectorAll("#list a")].map((one) => one.textContent).join()"""
FILLED = """async () => {
  const opening = indexedDB.open("pop-local", 1);
  await new Promise((resolve) => (opening.onsuccess = resolve));
  const chats = opening.result.transaction("chats").objectStore("chats").getAll();
  await new Promise((resolve) => (chats.onsuccess = resolve));
  return chats.result;
}"""


def stored(page: Any) -> list[dict[str, Any]]:
    chats: list[dict[str, Any]] = page.evaluate(FILLED)
    return chats


@pytest.fixture
def three(fed: Any) -> Any:
    """A page with three chats, the latest of which is shown."""
    drop(fed, "plans.txt", b"Nothing to find.")
    fed.wait_for_selector("#files :text('characters')")
    ask(fed, "Lamps?")
    answer(fed, "They are **green**.", usage())
    new_chat(fed, "Boats?", "Two of them.")
    new_chat(fed, "Birds?", "Three gulls.")
    assert titles(fed) == ["Birds?", "Boats?", "Lamps?"]
    return fed


def exported(page: Any, path: Path) -> dict[str, Any]:
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(path)
    assert download.value.suggested_filename.startswith("pop-local-chats-20")
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def imported(page: Any, path: Path) -> str:
    """Import a file, and return the sentence about the result."""
    page.set_input_files("#chosen", path)
    page.wait_for_selector("#transferred:not(:empty)")
    text: str = page.text_content("#transferred")
    return text


def chat_of(chat_id: str, **changed: Any) -> dict[str, Any]:
    messages = [{"role": "user", "text": "One"}, {"role": "assistant", "text": "1"}]
    return {"id": chat_id, "title": "A", "version": "v", "messages": messages} | changed


def file_of(path: Path, *chats: Any, **changed: Any) -> Path:
    content = {"format": "pop-local chats", "version": 1, "chats": list(chats)}
    path.write_text(json.dumps(content | changed))
    return path


def test_search_finds_titles_texts_and_file_names(three):
    for words, found in (
        ("boats", ["Boats?"]),
        ("GREEN", ["Lamps?"]),
        ("plans.txt", ["Lamps?"]),
        ("ree", ["Birds?", "Lamps?"]),
    ):
        three.fill("#search", words)
        three.wait_for_function(LISTED, arg=found)
    three.fill("#search", "nothing to find")  # is only in a document
    three.wait_for_selector("#list :text('No chat contains “nothing to find”.')")
    three.press("#search", "Escape")
    three.wait_for_selector("#list a:text('Boats?')")
    assert three.input_value("#search") == "" and len(titles(three)) == 3


def test_rename_is_saved_or_cancelled(three):
    row = three.locator("#list li", has_text="Boats?")
    row.hover()
    row.locator("[aria-label='Rename Boats?']").click()
    three.keyboard.type("No")
    three.keyboard.press("Escape")
    three.wait_for_function(LISTED, arg=["Birds?", "Boats?", "Lamps?"])
    for old, new in (("Boats?", "The boats"), ("Birds?", "The gulls")):
        three.locator("#list li", has_text=old).hover()
        three.click(f"[aria-label='Rename {old}']")
        three.keyboard.type(new)
        three.keyboard.press("Enter")
        three.wait_for_selector(f"#list a:text('{new}')")
        assert three.evaluate("document.activeElement.textContent") == new
    assert three.title() == "The gulls"
    three.reload()
    three.wait_for_selector(ANSWERED)
    assert titles(three) == ["The gulls", "The boats", "Lamps?"]
    assert three.title() == "The gulls"
    assert said(three) == "Three gulls.\n"
    assert len(stored(three)) == 3


def test_rename_during_an_answer_keeps_both(fed):
    ask(fed, "One")
    feed(fed, event("Half "))
    fed.wait_for_selector("#list a:text('One')")
    fed.hover("#list li")
    fed.click("[aria-label='Rename One']")
    fed.keyboard.type("Two")
    fed.wait_for_timeout(2500)  # the answer is saved every two seconds
    fed.keyboard.press("Enter")
    fed.wait_for_selector("#list a:text('Two')")
    answer(fed, "and half")
    fed.reload()
    fed.wait_for_selector(ANSWERED)
    assert titles(fed) == ["Two"]
    assert said(fed) == "Half and half\n"
    assert len(stored(fed)) == 1


def test_deleting_a_chat_does_not_wait_for_another_answer(three):
    ask(three, "More?")
    feed(three, event("Some"))
    three.wait_for_selector(".body :text('Some')")
    three.once("dialog", lambda dialog: dialog.accept())
    three.locator("#list li", has_text="Boats?").hover()
    three.click("[aria-label='Delete Boats?']")
    three.wait_for_function("() => document.querySelectorAll('#list a').length === 2")
    answer(three, " gulls")
    assert said(three) == "Some gulls\n"


def test_exported_chats_can_be_imported_elsewhere(three, browser, server, tmp_path):
    path = tmp_path / "chats.json"
    content = exported(three, path)
    assert three.text_content("#transferred") == "Exported 3 chats."
    assert (content["format"], content["version"]) == ("pop-local chats", 1)
    before = stored(three)
    assert sorted(content["chats"], key=lambda chat: chat["id"]) == before
    assert imported(three, path) == "Imported 0 chats. 3 were already here."
    assert stored(three) == before
    other = browser.new_context(base_url=server.root)
    page = other.new_page()
    page.goto("/")
    page.wait_for_selector("#send:enabled")
    assert imported(page, path) == "Imported 3 chats."
    assert titles(page) == ["Birds?", "Boats?", "Lamps?"]
    page.click("#list a:text('Lamps?')")
    page.wait_for_selector(ANSWERED)
    assert said(page) == "They are green.\n"
    assert "plans.txt" in page.text_content(".user .file")
    assert stored(page) == before
    other.close()


def test_import_replaces_no_chat(three, tmp_path):
    path = tmp_path / "chats.json"
    exported(three, path)
    ask(three, "More?")
    answer(three, "Four gulls.")
    before = stored(three)
    assert imported(three, path) == "Imported 1 chat. 2 were already here."
    three.wait_for_selector("#list a:text('Birds? (imported)')")
    after = stored(three)
    assert len(after) == 4
    assert [chat for chat in after if chat in before] == before
    assert imported(three, path) == "Imported 0 chats. 3 were already here."
    (added,) = [chat for chat in after if chat not in before]
    assert [message["text"] for message in added["messages"]] == ["Birds?", "Three gulls."]


FOREIGN = "is not a file of exported chats, or it is cut off."
DAMAGED = "is damaged at chat 2, so no chat was imported."
BAD_CHATS: dict[str, dict[str, Any]] = {
    "id": {"id": "../a"},
    "title": {"title": None},
    "empty-title": {"title": ""},
    "version": {"version": 1},
    "messages": {"messages": "none"},
    "message": {"messages": [None]},
    "role": {"messages": [{"role": "system", "text": "a"}]},
    "text": {"messages": [{"role": "user", "text": 1}]},
    "usage": {"messages": [{"role": "assistant", "text": "a", "usage": {}}]},
    "sides": {"messages": [{"role": "assistant", "text": "a", "sides": [{}, {}]}]},
    "file": {"messages": [{"role": "user", "text": "a", "files": [{"name": "a"}]}]},
    "url": {
        "messages": [
            {"role": "user", "text": "a", "files": [{"name": "a", "url": "http://a.example/b"}]}
        ]
    },
    "system": {"settings": {"system": 1}},
    "temperature": {"settings": {"temperature": 11}},
    "length": {"settings": {"maxTokens": "a"}},
}


def test_files_of_other_programs_are_refused(fed, tmp_path):
    ask(fed, "One")
    answer(fed, "1")
    before = stored(fed)
    whole = json.dumps({"format": "pop-local chats", "version": 1, "chats": [chat_of("a1")]})
    contents = (b"", b"\xff\xfe\x00", b"[]", b"null", b'{"chats": []}', whole[:-9].encode())
    for number, content in enumerate(contents):
        path = tmp_path / f"notes{number}.json"
        path.write_bytes(content)
        assert imported(fed, path) == f"{path.name} {FOREIGN}"
    newer = file_of(tmp_path / "newer.json", version=2)
    assert imported(fed, newer).startswith("newer.json comes from a newer version of pop-local")
    assert imported(fed, file_of(tmp_path / "none.json", chats=None)).startswith(
        "none.json is damaged"
    )
    assert stored(fed) == before


def test_damaged_files_are_refused_as_a_whole(fed, tmp_path):
    ask(fed, "One")
    answer(fed, "1")
    before = stored(fed)
    for kind, changed in BAD_CHATS.items():
        path = file_of(tmp_path / f"{kind}.json", chat_of("a1"), chat_of("a2", **changed))
        assert imported(fed, path) == f"{kind}.json {DAMAGED}"
    assert stored(fed) == before
    good = file_of(tmp_path / "good.json", chat_of("a1"), chat_of("a1", version="w"))
    assert imported(fed, good) == "Imported 2 chats."
    assert titles(fed).count("A (imported)") == 1 and len(titles(fed)) == 3


def test_failing_storage_adds_no_chat(fed, tmp_path):
    ask(fed, "One")
    answer(fed, "1")
    before = stored(fed)
    fed.evaluate("""() => {
      const add = IDBObjectStore.prototype.add;
      IDBObjectStore.prototype.add = function (chat) {
        if (chat.id === "a2") throw new DOMException("the disk is full", "QuotaExceededError");
        return add.call(this, chat);
      };
    }""")
    path = file_of(tmp_path / "good.json", chat_of("a1"), chat_of("a2"))
    assert imported(fed, path) == "No chat was imported: the disk is full."
    assert stored(fed) == before


def test_chat_is_downloaded_as_markdown(three):
    three.locator("#list li", has_text="Lamps?").hover()
    with three.expect_download() as download:
        three.click("[aria-label='Download Lamps? as Markdown']")
    assert download.value.suggested_filename == "Lamps.md"
    assert download.value.path().read_text("utf-8") == (
        "# Lamps?\n\n## Question\n\n*Attached: plans.txt (16 characters)*\n\nLamps?\n\n"
        "## Answer\n\nThey are **green**.\n"
    )


def test_export_leaves_out_damaged_chats(fed, tmp_path):
    ask(fed, "One")
    answer(fed, "1")
    fed.evaluate(STORE, [None])
    path = tmp_path / "chats.json"
    content = exported(fed, path)
    fed.wait_for_selector("#transferred:text('Exported 1 chat. 1 damaged chat left out.')")
    assert [chat["title"] for chat in content["chats"]] == ["One"]
    assert imported(fed, path) == "Imported 0 chats. 1 was already here."

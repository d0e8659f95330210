"""Take the documents' screenshots of the page. Not a test.

    pop-local serve smollm2 &
    python tests/bench/record_screenshot.py http://127.0.0.1:8080 docs/images

writes compare.png, page.png (reading a document) and page-phone.png (dark). docs/server.md names
the two commands that install Chromium and Playwright.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

# Both readings of the document on a slow machine, in milliseconds.
TIMEOUT_MS = 600_000
ANSWERED = "article.assistant[aria-busy=false] .actions"
PHONE = {"width": 360, "height": 640}


def ask_about_example(page: Any, button: str) -> None:
    page.click("#chats :text('New chat')")
    page.click("#examples :text('sample story')")
    page.wait_for_selector("#files :text('characters')")
    page.click(button)
    page.mouse.move(550, 400)  # no hint covers the page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="the server's address")
    parser.add_argument("folder", type=Path, help="the folder for the PNG files")
    given = parser.parse_args()
    with sync_playwright() as driver:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 640}, color_scheme="light")
        page.goto(given.url)
        page.wait_for_selector("#send:enabled")
        ask_about_example(page, "#send")
        page.wait_for_function("() => document.querySelector('.reading progress')?.position > 0.4")
        page.screenshot(path=given.folder / "page.png")
        page.wait_for_selector(ANSWERED, timeout=TIMEOUT_MS)
        ask_about_example(page, "#compare")
        page.wait_for_selector(".ratio", timeout=TIMEOUT_MS)
        page.locator("#scroll").evaluate("(view) => (view.scrollTop = 0)")
        page.screenshot(path=given.folder / "compare.png")
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size(PHONE)
        page.click("#menu")
        page.click("#chats li:last-child a")
        page.wait_for_selector(ANSWERED)
        page.screenshot(path=given.folder / "page-phone.png")
        browser.close()


if __name__ == "__main__":
    main()

"""Take the documents' screenshot of the page's Compare. Not a test.

    pop-local serve smollm2 &
    python tests/bench/record_screenshot.py http://127.0.0.1:8080 docs/images/compare.png

docs/server.md names the two commands that install Chromium and Playwright.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

STORY = Path(__file__).resolve().parents[2] / "pop_local" / "data" / "document.md"
QUESTION = "What rule was painted above the lamp-room door?"
# Both readings of the document on a slow machine, in milliseconds.
TIMEOUT_MS = 600_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="the server's address")
    parser.add_argument("image", type=Path, help="the PNG file to write")
    given = parser.parse_args()
    with sync_playwright() as driver:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 640})
        page.goto(given.url)
        page.set_input_files("input[type=file]", str(STORY))
        page.wait_for_selector("#files :text('characters')")
        page.fill("#question", QUESTION)
        page.click("#compare")
        page.wait_for_selector(".ratio", timeout=TIMEOUT_MS)
        page.locator("#scroll").evaluate("(view) => (view.scrollTop = 0)")
        page.screenshot(path=given.image)
        browser.close()


if __name__ == "__main__":
    main()

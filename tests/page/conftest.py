"""The page in Debian's Chromium, driven by Playwright; skipped if either is missing."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.browser import FED, SHOTS
from support.serving import Served, served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


# Module scope: while Playwright runs, no other test of the process can run an event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    SHOTS.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(browser: Any, smollm2: Path) -> Iterator[Served]:
    with served(smollm2, "--ctx", 4096) as server:
        yield server


@pytest.fixture
def context(browser: Any, server: Served) -> Iterator[Any]:
    """A browser profile that fails the test on errors, foreign requests and policy violations."""
    events: list[str] = []

    def watch(page: Any) -> None:
        page.on("request", lambda event: events.append(event.url))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.on(
            "console", lambda event: events.append(event.text) if event.type == "error" else None
        )

    context = browser.new_context(viewport={"width": 1200, "height": 800}, base_url=server.root)
    context.on("page", watch)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield context
    context.close()
    own = (server.root, "data:", "Failed to load resource: the server responded")
    assert [event for event in events if not event.startswith(own)] == []


@pytest.fixture
def page(context: Any) -> Any:
    page = context.new_page()
    page.goto("/")
    page.wait_for_selector("#send:enabled")
    return page


@pytest.fixture
def fed(context: Any) -> Any:
    """A page whose answers the test feeds, as for all further pages of this profile."""
    context.add_init_script(FED)
    page = context.new_page()
    page.goto("/")
    page.wait_for_selector("#send:enabled")
    return page

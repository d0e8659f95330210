"""Check that CHANGELOG.md has the form of Keep a Changelog."""

import re
from pathlib import Path

from pop_local import __version__

ROOT = Path(__file__).parents[3]
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
RELEASE = re.compile(r"\[(?:Unreleased|(\d+)\.(\d+)\.(\d+))\](?: - \d{4}-\d\d-\d\d)?")


def headings(text: str, level: int) -> list[str]:
    return re.findall(rf"^{'#' * level} (.+)$", text, re.MULTILINE)


def problems(text: str, version: str) -> list[str]:
    """Return the changelog's deviations from Keep a Changelog, for a package of this version."""
    releases = [RELEASE.fullmatch(heading) for heading in headings(text, 2)]
    found = [
        f"no release: {heading}" for heading in headings(text, 2) if not RELEASE.fullmatch(heading)
    ]
    numbers = [tuple(map(int, each.groups())) for each in releases if each and each[1]]
    found += (
        ["the newest release must come first"] if numbers != sorted(numbers, reverse=True) else []
    )
    found += [f"unknown kind: {kind}" for kind in headings(text, 3) if kind not in KINDS]
    is_listed = f"## [{version}] - " in text or f"release, {version}" in text.partition("\n## [")[2]
    return found if is_listed else [*found, f"version {version} is missing"]


def test_the_changelog_keeps_its_form():
    assert problems((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), __version__) == []


def test_deviations_are_found():
    text = (
        "# Changelog\n\n## 0.2\n\n## [0.1.0] - 2026-01-01\n\n## [0.3.0] - 2026-02-01\n\n### News\n"
    )
    assert problems(text, "0.4.0") == [
        "no release: 0.2",
        "the newest release must come first",
        "unknown kind: News",
        "version 0.4.0 is missing",
    ]

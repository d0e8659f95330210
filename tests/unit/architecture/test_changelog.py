"""Check that CHANGELOG.md has the form of Keep a Changelog."""

import re

from pop_local import __version__
from support.paths import ROOT

TEXT = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
RELEASE = re.compile(r"\[(?:Unreleased|(\d+)\.(\d+)\.(\d+))\](?: - \d{4}-\d\d-\d\d)?")


def headings(level: int) -> list[str]:
    return re.findall(rf"^{'#' * level} (.+)$", TEXT, re.MULTILINE)


def test_releases_have_versions_and_dates_and_the_newest_is_first() -> None:
    releases = [RELEASE.fullmatch(heading) for heading in headings(2)]
    assert releases and None not in releases
    versions = [tuple(map(int, match.groups())) for match in releases if match and match[1]]
    assert versions == sorted(versions, reverse=True)


def test_changes_have_known_kinds() -> None:
    assert set(headings(3)) <= KINDS


def test_this_version_is_listed() -> None:
    introduction = TEXT.partition("\n## [")[2]
    assert f"## [{__version__}] - " in TEXT or f"release, {__version__}" in introduction

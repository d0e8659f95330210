"""Recorded sessions of agents (tests/clients/sessions): their requests without others' prose.

Each line is {"path": PATH, "body": BODY}. {"$filler": N} in a body stands for N characters that
tests/clients/record_session.py has removed.
"""

import json
from pathlib import Path
from typing import Any

SESSIONS = sorted((Path(__file__).parents[1] / "clients" / "sessions").glob("*.jsonl"))
REMOVED = "$filler"
_WORDS = "the quick brown fox jumps over the lazy dog while seven wizards brew a potion "


def expanded(value: Any, most: int) -> Any:
    """Return a recorded value with generated words, up to `most` characters for each filler."""
    if isinstance(value, list):
        return [expanded(each, most) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {REMOVED}:
        n_chars = min(value[REMOVED], most)
        return (_WORDS * (n_chars // len(_WORDS) + 1))[:n_chars]
    return {key: expanded(each, most) for key, each in value.items()}


def requests_of(file: Path, most: int = 10**9) -> list[tuple[str, dict[str, Any]]]:
    """Return the paths and bodies of a session's requests."""
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [(line["path"], expanded(line["body"], most)) for line in lines]

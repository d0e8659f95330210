"""Prompts and their edits, for tests of reuse."""

from pathlib import Path
from typing import Any

from pop_local.engine.model import PopModel
from support.calls import opened, prompt

OLD = prompt(700)
NEW = prompt(300, seed=1)

Tokens = list[int]
EDITS: dict[str, Tokens] = {
    "a changed line": OLD[:70] + NEW[:10] + OLD[80:],
    "a longer first line": NEW[:30] + OLD[10:],
    "a shorter first line": NEW[:5] + OLD[40:],
    "an inserted passage": OLD[:200] + NEW[:90] + OLD[200:],
    "a removed passage": OLD[:100] + OLD[180:],
    "the oldest quarter removed": OLD[:10] + OLD[180:],
    "two changed lines": OLD[:90] + NEW[:9] + OLD[100:400] + NEW[9:30] + OLD[410:],
    "a repeated passage": OLD[:300] + OLD[100:180] + OLD[300:],
    "a new end": OLD[:130] + NEW[:7] + OLD[137:600] + NEW[:60],
    "one token": [*OLD[:1], 9, *OLD[2:]],
}


def pruned(path: Path, **options: Any) -> PopModel:
    return opened(path, keep_states=True, n_ctx=2048, **options)

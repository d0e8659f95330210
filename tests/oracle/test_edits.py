"""Compare edited prompts, whose rows moved and were decoded again, with fresh prompts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support import recipes
from support.architectures import MORE_KEYS
from support.lora import OF_KV, make_lora
from support.oracle import Q8_0, Tokens, random_tokens
from support.raw import Job, Step, run
from support.synthetic import make_gguf

N_VOCAB = 120  # below the size of each model's vocabulary
N_UBATCH = 64
# More rows than 256, by which llama.cpp pads the cells that attention reads.
OLD = random_tokens(280, N_VOCAB)
NEW = random_tokens(280, N_VOCAB, seed=1)
# Each source: (first row, rows) of the old prompt, or the number of new tokens.
Source = tuple[int, int] | int
EDITS: dict[str, tuple[Source, ...]] = {
    "a changed line": ((0, 70), 10, (80, 200)),
    "a longer first line": (30, (10, 270)),
    "a shorter first line": (5, (40, 240)),
    "an inserted passage": ((0, 130), 90, (130, 150)),
    "a removed passage": ((0, 70), (150, 130)),
    "the oldest quarter removed": ((0, 10), (80, 200)),
    "passages in another order": ((0, 20), (160, 120), (80, 80), (20, 60)),
    "a repeated passage": ((0, 200), 8, (70, 100), (200, 80)),
    "a new end": ((0, 100), 7, (107, 60), 60),
    "one token": ((0, 1), 1, (2, 278)),
}
# A window's saved state lacks the rows that have left the window.
WINDOWED = ("gemma3",)
SYNTHETIC = ("llama", "gemma3", "qwen3", "phi3")
RECIPES = ("gptneox", "deepseek2")  # partial RoPE, and MLA
CACHES: dict[str, dict[str, Any]] = {
    "F16": {},
    "flash attention": {"flash_attn": True},
    "q8_0": {"flash_attn": True, "type_k": Q8_0, "type_v": Q8_0},
}


def edited(sources: tuple[Source, ...]) -> tuple[Tokens, Tokens]:
    """Return a prompt's tokens, and each row's source in the old prompt or -1."""
    tokens: list[int] = []
    rows: list[int] = []
    for source in sources:
        if isinstance(source, int):
            tokens += NEW[len(tokens) : len(tokens) + source]
            rows += [-1] * source
        else:
            first, n = source
            tokens += OLD[first : first + n]
            rows += range(first, first + n)
    return tuple(tokens), tuple(rows)


def can_move(model: Path, cache: str) -> bool:
    """Return False if llama.cpp cannot shift this model's quantized K cache."""
    return cache != "q8_0" or model.parent.name[:-1] not in ("llama", "phi3", "deepseek2")


def decoded(tokens: Tokens, start: int = 0) -> list[Step]:
    """Return a step for each ubatch from `start` on."""
    starts = range(start, len(tokens), N_UBATCH)
    return [Step("decode", "last", tokens=tokens[at : at + N_UBATCH], pos=at) for at in starts]


@pytest.fixture(scope="module", params=(*SYNTHETIC, *RECIPES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in SYNTHETIC:
        return make_gguf(folder / "model.gguf", request.param)
    name = next((name for name in recipes.names() if name.arch == request.param), None)
    if name is None:
        pytest.skip("the recipes are not built")
    return recipes.make(name, folder / "model.gguf", MORE_KEYS.get(name.arch, ()))


@pytest.fixture(scope="module", params=CACHES)
def cached(request: pytest.FixtureRequest, model: Path) -> tuple[Job, str, tuple[Step, ...]]:
    """Return a job with a cache type, the type's name, and steps that cache the old prompt."""
    job = Job(str(model), (), n_ubatch=N_UBATCH, **CACHES[request.param])
    if model.parent.name[:-1] in WINDOWED:
        return job, request.param, tuple(decoded(OLD))
    state = str(model.with_name("old.state"))
    run(replace(job, steps=(*decoded(OLD), Step("save", path=state))))
    return job, request.param, (Step("load", path=state),)


def assert_repaired(
    job: Job,
    edit: str,
    tmp_path: Path,
    unpatched_lib: Path,
    old: tuple[Step, ...],
    obstacle: str = "",
) -> None:
    """Compare an edited and repaired prompt with a fresh one.

    `old`: steps that fill the cache with the old prompt. `obstacle`: the expected error.
    """
    tokens, rows = edited(EDITS[edit])
    same = next(at for at, row in enumerate(rows) if row != at)
    fresh, repaired = tmp_path / "fresh", tmp_path / "repaired"
    steps = (
        *old,
        Step("move", tokens=tokens[same:], rows=rows[same:], pos=same),
        Step("overwrite", value=1),
        *decoded(tokens, same // N_UBATCH * N_UBATCH),
        Step("overwrite", value=0),
        Step("save", path=str(repaired)),
    )
    if obstacle and any(row not in (-1, at) for at, row in enumerate(rows)):
        with pytest.raises(RuntimeError, match=obstacle):
            run(replace(job, steps=steps))
        return
    results = run(replace(job, steps=steps))
    steps = (*decoded(tokens), Step("save", path=str(fresh)))
    expected = run(replace(job, lib=str(unpatched_lib), steps=steps))
    assert (results["last"] == expected["last"]).all()
    assert repaired.read_bytes() == fresh.read_bytes()


@pytest.mark.parametrize("edit", EDITS)
def test_repaired_prompt_equals_fresh_prompt(
    cached: tuple[Job, str, tuple[Step, ...]],
    model: Path,
    edit: str,
    tmp_path: Path,
    unpatched_lib: Path,
) -> None:
    job, cache, old = cached
    obstacle = "" if can_move(model, cache) else "rows of this model cannot move"
    assert_repaired(job, edit, tmp_path, unpatched_lib, old, obstacle)


def test_repaired_prompt_with_lora_adapter_equals_fresh_prompt(
    tmp_path: Path, unpatched_lib: Path
) -> None:
    model = make_gguf(tmp_path / "llama.gguf", "llama")
    lora = make_lora(tmp_path / "lora.gguf", "llama", OF_KV)
    job = Job(str(model), (), n_ubatch=N_UBATCH, lora=str(lora))
    assert_repaired(job, "a longer first line", tmp_path, unpatched_lib, tuple(decoded(OLD)))


def test_missing_rows_are_refused_and_change_nothing(model: Path, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    job = Job(str(model), (), n_ubatch=N_UBATCH)
    missing = Step("move", tokens=OLD[:9], rows=(*range(8), 500), pos=100)
    too_long = Step("move", tokens=(5,) * 3000, rows=(-1,) * 3000, pos=100)
    with pytest.raises(RuntimeError, match="position 500 has no row"):
        run(replace(job, steps=(*decoded(OLD), missing)))
    with pytest.raises(RuntimeError, match="not enough cells"):
        run(replace(job, steps=(*decoded(OLD), too_long)))
    refused = (replace(missing, value=-1), replace(too_long, value=-1))
    save_before, save_after = Step("save", path=str(before)), Step("save", path=str(after))
    run(replace(job, steps=(*decoded(OLD), save_before, *refused, save_after)))
    assert after.read_bytes() == before.read_bytes()

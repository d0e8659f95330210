"""Compare pruned prompts with images with the oracle: rows of embeddings with own positions.

The five kinds of vision-language models with hooks are: llama (SmolVLM and similar), gemma3 (an
image's rows see each other), qwen2vl (multiple positions a row), and qwen3vl and qwen3vlmoe (the
first layers also add image features).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from support.oracle import Q8_0, Trio, make_trio, random_tokens
from support.pop_files import OWN, add_to, own_as_fitted
from support.raw import Job, Step, run
from support.shapes import read_shape
from support.synthetic import DEFAULTS, make_gguf

N_VOCAB = 380
BOUNDARY = 5
GRID = 10


@dataclass(frozen=True)
class Text:
    n: int


@dataclass(frozen=True)
class Image:
    n: int


Part = Text | Image

# The last row has logits; all others are context, except for a named part's.
PROMPTS: dict[str, tuple[tuple[Part, ...], dict[str, Any]]] = {
    "over several ubatches": ((Text(40), Image(200), Text(30)), {"n_ubatch": 128}),
    "two, K in q8_0": ((Text(20), Image(60), Text(9), Image(90), Text(30)), {"type_k": Q8_0}),
    "first": ((Image(70), Text(50)), {"flash_attn": True}),
    "last": ((Text(40), Image(70)), {}),
}


@pytest.fixture(scope="module", params=["llama", "gemma3", "qwen2vl", "qwen3vl", "qwen3vlmoe"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    folder = tmp_path_factory.mktemp(request.param)
    model = make_gguf(folder / "model.gguf", request.param, type=Type.Q8_0)
    return make_trio(model, folder, BOUNDARY)


def arch_of(trio: Trio) -> str:
    return read_shape(trio.original).arch


def steps_of(parts: tuple[Part, ...], arch: str) -> list[Step]:
    """Return one step for each part, with mtmd's positions and without logits."""
    steps, pos = [], 0
    for part in parts:
        if isinstance(part, Text):
            tokens = random_tokens(part.n, N_VOCAB, seed=pos)
            steps.append(Step("decode", tokens=tokens, pos=pos, logits="none"))
            pos += part.n
            continue
        grid = GRID if DEFAULTS[arch].rope_sections else 0
        steps.append(Step("image", value=part.n, pos=pos, grid=grid, causal=arch != "gemma3"))
        pos += max(grid, -(-part.n // grid)) if grid else part.n
    return steps


def asking(step: Step) -> Step:
    """Add the logits of a step's last row."""
    return replace(step, name="logits", logits="last")


def split(step: Step, n: int) -> tuple[Step, Step]:
    """Split a step after its first `n` rows."""
    if step.op == "decode":
        head, tail = step.tokens[:n], step.tokens[n:]
        return replace(step, tokens=head), replace(step, tokens=tail, pos=step.pos + n)
    return replace(step, rows=(0, n)), replace(step, rows=(n, step.value))


def n_rows(step: Step) -> int:
    return len(step.tokens) or step.value


def expected(
    trio: Trio, context: list[Step], tail: list[Step], job: Job, folder: Path, cut: tuple[Step, ...]
) -> np.ndarray:
    """Return outputs of the rows of `tail`, after the silent model read `context`.

    `cut`: steps in between, on the original model.
    """
    state = str(folder / "state")
    silent = (*context, Step("save", path=state))
    run(replace(job, model=str(trio.silent), steps=silent))
    steps = (Step("load", path=state), *cut, *tail)
    return run(replace(job, model=str(trio.original), steps=steps))["logits"]


def pruned(trio: Trio, steps: list[Step], full_from: int, job: Job) -> dict[str, np.ndarray]:
    rule = (Step("sink"), Step("full_from", value=full_from))
    steps = [*rule, *steps, Step("counters", "counters")]
    return run(replace(job, model=str(trio.pruned), steps=tuple(steps), lib=None))


@pytest.mark.parametrize("name", PROMPTS)
def test_images_equal_the_oracle(tiny: Trio, name: str, tmp_path: Path, job: Job) -> None:
    parts, options = PROMPTS[name]
    arch = arch_of(tiny)
    if arch == "gemma3":  # a ubatch must hold each image, which is never split
        options = {**options, "n_ubatch": max(options.get("n_ubatch", 0), 200)}
    job = replace(job, **options)
    *before, last = steps_of(parts, arch)
    got = pruned(tiny, [*before, asking(last)], -1, job)
    n = sum(part.n for part in parts)
    np.testing.assert_array_equal(got["counters"], [n - 1, 1])

    head, tail = split(last, n_rows(last) - 1)
    cut: tuple[Step, ...] = ()
    if last.op == "image" and arch == "gemma3":  # every row sees the last one
        head, cut = last, (Step("remove", pos=last.pos + n_rows(last) - 1),)
    want = expected(tiny, [*before, head], [asking(tail)], job, tmp_path, cut)
    np.testing.assert_array_equal(got["logits"], want)

    whole = (*before, asking(last))
    full = run(replace(job, model=str(tiny.original), steps=whole))["logits"]
    off = (Step("mode", value=0), *whole, Step("counters", "counters"))
    unpruned = run(replace(job, model=str(tiny.pruned), steps=off, lib=None))
    np.testing.assert_array_equal(unpruned["logits"], full)
    np.testing.assert_array_equal(unpruned["counters"], [0, n])
    assert not np.array_equal(full, want)


def test_full_rows_may_start_within_an_image(tiny: Trio, tmp_path: Path, job: Job) -> None:
    """Rows are full by position: if an image's rows share one, all of them are full."""
    arch = arch_of(tiny)
    if arch == "gemma3":  # a saved state has only the cells inside the window
        model = make_gguf(tmp_path / "wide.gguf", arch, type=Type.Q8_0, swa_window=256)
        tiny = make_trio(model, tmp_path, BOUNDARY)
    text, image, rest = steps_of((Text(40), Image(70), Text(20)), arch)
    first = 0 if DEFAULTS[arch].rope_sections else 30
    full_from = image.pos + first
    got = pruned(tiny, [text, image, asking(rest)], full_from, job)
    np.testing.assert_array_equal(got["counters"], [40 + first, 70 - first + 20])
    context = [text, image] if first else [text]
    cut = (Step("remove", pos=full_from),) if first else ()
    tail = [replace(image, rows=(first, 70)), asking(rest)]
    want = expected(tiny, context, tail, job, tmp_path, cut)
    np.testing.assert_array_equal(got["logits"], want)


@pytest.mark.parametrize("arch", ["qwen3vl", "qwen3vlmoe"])
def test_boundary_among_layers_that_add_features_is_refused(arch: str, tmp_path: Path) -> None:
    model = make_gguf(tmp_path / "model.gguf", arch)
    low = add_to(model, tmp_path / "low.gguf", OWN | {"pop.schedule": "FFSSSSSS"})
    with pytest.raises(RuntimeError, match="boundary 2 is too low: the first 3 layers add"):
        run(Job(str(low), ()))
    with pytest.raises(RuntimeError, match="boundary 2 is too low"):
        run(Job(str(model), (Step("boundary", value=2),)))
    run(Job(str(model), (Step("boundary", value=3),)))


def test_rows_of_several_positions_have_no_deep_pass(tmp_path: Path) -> None:
    model = make_gguf(tmp_path / "model.gguf", "qwen2vl")
    read = Step("decode", tokens=random_tokens(20, N_VOCAB), logits="none")
    steps = (Step("boundary", value=5), Step("mode", value=1), Step("keep", value=1), read)
    with pytest.raises(RuntimeError, match="several positions each"):
        run(Job(str(model), (*steps, Step("run_deep", tokens=(3, 4)))))


def test_image_rows_use_own_projections_after_a_fit_on_text(tmp_path: Path, job: Job) -> None:
    """A key marks fits that included image rows."""
    model = make_gguf(tmp_path / "model.gguf", "qwen3vl", type=Type.Q8_0)
    trio = make_trio(model, tmp_path, BOUNDARY)
    rng = np.random.default_rng(0)
    tensors = own_as_fitted(model, BOUNDARY, 8)
    for name, (data, kind) in tensors.items():
        if kind is Type.F32:
            tensors[name] = (rng.standard_normal(data.shape, np.float32), kind)
    keys = OWN | {"pop.projection": "fitted"}
    image, text = steps_of((Image(70), Text(1)), "qwen3vl")
    full_from = image.pos + GRID
    own = pruned(trio, [image, asking(text)], full_from, job)["logits"]

    def logits(**more: int) -> np.ndarray:
        fit_keys = keys | {name.replace("__", "."): value for name, value in more.items()}
        path = add_to(model, tmp_path / "fitted.gguf", fit_keys, tensors)
        return pruned(replace(trio, pruned=path), [image, asking(text)], full_from, job)["logits"]

    np.testing.assert_array_equal(logits(), own)
    assert not np.array_equal(logits(pop__image_rows=70), own)

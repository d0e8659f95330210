"""Compare every architecture of llama.cpp with the unpatched library on tiny recipe models.

support/recipes.py builds the models, support/identity_layers.py their copies with identity layers.
Context rows and full rows are in separate calls, so all products have the same shapes in both
libraries.
"""

import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest

from pop_base.errors import FormatError, UnsupportedArchitectureError
from pop_converter.architecture.arch_keys import require_loadable
from pop_converter.architecture.arch_names import REFUSED
from pop_converter.gguf.header import read_header
from support import recipes
from support.architecture_table import DOCUMENT, make, row, written
from support.architectures import (
    CRASHES,
    MORE_KEYS,
    NO_DEEP_PASS,
    NO_FLASH_ATTENTION,
    NO_RECIPE,
    WITH_EXPERTS,
)
from support.identity_layers import IMPOSSIBLE, identity_copy, setting
from support.oracle import random_tokens
from support.pop_files import OWN, add_to
from support.raw import Job, Step, run
from support.shapes import read_shape

# Two ubatches of context, longer than the recipes' windows of 32 rows.
N_CONTEXT, N_TAIL, N_UBATCH = 36, 4, 24
NAMES = recipes.names()
TABLE = written(DOCUMENT.read_text(encoding="utf-8"))
DECODERS = [name for name in NAMES if name.arch not in {*REFUSED, *NO_RECIPE, *CRASHES}]
Results = dict[str, np.ndarray]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the library hides what recipes need"),
]


@dataclass(frozen=True)
class Full:
    """The full model's tail logits, [n_tail, n_vocab], and its state after the context."""

    tail: np.ndarray
    state: bytes


@dataclass
class Subject:
    """A tiny model, its tokens, and the steps that both libraries run."""

    name: recipes.Name
    folder: Path
    job: Job

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        return random_tokens(N_CONTEXT + N_TAIL, setting(read_header(self.path), "vocab_size"))

    @cached_property
    def n_layer(self) -> int:
        return setting(read_header(self.path), "block_count")

    @property
    def path(self) -> Path:
        return Path(self.job.model)

    @property
    def context(self) -> Step:
        return Step("decode", tokens=self.tokens[:N_CONTEXT], logits="none")

    @property
    def tail(self) -> Step:
        return Step("decode", "tail", tokens=self.tokens[N_CONTEXT:], pos=N_CONTEXT, logits="all")

    @property
    def at_once(self) -> Step:
        """Read context and tail in one call, with the last row's logits."""
        return Step("decode", "at once", tokens=self.tokens)

    def state(self, name: str) -> str:
        return str(self.folder / f"{name}.state")

    def save(self, name: str) -> Step:
        return Step("save", path=self.state(name))

    def load(self, name: str) -> Step:
        return Step("load", path=self.state(name))

    def read(self, name: str) -> bytes:
        return Path(self.state(name)).read_bytes()

    def unpatched(self, *steps: Step, model: Path | None = None) -> Results:
        return run(replace(self.job, model=str(model or self.path), steps=steps))

    def patched(self, *steps: Step) -> Results:
        return run(replace(self.job, steps=steps, lib=None))

    @cached_property
    def full(self) -> "Full":
        """Return the unpatched library's results."""
        got = self.unpatched(self.context, self.save("full"), self.tail)
        return Full(got["tail"], self.read("full"))

    def silent(self, boundary: int) -> Path:
        """Return the copy whose layers from `boundary` preserve the state."""
        path = self.folder / f"silent{boundary}.gguf"
        return path if path.exists() else identity_copy(self.path, path, boundary)

    @cached_property
    def _traits(self) -> tuple[int, bool]:
        exact, recurs = self.patched(Step("model", "traits"))["traits"]
        return int(exact), bool(recurs)

    @property
    def last(self) -> int:
        """Return the last layer that stores K/V or a state."""
        return (self._traits[0] or self.n_layer) - 1

    @property
    def is_recurrent(self) -> bool:
        """Return whether some layers are recurrent, which prevents refilling."""
        return self._traits[1]

    @property
    def boundaries(self) -> list[int]:
        """Return half of the layers, and all but one, so that recurrent layers are also skipped."""
        return sorted({self.n_layer // 2, *([1] if self.is_recurrent else [])})


@pytest.fixture(scope="module")
def job(job: Job) -> Job:
    return replace(job, n_ctx=256, n_batch=256, n_ubatch=N_UBATCH)


@pytest.fixture(scope="module")
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, job: Job
) -> Iterator[Subject]:
    folder = tmp_path_factory.mktemp(request.param.arch)
    path = make(request.param, folder / "model.gguf")
    yield Subject(request.param, folder, replace(job, model=str(path)))
    shutil.rmtree(folder)


def each(names: list[recipes.Name]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("subject", names, ids=str, indirect=True)


every = each(DECODERS)
comparable = each([name for name in DECODERS if name.arch not in IMPOSSIBLE])
flashing = each([name for name in DECODERS if name.arch not in NO_FLASH_ATTENTION])


def pruned(boundary: int) -> tuple[Step, ...]:
    return (
        Step("boundary", value=boundary),
        Step("mode", value=1),
        Step("sink", value=0),
        Step("full_from", value=N_CONTEXT),
    )


@every
def test_architecture_table_matches_headers(subject: Subject) -> None:
    assert row(read_shape(subject.path)) in TABLE
    require_loadable(read_header(subject.path))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *((name, "ssm.inner_size") for name in ("granitehybrid", "jamba", "qwen35")),
        *((name, "attention.key_length") for name in ("deepseek2", "kimi-linear", "mistral4")),
    ],
)
def test_numbers_that_abort_llama_cpp_are_refused(name: str, key: str, tmp_path: Path) -> None:
    recipe_name = next(recipe for recipe in NAMES if recipe.arch == name)
    path = make(recipe_name, tmp_path / "model.gguf")
    end, data = read_header(path).keys[f"{name}.{key}"].end, path.read_bytes()
    path.write_bytes(data[: end - 4] + struct.pack("<I", 32) + data[end:])
    with pytest.raises(FormatError, match=rf"the key {name}.{key} has an invalid value \(32\)"):
        require_loadable(read_header(path))


@every
def test_mode_off_equals_the_full_model(subject: Subject) -> None:
    off = (*pruned(subject.n_layer // 2), Step("mode", value=0))
    got = subject.patched(*off, subject.context, subject.tail, Step("counters", "counters"))
    np.testing.assert_array_equal(got["tail"], subject.full.tail)
    np.testing.assert_array_equal(got["counters"], [0, N_CONTEXT + N_TAIL])


@every
def test_skipping_the_last_layer_is_exact(subject: Subject) -> None:
    """The cache equals the full model's, so later results cannot differ."""
    check_equal_to_full(subject, subject.last)


@flashing
def test_skipping_the_last_layer_is_exact_with_flash_attention_and_swa(subject: Subject) -> None:
    """Flash attention does not transpose V, and the SWA cache has few rows."""
    job = replace(subject.job, flash_attn=True, swa_full=False)
    check_equal_to_full(replace(subject, job=job), subject.last)


def check_equal_to_full(subject: Subject, boundary: int) -> None:
    want = subject.full.tail
    steps = (subject.context, Step("counters", "counters"), subject.save("got"), subject.tail)
    got = subject.patched(*pruned(boundary), *steps)
    np.testing.assert_array_equal(got["counters"], [N_CONTEXT, 0])
    np.testing.assert_array_equal(got["tail"], want)
    assert subject.read("got") == subject.full.state


@every
def test_skipping_half_of_the_layers_equals_the_reference(subject: Subject) -> None:
    """State and logits differ from the full model's, so missing writes would be noticed.

    Logits in mode ALWAYS are those of the boundary state, and so are the silent copy's.
    """
    context, at_once, again = subject.context, subject.at_once, Step("remove")
    for boundary in subject.boundaries:
        steps = (context, subject.save("got"), again, subject.load("got"), subject.tail)
        always = (again, Step("mode", value=2), at_once)
        got = subject.patched(*pruned(boundary), *steps, *always)
        assert not np.array_equal(got["tail"], subject.full.tail)
        assert subject.read("got") != subject.full.state
        if subject.name.arch in IMPOSSIBLE:
            assert np.isfinite(got["tail"]).all()
            continue
        model = subject.silent(boundary)
        silent = subject.unpatched(context, subject.save("want"), again, at_once, model=model)
        want = subject.unpatched(subject.load("want"), subject.tail)
        np.testing.assert_array_equal(got["tail"], want["tail"])
        np.testing.assert_array_equal(got["at once"], silent["at once"])
        assert subject.read("got") == subject.read("want")


@comparable
def test_two_prompts_in_one_batch_equal_the_reference(subject: Subject) -> None:
    """The reference of recurrent models reads the prompts in turn.

    With two sequences in a ubatch, upstream's results have other bits, or (plamo2) other numbers.
    """
    job = replace(subject.job, n_seq_max=2, n_ctx=512)
    boundary = subject.boundaries[0]
    silent = subject.silent(boundary)
    second = replace(subject.context, tokens=subject.tokens[2 * N_TAIL :], seq=1)
    both = replace(subject.context, more=((1, 0, second.tokens),))
    in_turn = (subject.context, second) if subject.is_recurrent else (both,)
    subject = replace(subject, job=job)

    def saved(name: str) -> tuple[Step, ...]:
        return subject.save(f"{name}0"), replace(subject.save(f"{name}1"), seq=1)

    context = (*pruned(boundary), Step("full_from", seq=1, value=N_CONTEXT), both)
    subject.patched(*context, *saved("got"))
    subject.unpatched(*in_turn, *saved("want"), model=silent)
    assert subject.read("got0") == subject.read("want0")
    assert subject.read("got1") == subject.read("want1")


@every
def test_context_and_full_rows_share_a_ubatch(subject: Subject) -> None:
    """Rows of both kinds are in the last ubatch; recurrent models split it, bit for bit."""
    boundary = subject.boundaries[0]
    counters = Step("counters", "counters")
    apart = (subject.context, replace(subject.tail, logits="last"), Step("remove"))
    steps = (*apart, counters, subject.at_once, replace(counters, name="at once rows"))
    got = subject.patched(*pruned(boundary), *steps)
    np.testing.assert_array_equal(got["counters"], got["at once rows"])
    np.testing.assert_array_equal(got["counters"], [N_CONTEXT, N_TAIL])
    full_at_once = subject.unpatched(subject.at_once)["at once"][-1]
    noise = np.abs(full_at_once - subject.full.tail[-1]).max()
    allowed = 0 if subject.is_recurrent else 4 * noise + 1e-6 * np.abs(got["tail"]).max()
    assert np.abs(got["at once"] - got["tail"]).max() <= allowed


@every
def test_deep_pass_over_the_context_equals_the_full_model(subject: Subject) -> None:
    starts = range(0, N_CONTEXT, N_UBATCH)
    pieces = [tuple(range(start, min(start + N_UBATCH, N_CONTEXT))) for start in starts]
    steps = (
        *pruned(subject.n_layer // 2),
        Step("keep", value=1),
        subject.context,
        *(Step("run_deep", tokens=piece, logits="none") for piece in pieces),
        subject.save("deep"),
        subject.tail,
    )
    if subject.is_recurrent or subject.name.arch in NO_DEEP_PASS:
        refused = r"llama_pop_(set_snapshots|run_deep)\b.* (was refused|-1)"
        with pytest.raises(RuntimeError, match=refused):
            subject.patched(*steps)
        return
    np.testing.assert_array_equal(subject.patched(*steps)["tail"], subject.full.tail)
    assert subject.read("deep") == subject.full.state


@pytest.mark.parametrize(
    "name",
    [name for name in NAMES if name.arch in REFUSED.keys() - {*NO_RECIPE, *CRASHES}],
    ids=str,
)
def test_models_other_than_decoders_are_refused_by_name(name: recipes.Name, tmp_path: Path) -> None:
    path = make(name, tmp_path / "model.gguf")
    with pytest.raises(RuntimeError, match=rf"(?s)'{name.arch}'.*llama_pop_set_boundary"):
        run(Job(str(path), (Step("boundary", value=1),), n_ctx=256))
    schedule = "F" + "S" * (setting(read_header(path), "block_count") - 1)
    wrong = add_to(path, tmp_path / "wrong.gguf", {**OWN, "pop.schedule": schedule})
    with pytest.raises(RuntimeError, match=f"'{name.arch}' is an encoder, a diffusion"):
        run(Job(str(wrong), (), n_ctx=256))
    with pytest.raises(UnsupportedArchitectureError):
        read_shape(path)
    assert f"| {name.arch} | " in TABLE


@pytest.mark.parametrize("name", [name for name in NAMES if name.arch in NO_RECIPE], ids=str)
def test_missing_recipe_raises_error(name: recipes.Name, tmp_path: Path) -> None:
    with pytest.raises(recipes.NoModelError):
        make(name, tmp_path / "model.gguf")


def test_listed_architectures_exist_in_llama_cpp() -> None:
    ours = {*REFUSED, *NO_RECIPE, *CRASHES, *NO_DEEP_PASS, *NO_FLASH_ATTENTION, *IMPOSSIBLE}
    ours |= {*MORE_KEYS, *WITH_EXPERTS}
    assert ours <= {name.arch for name in NAMES}, "`make recipes` was not run, or a name is gone"

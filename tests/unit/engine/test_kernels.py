"""The patched CPU kernels: marks in graphs, results and options."""

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, closing

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from pop_base.errors import PopError
from pop_local.calibration.activations import loaded
from pop_local.engine.llama import backend, context
from pop_local.engine.llama.backend import Mode, Reading
from pop_local.engine.llama.batch import Outputs, TokenBatch
from pop_local.engine.llama.devices import Device, ggml, has_kernels
from support.calls import append, first_of, greedy, kv_bytes, last_logits, opened, prompt, read
from support.converted import converted, tiny
from support.ggml_library import Tensor
from support.synthetic import make_gguf

FAST, NONE, ALL = range(3)
OP_PARAM = 15
MARKED = {"MUL_MAT", "MUL_MAT_ID", "FLASH_ATTN_EXT", "GLU", "RMS_NORM"}
N_UBATCH = 64


class Watched:
    """A context that records the kernel marks of its operations."""

    def __init__(self, path, **options) -> None:
        self._opened = ExitStack()
        context = self._opened.enter_context(loaded(path, n_threads=1))
        self._marks: set[tuple[str, int]] = set()
        self._callback = backend.bindings().ggml_backend_sched_eval_callback(self._note)
        sizes = {"n_ctx": 256, "n_batch": N_UBATCH, "n_ubatch": N_UBATCH}
        another = context.extra_context(**sizes, cb_eval=self._callback, **options)
        self.ctx = self._opened.enter_context(another)
        self.n_tokens = 0

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *raised) -> None:
        self._opened.close()

    def _note(self, address: int, is_asked: bool, _: object) -> bool:
        tensor = Tensor.from_address(address)
        name = ggml("ggml_op_name", ctypes.c_char_p, tensor.op).decode()
        if name in MARKED:
            self._marks.add((name, tensor.op_params[OP_PARAM]))
        return False

    def decoded(self, n: int) -> set[tuple[str, int]]:
        self._marks.clear()
        with closing(TokenBatch(n)) as batch:
            assert batch.decode(self.ctx, prompt(n), self.n_tokens, Outputs.LAST) == 0
        self.n_tokens += n
        return set(self._marks)

    def deepened(self, rows: range) -> set[tuple[str, int]]:
        self._marks.clear()
        assert backend.run_deep(self.ctx, 0, np.asarray(rows, np.int32))
        return set(self._marks)


@pytest.fixture(params=["llama", "qwen3moe"])
def watched(request, tmp_path) -> Iterator[Watched]:
    with Watched(tiny(tmp_path, request.param), flash_attn_type=1) as context:
        yield context


def test_only_prompts_use_prefill_kernels(watched):
    step = watched.decoded(1)
    assert {mark for _, mark in step} == {FAST}
    assert MARKED - {"MUL_MAT_ID"} <= {name for name, _ in step}
    backend.set_reading(watched.ctx, Reading.SOME)
    for n in (N_UBATCH, 3, 1):
        assert watched.decoded(n) == {(name, ALL) for name, _ in step}
    backend.set_reading(watched.ctx, Reading.NONE)
    # llama.cpp reuses the graph, because the last batch also had one row.
    assert watched.decoded(1) == step


def test_deep_pass_uses_the_kernels(pop_file):
    with Watched(pop_file) as watched:
        backend.call("llama_pop_set_snapshots", watched.ctx, True)
        watched.decoded(40)
        assert {mark for _, mark in watched.deepened(range(2))} == {ALL}


def test_disabled_kernels_are_never_used(pop_file):
    with Watched(pop_file) as watched:
        backend.call("llama_pop_set_kernels", watched.ctx, False)
        backend.call("llama_pop_set_snapshots", watched.ctx, True)
        assert {mark for _, mark in watched.decoded(1)} == {NONE}
        backend.set_reading(watched.ctx, Reading.SOME)
        assert {mark for _, mark in watched.decoded(40)} == {NONE}
        assert {mark for _, mark in watched.deepened(range(2))} == {NONE}
        backend.call("llama_pop_set_kernels", watched.ctx, True)
        assert {mark for _, mark in watched.decoded(1)} == {ALL}


# --- results


needs_kernels = pytest.mark.skipif(not has_kernels(), reason="no kernels for this processor")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def quantised(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return converted(make_gguf(folder / "model.gguf", request.param, type=Type.Q8_0), folder)


@needs_kernels
@pytest.mark.parametrize("mode", [Mode.OFF, Mode.CONTEXT])
def test_prompts_results_do_not_depend_on_its_chunks(quantised, mode):
    results = set()
    for n_batch, n_threads in ((64, 1), (64, 2), (7, 1), (1, 1)):
        model = opened(quantised, n_batch=n_batch, n_ubatch=n_batch, n_threads=n_threads)
        model.engine.set_mode(mode)
        append(model, prompt(150))
        results.add((kv_bytes(model), last_logits(model).tobytes()))
    assert len(results) == 1


@needs_kernels
def test_refilled_cache_does_not_depend_on_its_chunks(quantised):
    tokens = prompt(150)
    full = opened(quantised, full=True)
    append(full, tokens)
    for n_ubatch in (50, 7, 1):
        model = opened(quantised, n_ubatch=n_ubatch, keep_states=True)
        append(model, tokens)
        assert kv_bytes(model) != kv_bytes(full)
        assert first_of(model).refiller.refill() == len(tokens)
        assert kv_bytes(model) == kv_bytes(full)


@needs_kernels
def test_context_with_kernels_off_computes_without_them(quantised):
    on, off = (opened(quantised, kernels=is_on, flash_attn=False) for is_on in (True, False))
    assert read(on, prompt(60)).tobytes() != read(off, prompt(60)).tobytes()


# --- options


@pytest.mark.parametrize(
    ("has_kernels", "options", "expected"),
    [
        (True, {}, 1),
        (True, {"kernels": False}, 0),
        (True, {"flash_attn": False}, 0),
        (False, {}, 0),
        (False, {"flash_attn": True}, 1),
    ],
)
def test_kernels_enable_flash_attention(pop_file, monkeypatch, has_kernels, options, expected):
    monkeypatch.setattr(context, "has_kernels", lambda: has_kernels)
    model = opened(pop_file, **options)
    assert model.engine.context.settings.flash_attn_type == expected


def test_gpu_leaves_flash_attention_to_llama_cpp(pop_file, monkeypatch):
    gpu = Device("GPU0", "Some GPU", True, 10**9, 10**9)
    monkeypatch.setattr(context, "devices", lambda: (gpu,))
    auto = backend.bindings().LLAMA_FLASH_ATTN_TYPE_AUTO
    model = opened(pop_file)
    assert model.engine.context.settings.flash_attn_type == auto
    assert len(greedy(model, prompt(40))) > 0
    assert opened(pop_file, n_gpu_layers=0).engine.context.settings.flash_attn_type != auto
    assert opened(pop_file, flash_attn=False).engine.context.settings.flash_attn_type == 0


def test_kv_of_another_attention_are_refused(pop_file):
    """Flash attention changes the layout of V."""
    model, other = (opened(pop_file, flash_attn=is_on) for is_on in (True, False))
    tokens = prompt(100)
    read(model, tokens)
    with pytest.raises(PopError, match="different options"):
        first_of(other).states.restore(first_of(model).states.save())


@pytest.mark.parametrize("kernels", [True, False])
def test_only_upstream_kernels_repack_weights(tmp_path, kernels):
    path = tiny(tmp_path, type=Type.Q4_0)
    model, other = (opened(path, repack=repack, kernels=kernels) for repack in (None, False))
    results = read(model, prompt(60)), read(other, prompt(60))
    if kernels and has_kernels():
        np.testing.assert_array_equal(*results)
    else:
        # Upstream's two kernels differ by up to 0.06, other weights by 1.
        np.testing.assert_allclose(*results, atol=0.2)

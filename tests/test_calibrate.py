"""Calibration: what the taps show, what is fitted from it, what the backend then stores."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pop_converter import fit
from pop_converter.errors import PopError
from pop_converter.fit import Gram, KvType, Weighting
from pop_converter.format import read_pop_meta
from pop_converter.plan import make_plan
from pop_converter.rewrite import convert, strip
from pop_converter.shape import read_shape
from pop_converter.source import read_source
from pop_converter.weights import Weights
from synthetic import make_gguf

from pop_local.calibration.job import (
    CalibrationStoppedError,
    Settings,
    Watch,
    calibrate,
)
from pop_local.calibration.needs import plan_needs
from pop_local.calibration.texts import (
    N_WINDOW,
    CalibrationError,
    default_tokens,
    given_text,
    n_windows,
    whole_text,
)
from pop_local.engine.activations import reading
from pop_local.engine.loaded import LoadedModel
from pop_local.engine.samples import draw, sample_windows

BOUNDARY, N_LAYER, N_TOKENS = 4, 8, 2048
ARCHS = ["llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3"]
SILENT = Watch(lambda done, total: None, lambda done, total: None, lambda: False)


class Recorder:
    """Keeps what the taps show."""

    def __init__(self) -> None:
        self.states: dict[int, list[np.ndarray]] = {}
        self.layers: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}

    def state(self, boundary: int, rows: np.ndarray) -> None:
        self.states.setdefault(boundary, []).append(rows.copy())

    def layer(self, layer: int, k: np.ndarray, v: np.ndarray, mass: np.ndarray) -> None:
        self.layers.setdefault(layer, []).append((k.copy(), v.copy(), mass.copy()))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    words = np.random.default_rng(0).integers(97, 123, (9000, 5), np.uint8)
    path: Path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(bytes(word).decode() for word in words))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("model") / "llama.gguf", "llama")


def settings(text: Path, **others: object) -> Settings:
    made = Settings(N_TOKENS, text, kv_type=KvType.F32)
    return replace(made, **others)  # type: ignore[arg-type]


def planned(path: Path, boundary: int = BOUNDARY):
    return make_plan(read_shape(path), boundary=boundary, sink_tokens=0, projection="fitted")


def fitted(path: Path, options: Settings, watch: Watch = SILENT):
    [found] = fitted_at((BOUNDARY,), path, options, watch)
    return found


def fitted_at(boundaries, path: Path, options: Settings, watch: Watch = SILENT):
    plans = [planned(path, boundary) for boundary in boundaries]
    with LoadedModel(path, n_threads=1) as model:
        return calibrate(plans, model, read_source(path), options, watch)


def recorded(path: Path, windows, boundaries=(BOUNDARY,), layers=(5, 6, 7)) -> Recorder:
    recorder = Recorder()
    with (
        LoadedModel(path, n_threads=1) as model,
        reading(model, recorder, boundaries=boundaries, layers=layers, n_window=N_WINDOW) as opened,
    ):
        for window in windows:
            opened.window(window)
    return recorder


def prompt(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 384, n).tolist()


# --- the taps


@pytest.mark.parametrize("arch", ARCHS)
def test_the_taps_show_what_the_layer_computes(arch: str, tmp_path: Path):
    """K and V of layer l are its own projections of the state before it; attention adds up."""
    path = make_gguf(tmp_path / "model.gguf", arch)
    shown = recorded(path, [prompt(N_WINDOW)], boundaries=(5, 6), layers=(5, 6))
    weights = Weights(read_source(path))
    for layer in (5, 6):
        k, v, mass = shown.layers[layer][0]
        own = weights.own_projection(layer, k.shape[1] + v.shape[1])
        x = fit.with_bias(shown.states[layer][0], 1e-6).astype(np.float64)
        wanted = (x[:, :-1] * own.gain) @ own.weight.T + own.bias
        np.testing.assert_allclose(np.concatenate([k, v], axis=1), wanted, atol=0.02)
        assert own.n_k == k.shape[1]
        assert mass.shape == (N_WINDOW,) and mass.min() >= -1e-4
        assert mass[-1] == pytest.approx(0, abs=1e-4)  # nothing comes after it
    n_head = 4
    full = recorded(path, [prompt(2)], layers=(5,)).layers[5][0][2]
    assert 0 < full[0] < n_head and full[1] == pytest.approx(0, abs=1e-5)


def test_windows_do_not_see_each_other(llama: Path):
    one, other = prompt(N_WINDOW, 1), prompt(N_WINDOW, 2)
    shown = recorded(llama, [one, other, one])
    first, second, third = shown.states[BOUNDARY]
    np.testing.assert_array_equal(first, third)
    assert not np.array_equal(first, second)


def test_what_an_observer_raises_comes_out(llama: Path):
    class Failing(Recorder):
        def layer(self, layer, k, v, mass) -> None:
            raise KeyboardInterrupt

    with LoadedModel(llama, n_threads=1) as model:
        context = reading(model, Failing(), boundaries=(4,), layers=(6,), n_window=N_WINDOW)
        with context as opened, pytest.raises(KeyboardInterrupt):
            opened.window(prompt(64))


def test_what_a_signal_raises_comes_out(llama: Path):
    class Stopping(Recorder):
        def layer(self, layer, k, v, mass) -> None:
            signal.raise_signal(signal.SIGTERM)

    def leave(number, frame) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with LoadedModel(llama, n_threads=1) as model:
            context = reading(model, Stopping(), boundaries=(4,), layers=(5,), n_window=N_WINDOW)
            with context as opened, pytest.raises(SystemExit):
                opened.window(prompt(64))
    finally:
        signal.signal(signal.SIGTERM, before)


# --- the fit


@pytest.mark.parametrize("weighting", Weighting)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3", "phi3"])
def test_the_fit_equals_direct_least_squares(arch, weighting, text, tmp_path):
    path = make_gguf(tmp_path / "model.gguf", arch)
    tensors = {t.name: t for t in fitted(path, settings(text, weighting=weighting)).tensors}
    with LoadedModel(path, n_threads=1) as model:
        windows = given_text(model, text, N_TOKENS // N_WINDOW, 128).windows
    shown = recorded(path, windows.tolist(), layers=(6,))
    x = np.concatenate([fit.with_bias(rows[1:], 1e-6) for rows in shown.states[BOUNDARY]])
    y = np.concatenate([np.concatenate([k, v], 1)[1:] for k, v, _ in shown.layers[6]])
    d = np.concatenate([fit.token_weights(m[1:], weighting) for _, _, m in shown.layers[6]])
    own = Weights(read_source(path)).own_projection(6, y.shape[1])
    root = np.sqrt(d.astype(np.float64))[:, None]
    weighted = x.astype(np.float64) * root
    start = np.vstack([own.gain[:, None] * own.weight.T, own.bias]).astype(np.float64)
    power = np.square(weighted).sum(0) * np.append(np.full(128, fit.RIDGE), fit.BIAS_RIDGE)
    # The ridge as further rows of the least squares.
    rows = np.vstack([weighted, np.diag(np.sqrt(power))])
    rest = np.vstack([(y - x @ start) * root, np.zeros((129, y.shape[1]))])
    wanted = start + np.linalg.lstsq(rows, rest, rcond=None)[0]
    found = _stored(tensors, 6)
    # Predictions, since qwen2's biases make the inputs nearly collinear with the column of ones.
    predicted = (x[:, :-1] * own.gain) @ found[0].T + found[1]
    np.testing.assert_allclose(predicted, x @ wanted, atol=2e-3)


def _stored(tensors, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight [n_kv, n_embd] and bias [n_kv] of F32 tensors."""
    weights, biases = [], []
    for part in "kv":
        weight = tensors[f"blk.{layer}.pop_attn_{part}.weight"]
        weights.append(np.frombuffer(weight.data, np.float32).reshape(weight.dims[::-1]))
        bias = tensors[f"blk.{layer}.pop_attn_{part}.bias"]
        biases.append(np.frombuffer(bias.data, np.float32))
    return np.concatenate(weights), np.concatenate(biases)


def test_groups_of_layers_give_the_same_fit(llama: Path, text: Path):
    plan, source = planned(llama), read_source(llama)
    small = plan_needs((plan,), source, memory_bytes=1)
    large = plan_needs((plan,), source, memory_bytes=1 << 30)
    pairs = [(BOUNDARY, layer) for layer in (5, 6, 7)]
    assert list(small.groups) == [(pair,) for pair in pairs]
    assert list(large.groups) == [tuple(pairs)]
    assert small.sums_bytes < large.sums_bytes
    at_once = fitted(llama, settings(text))
    assert fitted(llama, settings(text, memory_bytes=1)) == at_once


@pytest.mark.parametrize("memory_bytes", [1, 1 << 30])
def test_several_depths_are_fitted_in_one_pass(memory_bytes, llama: Path, text: Path):
    options = settings(text, memory_bytes=memory_bytes)
    read: list[int] = []
    watch = replace(SILENT, on_reading=lambda done, total: read.append(done))
    together = fitted_at((3, 5), llama, options, watch)
    assert read[-1] == N_TOKENS * (1 if memory_bytes > 1 else 6)
    apart = [fitted_at((boundary,), llama, settings(text))[0] for boundary in (3, 5)]
    assert [len(each.tensors) for each in together] == [4 * 4, 2 * 4]
    assert list(together) == apart


# Asked after each window and after each layer that is solved.
@pytest.mark.parametrize(
    ("memory_bytes", "stop_after", "first_read"),
    [
        (1 << 30, 1, 2 * N_WINDOW),
        (1 << 30, 3, 4 * N_WINDOW),
        (1 << 30, 6, None),
        (1, 3, 4 * N_WINDOW),
        (1, 5, 5 * N_WINDOW),
        (1, 7, 7 * N_WINDOW),
    ],
)
def test_a_resumed_fit_equals_one_without_a_stop(
    memory_bytes, stop_after, first_read, llama, text, tmp_path
):
    kept = settings(text, state_path=tmp_path / "state", memory_bytes=memory_bytes)
    asked = [0]

    def should_stop() -> bool:
        asked[0] += 1
        return asked[0] == stop_after

    with pytest.raises(CalibrationStoppedError):
        fitted(llama, kept, replace(SILENT, should_stop=should_stop))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    read: list[int] = []
    again = fitted(llama, kept, replace(SILENT, on_reading=lambda done, total: read.append(done)))
    assert next(iter(read), None) == first_read
    assert again == fitted(llama, settings(text, memory_bytes=memory_bytes))
    read.clear()
    watch = replace(SILENT, on_reading=lambda done, total: read.append(done))
    assert (fitted(llama, kept, watch), read) == (again, [])


@pytest.mark.parametrize(("first", "then"), [(1, 1 << 30), (1 << 30, 1)])
def test_a_fit_is_resumed_with_whatever_memory_is_free(first, then, llama, text, tmp_path):
    kept = settings(text, state_path=tmp_path / "state", memory_bytes=first)
    asked = [0]

    def should_stop() -> bool:
        asked[0] += 1
        return asked[0] == (7 if first == 1 else 2)

    with pytest.raises(CalibrationStoppedError):
        fitted(llama, kept, replace(SILENT, should_stop=should_stop))
    assert fitted(llama, replace(kept, memory_bytes=then)) == fitted(llama, settings(text))


def test_a_state_of_other_settings_is_refused(llama: Path, text: Path, tmp_path: Path):
    kept = settings(text, state_path=tmp_path / "state")
    with pytest.raises(CalibrationStoppedError):
        fitted(llama, kept, replace(SILENT, should_stop=lambda: True))
    with pytest.raises(CalibrationError, match="another calibration"):
        fitted(llama, replace(kept, ridge=0.5))
    (tmp_path / "state").write_bytes(b"PK junk")
    with pytest.raises(CalibrationError, match="damaged"):
        fitted(llama, kept)


def _n_kv(path: Path) -> int:
    shape = read_shape(path)
    return shape.kv_macs[0] // shape.n_embd


def test_a_fitted_file_can_be_stripped(llama: Path, text: Path, tmp_path: Path):
    target, back = tmp_path / "pop.gguf", tmp_path / "back.gguf"
    meta = convert(planned(llama), llama, target, fitted=fitted(llama, settings(text)))
    assert meta == read_pop_meta(target)
    assert meta.calibration is not None
    assert (meta.calibration.name, meta.calibration.n_tokens) == ("words.txt", N_TOKENS)
    strip(target, back)
    assert back.read_bytes() == llama.read_bytes()


# --- texts and samples


def test_default_tokens_grow_with_the_model():
    assert [default_tokens(n) for n in (576, 640, 2048, 4096)] == [16384, 16384, 49152, 98304]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no text"), (b" \n", "no text"), (b"ab\0cd", "binary"), (b"\xff\xfe\xfa", "not UTF-8")],
)
def test_texts_that_are_none_are_refused(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(PopError, match=message):
        whole_text(path)


def test_a_folder_is_all_its_texts(tmp_path: Path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\0")
    assert whole_text(tmp_path) == "first\n\nsecond"


def test_too_little_text_says_how_much_is_needed(llama: Path, tmp_path: Path):
    path = tmp_path / "short.txt"
    path.write_text("too short " * 20)
    with pytest.raises(PopError, match="needs 2,048"):
        fitted(llama, settings(path))
    with pytest.raises(CalibrationError, match="needs 2,048"):
        n_windows(100, 128)


def test_one_phrase_over_and_over_is_refused(llama: Path, tmp_path: Path):
    path = tmp_path / "same.txt"
    path.write_text("a" * 20_000)
    with pytest.raises(PopError, match="repeats itself"):
        fitted(llama, settings(path))


def test_samples_are_repeatable_and_begin_with_the_first_token(llama: Path):
    with LoadedModel(llama, n_threads=1) as model:
        first, again, other = (
            sample_windows(model, 3, 32, seed=seed, on_progress=lambda done, total: None)
            for seed in (0, 0, 1)
        )
        assert (first[:, 0] == model.first_token).all()
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other) and len({tuple(row) for row in first.tolist()}) == 3


def test_draws_follow_the_probabilities():
    logits = np.log(np.arange(1, 1001, dtype=np.float32))
    chances = (np.arange(20_000) + 0.5) / 20_000
    drawn = np.bincount([draw(logits, chance) for chance in chances], minlength=1000)
    wanted = 20_000 * np.arange(1, 1001) / np.arange(1, 1001).sum()
    assert np.abs(drawn - wanted).max() <= 1.5


def test_the_sums_of_a_job_stay_within_what_is_announced(llama: Path):
    plan = planned(llama)
    needs = plan_needs((plan,), read_source(llama), 1 << 30)
    sums = [Gram(plan.shape.n_embd, _n_kv(llama)) for _ in plan.fitted_layers]
    assert sum(gram.xx.nbytes + gram.xy.nbytes for gram in sums) < needs.sums_bytes
    assert needs.sums_bytes < needs.total_bytes
    sampling = plan_needs((plan,), read_source(llama), 1 << 30, n_sampled=64)
    cache = 64 * N_WINDOW * 2 * N_LAYER * _n_kv(llama)
    assert sampling.sums_bytes == needs.sums_bytes
    assert sampling.total_bytes > cache + 2 * llama.stat().st_size

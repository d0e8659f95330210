"""Fits on pictures and text: the images, the gain for their K/V, and refusals."""

from contextlib import closing
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pop_converter.base.errors import PopError, StoppedError
from pop_converter.fit import least_squares as fit
from pop_converter.fit.weights import Weights
from pop_converter.gguf.source import read_source
from pop_converter.popfile.rewrite import Fitted, convert
from pop_local.calibration.activations import WindowReader, loaded
from pop_local.calibration.images import draw_pictures, images_of, open_vision, pictures_of
from pop_local.calibration.job import Callbacks
from pop_local.calibration.texts import N_WINDOW, CalibrationError
from pop_local.engine.llama.taps import Tapped, Wanted
from support.calibrating import (
    BOUNDARY,
    fitted,
    kv,
    planned,
    recorded,
    settings,
    words,
)
from support.calls import never
from support.program import called
from support.shapes import read_pop_meta
from support.vision_models import MMPROJS, encoded, make_mmproj, make_vision_model, png

pytestmark = pytest.mark.slow
LAYERS = (5, 6, 7)
N_PICTURES = 12


@pytest.fixture(scope="module", params=["llama", "qwen3vl"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    make_vision_model(folder, request.param)
    words(folder)
    (folder / "pictures").mkdir()
    for number, picture in enumerate(draw_pictures(N_PICTURES)):
        smaller = Image.open(BytesIO(picture.content)).resize((160, 128))
        (folder / "pictures" / f"{number}.png").write_bytes(encoded(smaller, "PNG"))
    return folder / "plain.gguf"


@pytest.fixture(scope="module")
def on_both(plain: Path) -> Fitted:
    return fitted(plain, with_pictures(plain))


def options(plain: Path, **others: object):
    return settings(plain.parent / "words.txt", **others)


def with_pictures(plain: Path, **others: object):
    folder = plain.parent
    made = {"mmproj": folder / "mmproj.gguf", "images": folder / "pictures"}
    return options(plain, **made | others)


def shown(plain: Path, seed: int) -> list[Tapped]:
    """States of the full model for images that nothing was fitted on."""
    mmproj = plain.parent / "mmproj.gguf"
    with loaded(plain, n_threads=1) as context:
        reading = WindowReader(context, Wanted((BOUNDARY,), LAYERS))
        with closing(open_vision(context, mmproj, never)) as vision:
            return [
                reading.image(vision, image) for image in images_of(vision, draw_pictures(2, seed))
            ]


def error(plain: Path, found: Fitted | None, held_out: list[Tapped]) -> float:
    """Relative RMS error of the K/V of all layers; None for the layers' own projections."""
    states = np.concatenate([each.states[BOUNDARY][1:] for each in held_out])
    x = fit.with_bias(fit.normalised(states, 1e-6))
    wrong = power = 0.0
    for layer in LAYERS:
        y = kv(held_out, layer)
        own = Weights(read_source(plain)).own_projection(layer, *[y.shape[1] // 2] * 2)
        weight, bias = (own.weight, own.bias) if found is None else stored(found, layer)
        wrong += float(np.square((x[:, :-1] * own.gain) @ weight.T + bias - y).sum())
        power += float(np.square(y).sum())
    return float(np.sqrt(wrong / power))


def stored(found: Fitted, layer: int) -> tuple[np.ndarray, np.ndarray]:
    by_name = {tensor.name: tensor for tensor in found.tensors}
    weights, biases = [], []
    for part in "kv":
        weight = by_name[f"blk.{layer}.pop_attn_{part}.weight"]
        weights.append(np.frombuffer(weight.data, np.float32).reshape(weight.dims[::-1]))
        biases.append(np.frombuffer(by_name[f"blk.{layer}.pop_attn_{part}.bias"].data, np.float32))
    return np.concatenate(weights), np.concatenate(biases)


def test_pictures_win_for_pictures_and_cost_nothing_for_text(plain, on_both):
    on_text = fitted(plain, options(plain))
    held_out = shown(plain, seed=1)
    own, text, both = (error(plain, found, held_out) for found in (None, on_text, on_both))
    assert both < 0.8 * min(own, text)
    windows = given(plain, seed=1)
    text, both = (error(plain, found, windows) for found in (on_text, on_both))
    assert both < 1.05 * text
    assert on_text.image_rows == 0 < on_both.image_rows


def given(plain: Path, seed: int) -> list[Tapped]:
    """The full model on text like that of the fit, in another order."""
    found = plain.parent / "words.txt"
    with loaded(plain, n_threads=1) as context:
        tokens = np.random.default_rng(seed).permutation(context.tokenize(found.read_text()[:9000]))
    return recorded(plain, [tokens[:N_WINDOW].tolist()], layers=LAYERS)


def test_a_file_says_what_it_was_fitted_on(plain, on_both, tmp_path):
    convert(planned(plain), plain, tmp_path / "both.gguf", fitted=on_both)
    meta = read_pop_meta(tmp_path / "both.gguf")
    assert meta is not None and meta.image_rows == on_both.image_rows
    assert "rows of pictures" in called("inspect", tmp_path / "both.gguf").stdout


def test_a_stopped_fit_goes_on(plain, on_both, tmp_path):
    """Stopped while pictures are read; what comes out is the same, bit for bit."""
    made = with_pictures(plain, state_path=tmp_path / "state")
    n_text = 4 * N_WINDOW
    stopping = {"at": 0}

    def advance(done: int, total: int) -> None:
        stopping["at"] = done

    stop = Callbacks(advance, advance, lambda: stopping["at"] > n_text + 3 * N_WINDOW)
    with pytest.raises(StoppedError):
        fitted(plain, made, stop)
    resumed = fitted(plain, made)
    assert [t.data for t in resumed.tensors] == [t.data for t in on_both.tensors]


def test_drawn_pictures_are_the_same_for_the_same_seed():
    assert draw_pictures(3) == draw_pictures(3)
    assert len({picture.sha256 for picture in draw_pictures(8)}) == 8
    assert draw_pictures(1, seed=1) != draw_pictures(1)


def test_pictures_of_a_folder(tmp_path):
    with pytest.raises(CalibrationError, match="has no pictures"):
        pictures_of(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.png").write_bytes(png(3))
    (tmp_path / "b.txt").write_text("no picture")
    assert [Path(picture.name).name for picture in pictures_of(tmp_path)] == ["a.png"]


def test_convert_on_the_command_line(tmp_path):
    folder = tmp_path / "vision"
    folder.mkdir()
    make_vision_model(folder, "llama")
    text, plain = words(folder), folder / "plain.gguf"
    given = ("--boundary", 4, "--tokens", 2048, "--text", text, "--force", "--threads", 1)
    made = ("convert", plain, tmp_path / "out.gguf", *given)
    (folder / "pictures").mkdir()
    refused = called(*made, "--images", folder / "pictures")
    assert refused.returncode == 2 and "requires --mmproj" in refused.stderr
    refused = called(*made, "--mmproj", plain)
    assert refused.returncode == 1 and "is not an mmproj" in refused.stderr
    refused = called(*made, "--mmproj", folder / "mmproj.gguf", "--images", folder / "pictures")
    assert refused.returncode == 1 and "has no pictures" in refused.stderr
    assert not (tmp_path / "out.gguf").exists()
    (folder / "pictures" / "a.png").write_bytes(png(3))
    done = called(*made, "--mmproj", folder / "mmproj.gguf", "--images", folder / "pictures")
    assert done.returncode == 0, done.stderr
    meta = read_pop_meta(tmp_path / "out.gguf")
    assert meta is not None and meta.image_rows == 80


def test_a_foreign_mmproj(plain, tmp_path):
    wide = make_mmproj(tmp_path / "wide.gguf", replace(MMPROJS["gemma3"], n_text=256))
    with pytest.raises(PopError, match="does not fit this model"):
        fitted(plain, with_pictures(plain, mmproj=wide))

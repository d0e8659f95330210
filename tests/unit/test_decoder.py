"""The decoder in torch against the backend's logits; what it does not compute is refused."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from converter.errors import UnsupportedArchitectureError
from converter.hyper import Hyper, Rope, read_hyper
from converter.source import read_source
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.measure.divergence import divergence, predictions
from pop_local.measure.forced import forced
from pop_local.measure.heldout import shipped_part
from pop_local.measure.probes import bos
from support.calls import opened, prompt
from support.synthetic import make_gguf, make_split

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
from converter.decoder import Decoder  # noqa: E402

# Of random models whose weights are F16 or Q8_0; a wrong key moves them by a hundred times that.
NOISE = 1e-4
TINY: dict[str, dict[str, object]] = {
    "llama": {"rope_factors": True, "head_arrays": True},
    "llama-scaled": {"rope_divisor": 2.0, "tied_output": True},
    "llama-biases": {"qkv_bias": True, "type": GGMLQuantizationType.Q8_0},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"caps": (0.5, 1.5)},
    "gemma3": {"swa_period": 3},
}


def tiny(folder: Path, name: str) -> Path:
    return make_gguf(folder / f"{name}.gguf", name.split("-")[0], n_layer=4, **TINY[name])


def backend_logits(model: PopModel, tokens: list[int]) -> np.ndarray:
    with forced(model) as reader:
        reader.read(tokens[:1], Mode.OFF)
        return reader.predict(tokens[1:])


def torch_logits(path: Path, tokens: list[int], **hyper: object) -> np.ndarray:
    decoder = Decoder(read_source(path))
    decoder.hyper = replace(decoder.hyper, **hyper)  # type: ignore[arg-type]
    states = decoder.embed(np.array([tokens]))
    with torch.no_grad():
        for index in range(decoder.n_layer):
            states = decoder.layer(index)(states)
        logits: np.ndarray = decoder.logits(states)[0, :-1].numpy()
    return logits


def mean_kl(logits: np.ndarray, others: np.ndarray) -> float:
    return float(divergence(predictions(logits), predictions(others)).kl.mean())


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_the_backend(tmp_path, name):
    path, tokens = tiny(tmp_path, name), prompt(48)
    expected = backend_logits(opened(path), tokens)
    assert mean_kl(expected, torch_logits(path, tokens)) < NOISE


def halved(hyper: Hyper) -> tuple[Rope, ...]:
    return tuple(replace(rope, scale=rope.scale / 2) for rope in hyper.ropes)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("llama", lambda h: {"interleaved": False}),
        ("llama-scaled", lambda h: {"ropes": halved(h)}),
        ("qwen3", lambda h: {"interleaved": True}),
        ("qwen2", lambda h: {"attention_scale": 2 * h.attention_scale}),
        ("gemma2", lambda h: {"attention_cap": 0.0}),
        ("gemma2", lambda h: {"final_cap": 0.0}),
        ("gemma3", lambda h: {"windows": (0,) * 4}),
        ("gemma3", lambda h: {"ropes": halved(h)}),
        ("gemma3", lambda h: {"gelu": False}),
        ("gemma3", lambda h: {"embedding_scale": 1.0}),
    ],
)
def test_what_is_computed_otherwise_shows_in_the_logits(tmp_path, name, wrong):
    path, tokens = tiny(tmp_path, name), prompt(48)
    change = wrong(read_hyper(read_source(path)))
    changed = torch_logits(path, tokens, **change)
    assert mean_kl(torch_logits(path, tokens), changed) > 10 * NOISE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_logits_of_real_models_are_those_of_the_backend(request, name):
    path = request.getfixturevalue(name)
    model = PopModel(path, n_ctx=128, n_threads=1)
    text = model.tokenize(shipped_part("prose").encode(), add_bos=False, special=False)
    tokens = [*bos(model), *text][:64]
    expected = backend_logits(model, tokens)
    assert mean_kl(expected, torch_logits(path, tokens)) < 0.01


def test_a_split_model_is_read_from_all_its_parts(tmp_path):
    whole = make_gguf(tmp_path / "whole.gguf", "llama")
    parts = make_split(tmp_path / "split.gguf", "llama", max_tensors=20)
    tokens = prompt(8)
    np.testing.assert_array_equal(torch_logits(whole, tokens), torch_logits(parts[0], tokens))


@pytest.mark.parametrize(
    ("arch", "recipe", "reason"),
    [
        ("phi3", {}, "'phi3'"),
        ("qwen3moe", {}, "'qwen3moe'"),
        ("llama", {"n_expert": 4}, "ffn_gate_inp"),
        ("qwen2", {"fused_qkv": True}, "attn_qkv"),
        ("llama", {"rope_divisor": 2.0, "rope_scaling": gguf.RopeScalingType.YARN}, "'yarn'"),
    ],
)
def test_what_it_does_not_compute_is_refused_by_name(tmp_path, arch, recipe, reason):
    path = make_gguf(tmp_path / "other.gguf", arch, **recipe)
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        read_hyper(read_source(path))

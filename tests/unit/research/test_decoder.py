"""The decoder in torch against the backend's logits; what it does not compute is refused."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from pop_base.errors import UnsupportedArchitectureError
from pop_converter.gguf.source import read_source
from pop_local.research.hyper import Hyper, Rope, read_hyper
from support.calls import opened, prompt
from support.synthetic import add_tensor, make_gguf, make_split

pytest.importorskip("torch")
from support.decoders import backend_logits, mean_kl, torch_logits

# For random models whose weights are F16 or Q8_0; a wrong key moves them by a hundred times that.
NOISE = 1e-4
TINY: dict[str, dict[str, object]] = {
    "llama": {"rope_factors": True, "head_arrays": True},
    "llama-scaled": {"rope_divisor": 2.0, "tied_output": True},
    "llama-biases": {"qkv_bias": True, "type": GGMLQuantizationType.Q8_0},
    "qwen2": {},
    "qwen3": {},
    "gemma3": {"swa_period": 3},
}


def tiny(folder: Path, name: str) -> Path:
    return make_gguf(folder / f"{name}.gguf", name.split("-")[0], n_layer=4, **TINY[name])


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_the_backends(tmp_path, name):
    path, tokens = tiny(tmp_path, name), prompt(48)
    expected = backend_logits(opened(path), tokens)
    assert mean_kl(expected, torch_logits(path, tokens)) < NOISE


def to_half(hyper: Hyper) -> tuple[Rope, ...]:
    return tuple(replace(rope, scale=rope.scale / 2) for rope in hyper.ropes)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("llama", lambda h: {"interleaved": False}),
        ("llama-scaled", lambda h: {"ropes": to_half(h)}),
        ("qwen3", lambda h: {"interleaved": True}),
        ("qwen2", lambda h: {"attention_scale": 2 * h.attention_scale}),
        ("gemma3", lambda h: {"windows": (0,) * 4}),
        ("gemma3", lambda h: {"ropes": to_half(h)}),
        ("gemma3", lambda h: {"gelu": False}),
        ("gemma3", lambda h: {"embedding_scale": 1.0}),
    ],
)
def test_wrong_settings_change_the_logits(tmp_path, name, wrong):
    path, tokens = tiny(tmp_path, name), prompt(48)
    change = wrong(read_hyper(read_source(path)))
    changed = torch_logits(path, tokens, **change)
    assert mean_kl(torch_logits(path, tokens), changed) > 10 * NOISE


def test_split_model_is_read_from_all_its_parts(tmp_path):
    whole = make_gguf(tmp_path / "whole.gguf", "llama")
    parts = make_split(tmp_path / "split.gguf", "llama", max_tensors=20)
    tokens = prompt(8)
    np.testing.assert_array_equal(torch_logits(whole, tokens), torch_logits(parts[0], tokens))


@pytest.mark.parametrize(
    ("arch", "recipe", "reason"),
    [
        ("phi3", {}, "'phi3'"),
        ("gemma2", {}, "'gemma2'"),
        ("gemma3", {"caps": (0.0, 30.0)}, "capped logits"),
        ("qwen3moe", {}, "'qwen3moe'"),
        ("llama", {"n_expert": 4}, "ffn_gate_inp"),
        ("qwen2", {"fused_qkv": True}, "attn_qkv"),
        ("llama", {"rope_divisor": 2.0, "rope_scaling": gguf.RopeScalingType.YARN}, "'yarn'"),
    ],
)
def test_unsupported_models_are_refused_by_name(tmp_path, arch, recipe, reason):
    path = make_gguf(tmp_path / "other.gguf", arch, **recipe)
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        read_hyper(read_source(path))


def test_bias_of_the_head_is_refused(tmp_path):
    path = make_gguf(tmp_path / "plain.gguf", "qwen2")
    biased = add_tensor(path, tmp_path / "biased.gguf", "output.bias", np.zeros(8, np.float32))
    with pytest.raises(UnsupportedArchitectureError, match=r"the tensor output\.bias"):
        read_hyper(read_source(biased))

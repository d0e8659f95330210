"""Read the shapes of all architectures, and refuse invalid models."""

import struct
from dataclasses import replace

import gguf
import pytest

from pop_base.errors import FormatError, PlanError, UnsupportedArchitectureError
from pop_converter.architecture.arch_keys import require_loadable
from pop_converter.gguf.header import read_header
from pop_converter.gguf.source import read_source
from pop_converter.popfile.pruning_plan import make_plan, require_fit
from pop_converter.projection import Projection
from pop_local.measure.budget import boundaries
from support.shapes import read_shape
from support.synthetic import DEFAULTS, add_keys, make_gguf, make_split, renamed


@pytest.mark.parametrize("arch", sorted(DEFAULTS))
@pytest.mark.parametrize("overrides", [{}, {"fused_qkv": True}, {"tied_output": True}])
def test_reads_sizes_of_each_architecture(tmp_path, arch, overrides):
    recipe = replace(DEFAULTS[arch], **overrides)
    shape = read_shape(make_gguf(tmp_path / "model.gguf", arch, **overrides))
    n_q, n_kv = recipe.n_head * recipe.head_dim, recipe.n_head_kv * recipe.head_dim
    n_ffn = 3 * recipe.n_embd * recipe.n_ff * max(recipe.n_expert, 1)
    n_ffn += recipe.n_embd * recipe.n_expert
    layers = recipe.n_layer
    assert (shape.arch, shape.n_layer, shape.n_embd) == (arch, layers, recipe.n_embd)
    assert shape.n_vocab == recipe.n_vocab
    assert shape.n_q == shape.n_heads_out == (n_q,) * layers
    assert shape.n_k == shape.n_v == (n_kv,) * layers
    # OLMo 2 normalizes only the output of its FFN.
    is_read = not recipe.n_expert and arch != "olmo2"
    assert shape.n_neurons == (recipe.n_ff if is_read else 0,) * layers
    assert shape.n_weights == (2 * recipe.n_embd * (n_q + n_kv) + n_ffn,) * layers
    assert shape.is_fused == (recipe.fused_qkv,) * layers
    assert bool(shape.no_refill) == (len(recipe.rope_sections) > 0)
    assert (shape.exact, any(shape.is_recurrent)) == (0, False)
    # OLMo 2 normalizes the output of attention, not its input.
    fits = [] if arch == "olmo2" else list(range(layers - 1))
    assert [boundary for boundary in range(layers) if shape.fits(boundary)] == fits


@pytest.mark.parametrize(
    ("arch", "period", "full_layers"),
    [
        ("gemma2", 0, {1, 3, 5, 7}),
        ("gemma2", 4, {3, 7}),
        ("gemma3", 0, {5}),
        ("gemma3", 3, {2, 5}),
        ("gemma3", 1, set(range(8))),
        ("llama", 0, set(range(8))),
        ("phi3", 0, set(range(8))),
    ],
)
def test_reads_sliding_window_pattern(tmp_path, arch, period, full_layers):
    path = make_gguf(tmp_path / "model.gguf", arch, swa_period=period, swa_window=16)
    windows = read_shape(path).windows
    assert {layer for layer, window in enumerate(windows) if window == 0} == full_layers
    assert set(windows) <= {0, 16}


def test_reads_sliding_window_of_each_layer(tmp_path):
    pattern = [True, False, False, True, True, True, True, False]
    path = make_gguf(tmp_path / "model.gguf", "gemma3", swa_pattern=pattern)
    assert read_shape(path).windows == tuple(16 * flag for flag in pattern)


def test_unused_window_is_ignored(tmp_path):
    """Ignore the windows of llama and phi3, as llama.cpp does."""
    for arch in ("llama", "phi3"):
        path = make_gguf(tmp_path / f"{arch}.gguf", arch)
        windowed = add_keys(
            path, tmp_path / f"{arch}w.gguf", **{f"{arch}__attention__sliding_window": 16}
        )
        assert set(read_shape(windowed).windows) == {0}


def test_too_many_deepstack_layers_are_refused(tmp_path):
    path = make_gguf(tmp_path / "model.gguf", "qwen3vl", n_deepstack=8)
    with pytest.raises(FormatError, match="too many layers add image features: 8 of 8"):
        read_shape(path)


def test_reads_head_counts_of_each_layer(tmp_path):
    plain = read_shape(make_gguf(tmp_path / "plain.gguf", "llama"))
    assert read_shape(make_gguf(tmp_path / "arrays.gguf", "llama", head_arrays=True)) == plain


def test_split_model_has_the_same_shape(tmp_path):
    whole = make_gguf(tmp_path / "whole.gguf", "qwen3moe")
    parts = make_split(tmp_path / "split.gguf", "qwen3moe", max_tensors=20, empty_first=True)
    assert len(parts) > 2
    assert read_shape(parts[0]) == read_shape(whole)


@pytest.mark.parametrize("arch", ["bert", "dream", "eagle3", "clip", "t5"])
def test_unsupported_architectures_are_refused(tmp_path, arch):
    path = renamed(make_gguf(tmp_path / "model.gguf", "llama"), tmp_path, arch)
    with pytest.raises(UnsupportedArchitectureError, match=f"{arch}.*cannot be pruned"):
        read_shape(path)


def test_unknown_architecture_is_supported(tmp_path):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    assert read_shape(renamed(path, tmp_path, "novel")) == replace(read_shape(path), arch="novel")


def test_looped_model_is_refused(tmp_path):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    with pytest.raises(UnsupportedArchitectureError, match="multiple times"):
        read_shape(add_keys(path, tmp_path / "looped.gguf", llama__num_loops=2))


@pytest.mark.parametrize(
    ("n_layer", "says"), [(3, "no tensors for layer 2"), (0, "0 layers"), (2**31, "layers")]
)
def test_missing_layers_are_refused(tmp_path, n_layer, says):
    path = make_gguf(tmp_path / "model.gguf", "llama", n_layer=2, n_embd=64, n_ff=64)
    raw = path.read_bytes()
    count = b"llama.block_count" + struct.pack("<I", gguf.GGUFValueType.UINT32)
    at = raw.index(count) + len(count)
    path.write_bytes(raw[:at] + struct.pack("<I", n_layer) + raw[at + 4 :])
    with pytest.raises(FormatError, match=says):
        read_shape(path)


def test_incomplete_models_are_refused(tmp_path):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    adapter = add_keys(path, tmp_path / "lora.gguf", general__type="adapter")
    with pytest.raises(FormatError, match="a LoRA adapter"):
        read_shape(adapter)
    header = read_header(path)
    vocabulary = tmp_path / "vocabulary.gguf"
    raw = bytearray(path.read_bytes()[: header.keys_end])
    raw[8:16] = struct.pack("<Q", 0)
    vocabulary.write_bytes(raw.ljust(len(raw) + 64, b"\0"))
    with pytest.raises(FormatError, match="a vocabulary but no layers"):
        read_shape(vocabulary)


def test_single_part_may_have_any_name(tmp_path):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    single = add_keys(path, tmp_path / "renamed.gguf", split__no=0, split__count=1)
    assert read_shape(single) == read_shape(path)
    assert read_source(single).name == "renamed.gguf"


def test_deepstack_layers_are_kept(tmp_path):
    shape = read_shape(make_gguf(tmp_path / "m.gguf", "qwen3vl"))
    assert shape.n_deepstack == 3
    assert make_plan(shape, boundary=3).boundary == min(boundaries(shape, 8)) == 3
    with pytest.raises(PlanError, match="the first 3 layers add image"):
        make_plan(shape, boundary=2)


def test_unfittable_layers_are_refused(tmp_path):
    shape = read_shape(make_gguf(tmp_path / "model.gguf", "llama"))
    hybrid = replace(shape, is_fittable=(False,) * 4 + (True,) * 4)
    early, late, last = (
        make_plan(hybrid, boundary=b, projection=Projection.FITTED) for b in (3, 4, 7)
    )
    for plans in ([early, late], [last]):
        require_fit(plans)
    with pytest.raises(PlanError, match="a fit requires boundary 4 or higher"):
        require_fit([early])


@pytest.mark.parametrize(
    ("arch", "key", "kind", "value"),
    [
        ("llama", "block_count", "<I", 513),
        ("llama", "attention.head_count", "<I", 0),
        ("qwen3moe", "expert_count", "<I", 1025),
        ("qwen3moe", "expert_count", "<I", 0),
        ("qwen3moe", "expert_used_count", "<I", 0),
        ("qwen3moe", "expert_used_count", "<I", 9),
        ("llama", "attention.layer_norm_rms_epsilon", "<f", -1.0),
        ("llama", "attention.layer_norm_rms_epsilon", "<f", float("nan")),
        ("qwen2vl", "rope.dimension_sections", "<I", 100),
        ("qwen2", "rope.dimension_count", "<I", 16),
        ("qwen2", "attention.key_length", "<I", 16),
        ("qwen3moe", "rope.dimension_count", "<I", 0),
    ],
)
def test_numbers_that_abort_llama_cpp_are_refused(tmp_path, arch, key, kind, value):
    path = make_gguf(tmp_path / "model.gguf", arch)
    require_loadable(read_header(path))
    end, data = read_header(path).keys[f"{arch}.{key}"].end, path.read_bytes()
    path.write_bytes(data[: end - 4] + struct.pack(kind, value) + data[end:])
    named = "expert" if "expert" in key else f"{key} has"
    with pytest.raises(FormatError, match=f"cannot be opened: the key {arch}.{named}"):
        require_loadable(read_header(path))


def test_unused_numbers_are_accepted(tmp_path):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    for key in ("rope__dimension_sections", "ssm__inner_size"):
        require_loadable(read_header(add_keys(path, tmp_path / "a.gguf", **{f"llama__{key}": 99})))

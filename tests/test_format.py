"""Reading GGUF headers, POP keys and model shapes, and refusing what is not right."""

import random
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import synthetic
from pop_converter.content import copy_data, read_content
from pop_converter.errors import FormatError, UnsupportedArchitectureError
from pop_converter.format import ARCHITECTURES, PopMeta, encode_keys, read_pop_meta, read_shape
from pop_converter.header import MAX_KEPT_ITEMS, Array, read_header
from pop_converter.source import read_source
from synthetic import DEFAULTS, add_keys, make_gguf, make_split

SMALL = {"n_layer": 2, "n_embd": 64, "n_ff": 64}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("format") / "tiny.gguf", "llama", **SMALL)


# --- the container


@pytest.mark.parametrize("arch", DEFAULTS)
def test_header_is_what_the_gguf_package_reads(tmp_path, arch):
    path = make_gguf(tmp_path / "model.gguf", arch, head_arrays=True, **SMALL)
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if "GGUF." not in name}
    assert list(ours.keys) == list(fields)
    for name, field in fields.items():
        value = ours.get(name)
        if not isinstance(value, Array):
            assert value == field.contents(), name
            continue
        assert value.length == len(field.data), name
        if value.items is not None:
            assert list(value.items) == field.contents(), name
    assert [(t.name, t.dims, t.type, t.size_bytes) for t in ours.tensors] == [
        (t.name, tuple(t.shape), t.tensor_type, t.n_bytes) for t in theirs.tensors
    ]
    assert [ours.data_start + t.offset for t in ours.tensors] == [
        t.data_offset for t in theirs.tensors
    ]


def test_long_arrays_are_counted_but_not_kept(tmp_path):
    n_vocab = MAX_KEPT_ITEMS + 1
    path = make_gguf(tmp_path / "model.gguf", "llama", n_vocab=n_vocab, **SMALL)
    assert read_header(path).get("tokenizer.ggml.scores") == Array(n_vocab, None)


def _damaged(path: Path, tmp_path: Path, at: int, raw: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[at : at + len(raw)] = raw
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    return bad


@pytest.mark.parametrize(
    ("at", "raw", "says"),
    [
        (0, b"GGML", "not a GGUF"),
        (4, struct.pack(">I", 3), "big-endian"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack("<I", 4), "version 4"),
        (8, struct.pack("<Q", 2**60), "cut short|not a valid"),
        (16, struct.pack("<Q", 2**60), "cut short|not a valid"),
    ],
)
def test_bad_start(tiny, tmp_path, at, raw, says):
    with pytest.raises(FormatError, match=says):
        read_header(_damaged(tiny, tmp_path, at, raw))


@pytest.mark.parametrize("name", ["empty.gguf", "missing.gguf", "folder.gguf", "text.gguf"])
def test_what_is_not_a_model_at_all(tmp_path, name):
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "text.gguf").write_text("# Not a model\n")
    with pytest.raises(FormatError, match=name):
        read_header(tmp_path / name)


def test_cut_short_anywhere(tiny, tmp_path):
    data = tiny.read_bytes()
    header = read_header(tiny)
    last = header.tensors[-1]
    end = header.data_start + last.offset + last.size_bytes
    rng = random.Random(0)
    cuts = {4, 7, 8, 23, 24, header.keys_end, header.tensors_end, header.data_start, end - 1}
    cuts |= {rng.randrange(8, end) for _ in range(60)}
    bad = tmp_path / "bad.gguf"
    for cut in sorted(cuts):
        bad.write_bytes(data[:cut])
        with pytest.raises(FormatError, match="cut short"):
            read_header(bad)
    bad.write_bytes(data[:end])
    assert read_header(bad).tensors == header.tensors


def test_damaged_headers_never_crash(tiny, tmp_path):
    """Random damage is either harmless (a value changed) or a FormatError."""
    header = read_header(tiny)
    data = bytearray(tiny.read_bytes())
    bad = tmp_path / "bad.gguf"
    rng = random.Random(0)
    n_refused = 0
    for _ in range(200):
        at = rng.randrange(8, header.tensors_end)
        old, data[at] = data[at], rng.randrange(256)
        bad.write_bytes(data)
        data[at] = old
        try:
            read_shape(bad)
            read_pop_meta(bad)
        except (FormatError, UnsupportedArchitectureError):
            n_refused += 1
    assert n_refused


def test_doubled_keys_and_odd_alignment(tiny, tmp_path):
    with pytest.raises(FormatError, match=r"two keys named general\.name"):
        read_header(add_keys(tiny, tmp_path / "doubled.gguf", general__name="again"))
    with pytest.raises(FormatError, match="power of two"):
        read_header(add_keys(tiny, tmp_path / "odd.gguf", general__alignment=48))


# --- POP keys

META = PopMeta("FS", source_name="tiny.gguf", source_sha256="0" * 64, tool="test")


def _as_keys(**changes: object) -> dict[str, int | str]:
    keys: dict[str, int | str] = {
        "pop__version": 1,
        "pop__schedule": META.schedule,
        "pop__projection": "own",
        "pop__sink_tokens": 1,
        "pop__tail_tokens": 16,
    }
    keys |= {f"pop__{name}": value for name, value in changes.items()}  # type: ignore[misc]
    return {name: value for name, value in keys.items() if value is not None}


def test_pop_keys_are_read_as_written(tiny, tmp_path):
    path = add_keys(tiny, tmp_path / "pop.gguf", **_as_keys(min_prompt=99))
    meta = read_pop_meta(path)
    assert meta == PopMeta("FS", min_prompt=99)
    assert (meta.boundary, meta.n_layer) == (1, 2)
    assert read_pop_meta(tiny) is None


def test_encoded_keys_are_ordinary_gguf(tiny, tmp_path):
    path = tmp_path / "pop.gguf"
    fields = _written(tiny, path, META)
    assert fields["pop.version"].types == [gguf.GGUFValueType.UINT32]
    assert fields["pop.schedule"].contents() == "FS"
    assert fields["pop.projection"].contents() == "own"
    assert fields["pop.sink_tokens"].contents() == 1
    assert fields["pop.tail_tokens"].contents() == 16
    assert fields["pop.source.sha256"].contents() == "0" * 64
    assert read_pop_meta(path) == META


def test_optional_keys_have_defaults(tiny, tmp_path):
    keys = _as_keys(sink_tokens=None, tail_tokens=None, projection=None)
    assert read_pop_meta(add_keys(tiny, tmp_path / "pop.gguf", **keys)) == PopMeta("FS")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 2}, "version 2"),
        ({"version": "1"}, "version 1"),
        ({"version": None}, "version None"),
        ({"schedule": None}, "no pop.schedule"),
        ({"schedule": 7}, "pop.schedule is not of type str"),
        ({"schedule": "FFS"}, "2 layers"),
        ({"schedule": "FA"}, "letters A"),
        ({"schedule": "SF"}, "F's followed by S's"),
        ({"schedule": "FF"}, "F's followed by S's"),
        ({"schedule": "SS"}, "F's followed by S's"),
        ({"schedule": ""}, "F's followed by S's"),
        ({"schedule": "FS\n"}, "letters"),
        ({"projection": "magic"}, "magic"),
        ({"tail_tokens": "16"}, "pop.tail_tokens is not of type int"),
    ],
)
def test_pop_keys_that_do_not_fit(tiny, tmp_path, changes, says):
    path = add_keys(tiny, tmp_path / "pop.gguf", **_as_keys(**changes))
    with pytest.raises(FormatError, match=says):
        read_pop_meta(path)


def _written(src: Path, dst: Path, meta: PopMeta) -> dict[str, gguf.ReaderField]:
    content = read_content(read_source(src), without="pop.")
    with dst.open("wb") as file:
        file.write(content.with_keys(encode_keys(meta)).header)
        copy_data(content, b"", file.write, lambda n_bytes: None)
    return gguf.GGUFReader(dst).fields


# --- shapes


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
@pytest.mark.parametrize("overrides", [{}, {"fused_qkv": True}, {"tied_output": True}])
def test_shape(tmp_path, arch, overrides):
    recipe = replace(DEFAULTS[arch], **overrides)
    shape = read_shape(make_gguf(tmp_path / "model.gguf", arch, **overrides))
    n_q, n_kv = recipe.n_head * recipe.head_dim, recipe.n_head_kv * recipe.head_dim
    ffn_macs = 3 * recipe.n_embd * recipe.n_ff
    if recipe.n_expert:
        ffn_macs = ffn_macs * recipe.n_expert_used + recipe.n_embd * recipe.n_expert
    layers = recipe.n_layer
    assert (shape.arch, shape.n_layer, shape.n_embd) == (arch, layers, recipe.n_embd)
    assert shape.n_vocab == recipe.n_vocab
    assert shape.attn_proj_macs == (2 * recipe.n_embd * n_q,) * layers
    assert shape.kv_macs == (2 * recipe.n_embd * n_kv,) * layers
    assert shape.ffn_macs == (ffn_macs,) * layers
    assert shape.attn_dim == (2 * n_q,) * layers
    assert shape.head_macs == recipe.n_embd * recipe.n_vocab


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
def test_sliding_windows(tmp_path, arch, period, full_layers):
    path = make_gguf(tmp_path / "model.gguf", arch, swa_period=period, swa_window=16)
    windows = read_shape(path).swa_window
    assert {layer for layer, window in enumerate(windows) if window == 0} == full_layers
    assert set(windows) <= {0, 16}


def test_sliding_window_flag_for_each_layer(tmp_path):
    pattern = [True, False, False, True, True, True, True, False]
    path = make_gguf(tmp_path / "model.gguf", "gemma3", swa_pattern=pattern)
    assert read_shape(path).swa_window == tuple(16 * flag for flag in pattern)


def test_window_that_a_model_does_not_have(tmp_path):
    """llama.cpp reads no window for llama and switches off phi3's."""
    for arch in ("llama", "phi3"):
        path = make_gguf(tmp_path / f"{arch}.gguf", arch)
        windowed = add_keys(
            path, tmp_path / f"{arch}w.gguf", **{f"{arch}__attention__sliding_window": 16}
        )
        assert set(read_shape(windowed).swa_window) == {0}


def test_head_counts_for_each_layer(tmp_path):
    plain = read_shape(make_gguf(tmp_path / "plain.gguf", "llama"))
    assert read_shape(make_gguf(tmp_path / "arrays.gguf", "llama", head_arrays=True)) == plain


def test_split_model_has_the_shape_of_the_whole(tmp_path):
    whole = make_gguf(tmp_path / "whole.gguf", "qwen3moe")
    parts = make_split(tmp_path / "split.gguf", "qwen3moe", max_tensors=20, empty_first=True)
    assert len(parts) > 2
    assert read_shape(parts[0]) == read_shape(whole)


def test_real_models(smollm2, gemma):
    shape = read_shape(smollm2)
    assert (shape.arch, shape.n_layer, shape.n_embd, shape.n_vocab) == ("llama", 30, 576, 49152)
    assert shape.kv_macs[0] == 2 * 576 * 3 * 64
    assert shape.attn_dim[0] == 9 * 2 * 64
    shape = read_shape(gemma)
    assert (shape.arch, shape.n_layer, shape.n_vocab) == ("gemma3", 18, 262144)
    assert [layer for layer, window in enumerate(shape.swa_window) if window == 0] == [5, 11, 17]
    assert max(shape.swa_window) == 512


def test_unsupported_architecture_is_named(tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match="olmo2") as raised:
        read_shape(make_gguf(tmp_path / "model.gguf", "olmo2"))
    assert all(arch in raised.value.hint for arch in ARCHITECTURES)


@pytest.mark.parametrize(
    ("n_layer", "says"), [(3, "no tensors for layer 2"), (0, "0 layers"), (2**31, "layers")]
)
def test_layers_that_are_not_there(tiny, tmp_path, n_layer, says):
    count = b"llama.block_count" + struct.pack("<I", gguf.GGUFValueType.UINT32)
    at = tiny.read_bytes().index(count) + len(count)
    with pytest.raises(FormatError, match=says):
        read_shape(_damaged(tiny, tmp_path, at, struct.pack("<I", n_layer)))


# --- the helper that the oracle rests on


def test_zero_deep_copy_clears_deep_outputs_only(tmp_path, smollm2):
    path = synthetic.zero_deep_copy(smollm2, tmp_path / "zeroed.gguf", 20)
    before, after = gguf.GGUFReader(smollm2), gguf.GGUFReader(path)
    for old, new in zip(before.tensors, after.tensors, strict=True):
        prefix, *rest = old.name.split(".")
        cleared = prefix == "blk" and int(rest[0]) >= 20 and rest[1] in synthetic.DEEP_OUTPUTS
        if cleared:
            assert old.data.any()
            assert not gguf.quants.dequantize(new.data, new.tensor_type).any(), old.name
        else:
            assert (old.data == new.data).all(), old.name

"""Read GGUF headers and POP keys, and refuse invalid files."""

import math
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from pop_base.errors import FormatError, UnsupportedArchitectureError
from pop_converter.gguf import header as header_module
from pop_converter.gguf.content import copy_data, read_content
from pop_converter.gguf.header import MAX_KEPT_ITEMS, read_header
from pop_converter.gguf.source import read_source
from pop_converter.popfile.format import Measured, PopMeta, encode_keys
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.research.hyper import read_hyper
from support.shapes import read_pop_meta, read_shape
from support.shared_kv import make_shared
from support.synthetic import DEFAULTS, add_keys, make_gguf

SMALL = {"n_layer": 2, "n_embd": 64, "n_ff": 64}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("format") / "tiny.gguf", "llama", **SMALL)


# --- container


@pytest.mark.parametrize("arch", DEFAULTS)
def test_header_equals_the_gguf_packages(tmp_path, arch):
    path = make_gguf(tmp_path / "model.gguf", arch, head_arrays=True, **SMALL)
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if "GGUF." not in name}
    assert list(ours.keys) == list(fields)
    for name, field in fields.items():
        value = ours.get(name)
        if not isinstance(value, tuple):
            assert value == field.contents(), name
            continue
        if value:
            assert list(value) == field.contents(), name
    assert [(t.name, t.dims, t.type, t.size_bytes) for t in ours.tensors] == [
        (t.name, tuple(t.shape), t.tensor_type, t.n_bytes) for t in theirs.tensors
    ]
    assert [ours.data_start + t.offset for t in ours.tensors] == [
        t.data_offset for t in theirs.tensors
    ]


def test_long_arrays_are_dropped(tmp_path):
    n_vocab = MAX_KEPT_ITEMS + 1
    path = make_gguf(tmp_path / "model.gguf", "llama", n_vocab=n_vocab, **SMALL)
    assert read_header(path).get("tokenizer.ggml.scores") == ()


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
        (8, struct.pack("<Q", 2**60), "truncated|not a valid"),
        (16, struct.pack("<Q", 2**60), "truncated|not a valid"),
    ],
)
def test_invalid_file_headers_are_refused(tiny, tmp_path, at, raw, says):
    with pytest.raises(FormatError, match=says):
        read_header(_damaged(tiny, tmp_path, at, raw))


@pytest.mark.parametrize("name", ["empty.gguf", "missing.gguf", "folder.gguf", "text.gguf"])
def test_non_models_are_refused(tmp_path, name):
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "text.gguf").write_text("# Not a model\n")
    with pytest.raises(FormatError, match=name):
        read_header(tmp_path / name)


def test_truncated_headers_are_refused(tiny, tmp_path):
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
        with pytest.raises(FormatError, match="truncated"):
            read_header(bad)
    bad.write_bytes(data[:end])
    assert read_header(bad).tensors == header.tensors


def test_damaged_headers_never_crash(tiny, tmp_path):
    """Expect random damage to change a value or to raise FormatError."""
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


def test_duplicate_keys_and_odd_alignments_are_refused(tiny, tmp_path):
    with pytest.raises(FormatError, match=r"two keys are named general\.name"):
        read_header(add_keys(tiny, tmp_path / "doubled.gguf", general__name="again"))
    with pytest.raises(FormatError, match="power of two"):
        read_header(add_keys(tiny, tmp_path / "odd.gguf", general__alignment=48))


@pytest.mark.parametrize("alignment", [1, 8, 16, 1 << 21, "32"])
def test_unsupported_alignments_are_refused(tiny, tmp_path, alignment):
    with pytest.raises(FormatError, match="alignment"):
        read_header(add_keys(tiny, tmp_path / "bad.gguf", general__alignment=alignment))


def test_header_size_is_limited(tiny, tmp_path, monkeypatch):
    end = read_header(tiny).tensors_end
    monkeypatch.setattr(header_module, "MAX_HEADER_BYTES", end)
    read_header(tiny)
    monkeypatch.setattr(header_module, "MAX_HEADER_BYTES", end - 1)
    with pytest.raises(FormatError, match=f"the header exceeds {end - 1:,} bytes"):
        read_header(tiny)


@pytest.mark.parametrize("at", [8, 16], ids=["tensors", "keys"])
def test_sparse_file_is_not_read_completely(tiny, tmp_path, at):
    bad = _damaged(tiny, tmp_path, at, struct.pack("<Q", 2**40))
    with bad.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(FormatError, match=r"valid GGUF file: the number of .* \(1,099.* exceeds"):
        read_header(bad)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 4.0])
def test_head_counts_are_whole_numbers(tmp_path, value):
    path = make_gguf(tmp_path / "model.gguf", "llama", head_arrays=True, **SMALL)
    end = read_header(path).keys["llama.attention.head_count"].end
    # An array: item type, number of items, items.
    start = end - struct.calcsize("<IQ2i")
    counts = struct.pack("<IQ2f", gguf.GGUFValueType.FLOAT32, 2, value, value)
    with pytest.raises(FormatError, match=r"llama\.attention\.head_count has an invalid value: "):
        read_shape(_damaged(path, tmp_path, start, counts))


@pytest.mark.parametrize(
    ("key", "number", "reason"),
    [
        ("embedding_length", 2**31, r"llama\.embedding_length has an invalid value: "),
        ("embedding_length", 2**32 - 1, r"llama\.embedding_length has an invalid value: "),
        ("context_length", 2**27 + 1, "invalid context length: 134217729"),
        ("context_length", 2**32 - 1, "invalid context length: 4294967295"),
    ],
)
def test_model_numbers_have_a_range(tiny, tmp_path, key, number, reason):
    end = read_header(tiny).keys[f"llama.{key}"].end
    path = _damaged(tiny, tmp_path, end - 4, struct.pack("<I", number))
    with pytest.raises(FormatError, match=reason):
        read_shape(path)
        PopModel(EngineOptions.of(path, n_ctx=64))


@pytest.mark.parametrize("arch", ["llama", "gemma4"])
def test_zero_embedding_length_is_refused(tmp_path, arch):
    make = make_shared if arch == "gemma4" else make_gguf
    path = make(tmp_path / "model.gguf", arch)
    end = read_header(path).keys[f"{arch}.embedding_length"].end
    with pytest.raises(FormatError, match="the embedding length is 0"):
        read_shape(_damaged(path, tmp_path, end - 4, struct.pack("<I", 0)))


@pytest.mark.parametrize("name", ["head_count", "key_length", "value_length"])
def test_zero_head_size_is_refused(tiny, tmp_path, name):
    end = read_header(tiny).keys[f"llama.attention.{name}"].end
    with pytest.raises(FormatError, match=r"heads, each with \d+ K values and \d+ V values"):
        read_hyper(read_source(_damaged(tiny, tmp_path, end - 4, struct.pack("<I", 0))))


def test_long_block_numbers_are_ignored(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "bad.gguf", "llama")
    writer.add_block_count(2)
    writer.add_tensor(f"blk.{'9' * 5000}.attn_q.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match="no tensors for layer 0"):
        read_shape(tmp_path / "bad.gguf")


# --- POP keys

LOOKUPS = Measured(lookups_n=200, lookups_full=180, lookups_lost=2, lookups_logprob_lost=0.25)
META = PopMeta("FS", source_name="tiny.gguf", source_sha256="0" * 64, tool="test", measured=LOOKUPS)


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


def test_pop_keys_round_trip(tiny, tmp_path):
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


def test_schedule_excludes_mtp_layers(tiny, tmp_path):
    nextn = {"llama__nextn_predict_layers": 1}
    three = make_gguf(tmp_path / "three.gguf", "llama", **{**SMALL, "n_layer": 3})
    path = add_keys(three, tmp_path / "pop.gguf", **_as_keys(), **nextn)
    assert read_pop_meta(path) == PopMeta("FS")
    assert read_shape(path).n_layer == 2
    with pytest.raises(FormatError, match="has 1 layers"):
        read_pop_meta(add_keys(tiny, tmp_path / "wrong.gguf", **_as_keys(), **nextn))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 2}, "version 2"),
        ({"version": "1"}, "version 1"),
        ({"version": None}, "version None"),
        ({"schedule": None}, "no pop.schedule"),
        ({"schedule": 7}, "pop.schedule is not of type str"),
        ({"schedule": "FFS"}, "2 layers"),
        ({"schedule": "FA"}, "one or more F's"),
        ({"schedule": "SF"}, "one or more F's"),
        ({"schedule": "FF"}, "one or more F's"),
        ({"schedule": "SS"}, "one or more F's"),
        ({"schedule": ""}, "one or more F's"),
        ({"schedule": "FS\n"}, "one or more F's"),
        ({"projection": "magic"}, "magic"),
        ({"deep_rows": "all"}, "pop.deep_rows has an unknown value: 'all'"),
        ({"tail_tokens": "16"}, "pop.tail_tokens is not of type int"),
        ({"min_prompt": 2**31}, "pop.min_prompt has an invalid value: 2,147,483,648"),
        ({"sink_tokens": 2**32 - 1}, "pop.sink_tokens has an invalid value: 4,294,967,295"),
        ({"source__name": "x" * 256}, "pop.source.name is longer than 255 bytes"),
        ({"tool": "x" * 70_000}, "pop.tool is longer than 65,536 bytes"),
    ],
)
def test_invalid_pop_keys_are_refused(tiny, tmp_path, changes, says):
    path = add_keys(tiny, tmp_path / "pop.gguf", **_as_keys(**changes))
    with pytest.raises(FormatError, match=says):
        read_pop_meta(path)


def _written(src: Path, dst: Path, meta: PopMeta) -> dict[str, gguf.ReaderField]:
    content = read_content(read_source(src), without="pop.")
    with dst.open("wb") as file:
        file.write(content.with_keys(encode_keys(meta)).header)
        copy_data(content, b"", file.write, lambda n_bytes: None)
    return gguf.GGUFReader(dst).fields


@pytest.mark.parametrize("wrong", ["I16", "I32", "Q8_1", "Q8_K"])
def test_weights_without_a_matrix_product_are_refused(tmp_path, wrong):
    """llama.cpp would open such a file and crash at the first token (found by fuzzing)."""
    path = make_gguf(tmp_path / "model.gguf", "llama")
    content, name = bytearray(path.read_bytes()), b"blk.0.ffn_up.weight"
    kind = content.index(name) + len(name) + 4 + 2 * 8
    assert struct.unpack_from("<I", content, kind) == (gguf.GGMLQuantizationType.F16,)
    struct.pack_into("<I", content, kind, gguf.GGMLQuantizationType[wrong])
    path.write_bytes(content)
    with pytest.raises(FormatError, match=rf"ffn_up\.weight has type {wrong}"):
        read_header(path)

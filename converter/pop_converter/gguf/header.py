"""Read the keys and the tensor table in a GGUF file's header.

`gguf.GGUFReader` builds two numpy arrays for each vocabulary entry, which takes too much time and
memory (Gemma-3-270M: 12 s, 680 MB). A GGUF file consists of a magic number, a version, counts,
keys, tensors, padding, and data, in that order (ggml/docs/gguf.md).
"""

import math
import mmap
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from pop_base.errors import FormatError, TruncatedError
from pop_base.files import mapped

TO_GGUF = "pass the model's GGUF file, or create it with llama.cpp's convert_hf_to_gguf.py"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# These limits far exceed any model's header, in which the vocabulary takes a few megabytes.
MAX_HEADER_BYTES = 1 << 28
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 18
_MAX_NAME_BYTES = (1 << 16) - 1
# llama.cpp reads tensors in place, with vectors of MIN_ALIGNMENT bytes.
MIN_ALIGNMENT, MAX_ALIGNMENT = 32, 1 << 20
# Longer arrays belong to vocabularies, since arrays with one item per layer have up to 512 items.
MAX_KEPT_ITEMS = 1024

_SCALARS: dict[int, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_MAX_DIMS = 4
# (elements, bytes) of a block by ggml type. The gguf package lacks Q2_0 (42).
BLOCK_SIZES = {42: (64, 18)} | {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
# llama.cpp loads weights of these types, but crashes at the first matrix product.
_WITHOUT_PRODUCT = (
    GGMLQuantizationType.I8,
    GGMLQuantizationType.I16,
    GGMLQuantizationType.I32,
    GGMLQuantizationType.I64,
    GGMLQuantizationType.F64,
    GGMLQuantizationType.Q8_1,
    GGMLQuantizationType.Q8_K,
)

Scalar = int | float | bool | str
# An array's items. Arrays of strings and arrays with more than MAX_KEPT_ITEMS items are left empty.
Array = tuple[Scalar, ...]


@dataclass(frozen=True)
class HeaderKey:
    """A key's value, GGUF `type`, and byte range in the file. The range includes the name."""

    value: Scalar | Array
    type: int
    start: int
    end: int


@dataclass(frozen=True)
class TensorInfo:
    """A row of the tensor table.

    `dims` use ggml's order (row length first). `offset` is in bytes from the start of the data.
    """

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int
    size_bytes: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.dims)


@dataclass(frozen=True)
class Header:
    """A GGUF file's header. Positions are in bytes from the start of the file."""

    path: Path
    version: int
    keys: Mapping[str, HeaderKey]
    keys_end: int
    tensors: tuple[TensorInfo, ...]
    tensors_end: int
    alignment: int
    data_start: int
    size_bytes: int

    def get(self, name: str) -> Scalar | Array | None:
        """Return a key's value, or None if the key is missing."""
        key = self.keys.get(name)
        return None if key is None else key.value

    def of_arch(self, name: str) -> Scalar | Array | None:
        """Return the value of an architecture key, such as `llama.context_length`."""
        return self.get(f"{self.get('general.architecture')}.{name}")


class _Cursor:
    """Reader for little-endian values.

    Methods raise FormatError if a read goes past the end of the file or the header's size limit.
    """

    def __init__(self, view: mmap.mmap, path: Path) -> None:
        self.view = view
        self.path = path
        self.at = 0
        self.end = min(len(view), MAX_HEADER_BYTES)

    def skip(self, n_bytes: int) -> int:
        """Advance by `n_bytes` and return the previous position."""
        start = self.at
        if n_bytes > self.end - start:
            raise self._too_short()
        self.at = start + n_bytes
        return start

    def _too_short(self) -> FormatError:
        if self.end < len(self.view):
            return corrupt(self.path, f"the header exceeds {self.end:,} bytes")
        return truncated(self.path, "the header is incomplete")

    def number(self, code: str) -> int:
        return int(self.numbers(code)[0])

    def numbers(self, codes: str) -> tuple[Any, ...]:
        layout = f"<{codes}"
        return struct.unpack_from(layout, self.view, self.skip(struct.calcsize(layout)))

    def count(self, most: int, what: str) -> int:
        """Read a 64-bit count. Raises FormatError if the count exceeds `most`."""
        count = self.number("Q")
        if count > most:
            raise corrupt(self.path, f"the {what} ({count:,}) exceeds {most:,}")
        return count

    def text(self) -> str:
        start = self.skip(self.count(_MAX_NAME_BYTES, "name length"))
        try:
            return self.view[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise corrupt(self.path, "a name is not valid UTF-8") from error

    def value(self, kind: int) -> Scalar | Array:
        length, is_array = 1, kind == GGUFValueType.ARRAY
        if is_array:
            kind, length = self.number("I"), self.number("Q")
        if kind == GGUFValueType.STRING and is_array:
            self._skip_texts(length)
            return ()
        if kind == GGUFValueType.STRING:
            start = self.skip(self.number("Q"))
            return self.view[start : self.at].decode(errors="replace")
        if kind not in _SCALARS:
            raise corrupt(self.path, f"a value has an unknown type: {kind}")
        code = _SCALARS[kind]
        if length > MAX_KEPT_ITEMS:
            self.skip(length * struct.calcsize(f"<{code}"))
            return ()
        items = self.numbers(f"{length}{code}")
        return items if is_array else cast(Scalar, items[0])

    def _skip_texts(self, count: int) -> None:
        # This loop is inlined for speed, since a vocabulary has up to half a million entries.
        view, at, end = self.view, self.at, self.end
        size = struct.Struct("<Q")
        for _ in range(count):
            if at + size.size > end:
                break
            at += size.size + size.unpack_from(view, at)[0]
        else:
            self.skip(at - self.at)
            return
        raise self._too_short()


def truncated(path: Path, detail: str) -> TruncatedError:
    return TruncatedError(f"{path} is truncated: {detail}", "download or copy the file again")


def corrupt(path: Path, detail: str) -> FormatError:
    return FormatError(f"{path} is not a valid GGUF file: {detail}", "download the file again")


def align(position: int, alignment: int) -> int:
    """Round a position up to the next multiple of the alignment."""
    return -(-position // alignment) * alignment


def read_header(path: Path) -> Header:
    """Read the keys and the tensor table from a little-endian GGUF file (version 2 or 3).

    Raises FormatError if the file is in a different format or is incomplete.
    """
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise FormatError(f"{path} is a pipe or a device, not a file", "pass a GGUF file")
        with mapped(path) as view:
            _check_magic(path, view[: len(MAGIC) + 4])
            return _scan(path, view)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error


def _check_magic(path: Path, start: bytes) -> None:
    if start[:4] != MAGIC:
        is_hf = path.suffix == ".safetensors"
        hint = TO_GGUF if is_hf else "pass a model in llama.cpp's format (NAME.gguf)"
        raise FormatError(f"{path} is not a GGUF file", hint)
    if len(start) < len(MAGIC) + 4:
        raise truncated(path, "the header is incomplete")
    version = int.from_bytes(start[4:8], "little")
    if version not in VERSIONS:
        # In a byte-swapped small number, the low half is 0 (llama.cpp has the same test).
        if version & 0xFFFF == 0:
            raise FormatError(f"{path} is a big-endian GGUF file", "use a little-endian file")
        raise FormatError(
            f"{path} uses GGUF version {version}, but pop-local supports only versions"
            f" {' and '.join(map(str, VERSIONS))}",
            "convert the model again with a current version of llama.cpp",
        )


def _scan(path: Path, view: mmap.mmap) -> Header:
    cursor = _Cursor(view, path)
    cursor.skip(len(MAGIC))
    version = cursor.number("I")
    n_tensors = cursor.count(_MAX_TENSORS, "number of tensors")
    n_keys = cursor.count(_MAX_KEYS, "number of keys")
    keys = _scan_keys(cursor, n_keys)
    keys_end = cursor.at
    alignment = _alignment(path, keys)
    tensors = tuple(_scan_tensor(cursor) for _ in range(n_tensors))
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise corrupt(path, "two tensors have the same name")
    header = Header(
        path=path,
        version=version,
        keys=MappingProxyType(keys),
        keys_end=keys_end,
        tensors=tensors,
        tensors_end=cursor.at,
        alignment=alignment,
        data_start=align(cursor.at, alignment) if tensors else cursor.at,
        size_bytes=len(view),
    )
    _check_data(header)
    return header


def _scan_keys(cursor: _Cursor, count: int) -> dict[str, HeaderKey]:
    keys: dict[str, HeaderKey] = {}
    for _ in range(count):
        start = cursor.at
        name = cursor.text()
        if name in keys:
            raise corrupt(cursor.path, f"two keys are named {name}")
        kind = cursor.number("I")
        keys[name] = HeaderKey(cursor.value(kind), kind, start, cursor.at)
    return keys


def _scan_tensor(cursor: _Cursor) -> TensorInfo:
    name = cursor.text()
    n_dims = cursor.number("I")
    if n_dims > _MAX_DIMS:
        raise corrupt(cursor.path, f"tensor {name} has too many dimensions ({n_dims})")
    *dims, kind, offset = cursor.numbers(f"{n_dims}QIQ")
    if kind not in BLOCK_SIZES:
        raise FormatError(
            f"{cursor.path}: tensor {name} has an unknown type: {kind}",
            "use a newer version of pop-local, or a different quantization",
        )
    if kind in _WITHOUT_PRODUCT:
        raise FormatError(
            f"{cursor.path}: tensor {name} has type {GGMLQuantizationType(kind).name}, but"
            " llama.cpp does not support matrix multiplication for this type",
            "download the file again",
        )
    n_elements = math.prod(dims)
    if n_elements >= 1 << 63:
        raise corrupt(cursor.path, f"tensor {name} has too many elements ({n_elements:,})")
    elements, size = BLOCK_SIZES[kind]
    return TensorInfo(name, tuple(dims), kind, offset, n_elements // elements * size)


def _alignment(path: Path, keys: Mapping[str, HeaderKey]) -> int:
    if "general.alignment" not in keys:
        return DEFAULT_ALIGNMENT
    key = keys["general.alignment"]
    value = key.value
    if key.type != GGUFValueType.UINT32 or not isinstance(value, int) or value.bit_count() != 1:
        raise corrupt(path, "the alignment is not a power of two")
    if not MIN_ALIGNMENT <= value <= MAX_ALIGNMENT:
        raise corrupt(
            path, f"the alignment {value:,} is not between {MIN_ALIGNMENT} and {MAX_ALIGNMENT:,}"
        )
    return value


def _check_data(header: Header) -> None:
    """Raise FormatError unless all tensors are contiguous and inside the file."""
    expected = 0
    for tensor in header.tensors:
        if tensor.offset != expected:
            raise corrupt(header.path, f"tensor {tensor.name} has an unexpected offset")
        expected = align(expected + tensor.size_bytes, header.alignment)
    if header.tensors:
        last = header.tensors[-1]
        needed = header.data_start + last.offset + last.size_bytes
        if needed > header.size_bytes:
            raise truncated(header.path, f"found only {header.size_bytes:,} of {needed:,} bytes")

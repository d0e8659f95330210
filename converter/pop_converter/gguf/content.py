"""Build a GGUF file from a new header and data copied from other files.

The source's keys and tensor data are copied byte for byte.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pop_base.errors import FormatError
from pop_base.progress import Ran
from pop_converter.gguf.header import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    VERSIONS,
    TensorInfo,
    align,
    truncated,
)
from pop_converter.gguf.source import SPLIT_PREFIX, Source

# Copying with larger chunks took twice as long (docs/notebook/README.md).
CHUNK_BYTES = 256 << 10
_COUNTS = struct.Struct("<IQQ")

Write = Callable[[memoryview], object]


@dataclass(frozen=True)
class FileRange:
    """A byte range in an existing file. In the output, `n_zeros` zeros follow the range."""

    path: Path
    start: int
    size_bytes: int
    n_zeros: int = 0


@dataclass(frozen=True)
class NewTensor:
    """A tensor to add, with encoded `data`. `dims` use ggml's order (row length first)."""

    name: str
    dims: tuple[int, ...]
    type: int
    data: bytes


@dataclass(frozen=True)
class Content:
    """The content of a GGUF file to write. By default, the file has no keys or tensors.

    `keys` and `tensors` are the raw bytes of the key and tensor tables. `ranges` are the byte
    ranges to copy. `data_end` is the end of the last copied tensor, in bytes from the start of the
    data. `added` contains the padding and the new tensors that follow the copied data.
    """

    version: int = VERSIONS[-1]
    n_keys: int = 0
    keys: bytes = b""
    n_tensors: int = 0
    tensors: bytes = b""
    alignment: int = DEFAULT_ALIGNMENT
    ranges: tuple[FileRange, ...] = ()
    data_end: int = 0
    added: tuple[bytes, ...] = ()

    @property
    def header(self) -> bytes:
        """The bytes before the data, including padding."""
        counts = _COUNTS.pack(self.version, self.n_tensors, self.n_keys)
        table = MAGIC + counts + self.keys + self.tensors
        return table.ljust(align(len(table), self.alignment), b"\0")

    @property
    def data_bytes(self) -> int:
        """The size in bytes of the copied ranges, including the zeros after each range."""
        return sum(source_range.size_bytes + source_range.n_zeros for source_range in self.ranges)

    @property
    def size_bytes(self) -> int:
        return len(self.header) + self.data_bytes + sum(map(len, self.added))

    def with_keys(self, keys: tuple[bytes, ...]) -> "Content":
        """Return the content with encoded keys appended."""
        return replace(self, n_keys=self.n_keys + len(keys), keys=self.keys + b"".join(keys))


def with_tensors(content: Content, tensors: Sequence[NewTensor]) -> Content:
    """Return the content with new tensors appended.

    Raises FormatError if the file contains data after its last tensor.
    """
    offset = align(content.data_end, content.alignment)
    gap = offset - content.data_bytes
    if gap < 0:
        raise FormatError(
            "cannot add tensors: the model file contains data after its last tensor",
            "rewrite the file with llama-quantize's COPY type, or use the model's own projections",
            cause="no-room-for-tensors",
        )
    rows, added = [], [bytes(gap)]
    for tensor in tensors:
        rows.append(_encode_tensor(tensor, offset))
        added.append(tensor.data + bytes(-len(tensor.data) % content.alignment))
        offset += len(added[-1])
    return replace(
        content,
        n_tensors=content.n_tensors + len(tensors),
        tensors=content.tensors + b"".join(rows),
        added=tuple(added),
    )


def read_content(source: Source, *, without: str) -> Content:
    """Join a source's parts and return their content, omitting keys with the prefix `without`.

    Raises FormatError if bytes between the tensor table and the data would be lost.
    """
    first = source.first
    with first.path.open("rb") as file:
        raw = file.read(first.data_start)
    if any(raw[first.tensors_end :]):
        raise FormatError(
            f"{first.path} has unexpected bytes between its tensor table and its data",
            "rewrite the file with llama-quantize's COPY type",
        )
    dropped = (without, SPLIT_PREFIX) if source.is_split else (without,)
    keys = [key for name, key in first.keys.items() if not name.startswith(dropped)]
    ends = (tensor.offset + tensor.size_bytes for tensor in first.tensors)
    content = Content(
        version=first.version,
        n_keys=len(keys),
        keys=b"".join(raw[key.start : key.end] for key in keys),
        n_tensors=len(source.tensors),
        tensors=raw[first.keys_end : first.tensors_end],
        alignment=first.alignment,
        ranges=(FileRange(first.path, first.data_start, first.size_bytes - first.data_start),),
        data_end=max(ends, default=0),
    )
    return _join(content, source) if source.is_split else content


def _join(content: Content, source: Source) -> Content:
    """Join all parts' tensors into one file's content. Each tensor is padded to the alignment."""
    rows, ranges, offset = [], [], 0
    for part in source.parts:
        for tensor in part.tensors:
            rows.append(_encode_tensor(tensor, offset))
            n_bytes, start = tensor.size_bytes, part.data_start + tensor.offset
            ranges.append(FileRange(part.path, start, n_bytes, -n_bytes % content.alignment))
            offset = align(offset + n_bytes, content.alignment)
    return replace(content, tensors=b"".join(rows), ranges=tuple(ranges), data_end=offset)


def _encode_tensor(tensor: TensorInfo | NewTensor, offset: int) -> bytes:
    name = tensor.name.encode()
    n_dims = len(tensor.dims)
    return struct.pack(
        f"<Q{len(name)}sI{n_dims}QIQ", len(name), name, n_dims, *tensor.dims, tensor.type, offset
    )


def copy_data(content: Content, hashed_header: bytes, write: Write, advance: Ran) -> str:
    """Pass the copied data to `write` and return the sha256 of `hashed_header` and the data.

    The sha256 is a hex string. `advance` receives the number of bytes in each step. Raises
    FormatError if a source cannot be read. Propagates errors from `write`.
    """
    digest, buffer = hashlib.sha256(hashed_header), memoryview(bytearray(CHUNK_BYTES))
    for source_range in content.ranges:
        for chunk in _read(source_range, buffer):
            digest.update(chunk)
            write(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def same_data(content: Content, written: Path, start: int, advance: Ran) -> bool:
    """Return True if the bytes of `written` from byte `start` onward equal `content`'s data.

    `advance` receives the number of bytes in each step. Raises FormatError if a source cannot be
    read, and OSError if `written` cannot be read.
    """
    expected, actual = (memoryview(bytearray(CHUNK_BYTES)) for _ in range(2))
    with written.open("rb") as file:
        file.seek(start)
        for source_range in content.ranges:
            for chunk in _read(source_range, expected):
                n_bytes = file.readinto(actual[: len(chunk)])
                # Comparing memoryviews directly is slow, since it is done element by element.
                if not np.array_equal(np.asarray(chunk), np.asarray(actual[:n_bytes])):
                    return False
                advance(len(chunk))
        added = all(file.read(len(blob)) == blob for blob in content.added)
        return added and not file.read(1)


def _read(source_range: FileRange, buffer: memoryview) -> Iterator[memoryview]:
    try:
        with source_range.path.open("rb", buffering=0) as file:
            file.seek(source_range.start)
            left = source_range.size_bytes
            while left:
                n_bytes = file.readinto(buffer[:left])
                if not n_bytes:
                    raise truncated(
                        source_range.path, "the file was truncated while pop-local was reading it"
                    )
                yield buffer[:n_bytes]
                left -= n_bytes
    except OSError as error:
        raise FormatError(f"cannot read {source_range.path}: {error.strerror}") from error
    for done in range(0, source_range.n_zeros, CHUNK_BYTES):
        yield memoryview(bytes(min(source_range.n_zeros - done, CHUNK_BYTES)))

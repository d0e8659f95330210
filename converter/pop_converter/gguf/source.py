"""Read a model from one GGUF file or from the parts of a split file."""

import hashlib
import os
import re
import sys
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from pop_base.errors import FormatError
from pop_converter.gguf.header import Header, Scalar, TensorInfo, read_header

SPLIT_PREFIX = "split."
# Architecture of a sidecar, which llama.cpp rejects as unknown.
SIDECAR_ARCH = "pop-sidecar"
# Number of bytes that `sampled_sha256` hashes from the start of each tensor.
SAMPLED_BYTES = 4096
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class SplitPart:
    """The parsed file name of one part of a split model. `number` is 1-based."""

    stem: str
    number: int
    count: int


def part_of(name: str) -> SplitPart | None:
    """Parse a file name like NAME-00001-of-00002.gguf. Return None for any other name."""
    match = _PART.fullmatch(name)
    return match and SplitPart(match["stem"], int(match["number"]), int(match["count"]))


def part_names(stem: str, count: int) -> tuple[str, ...]:
    """Return the file names of all parts of a split model."""
    return tuple(f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))


@dataclass(frozen=True)
class Source:
    """The headers of a model's parts, in order. Only the first part contains the model's keys."""

    parts: tuple[Header, ...]

    @property
    def first(self) -> Header:
        return self.parts[0]

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(part.path for part in self.parts)

    @property
    def is_split(self) -> bool:
        return len(self.parts) > 1 or (_number(self.first, "split.count") or 0) > 0

    @property
    def name(self) -> str:
        """The model's file name, or the name of the joined file for a split model."""
        part = part_of(self.first.path.name) if self.is_split else None
        return f"{part.stem}.gguf" if part else self.first.path.name

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The tensors of all parts in order."""
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)


def read_source(path: Path) -> Source:
    """Read a model's header, or the headers of all parts if `path` is the first part.

    Raises FormatError if a part is missing or wrong, or if `path` is a later part or a sidecar.
    """
    first = read_header(path)
    if is_sidecar(first):
        model = first.get("pop.source.name") or "NAME.gguf"
        raise FormatError(
            f"{path} is a sidecar, not a model",
            f"pass the model ({model}), and pass this file as its sidecar",
            cause="sidecar-as-model",
            model=model,
        )
    count = _number(first, "split.count") or 0
    # Like llama.cpp, treat a single part as a complete model, whatever its name.
    if count <= 1:
        return Source((first,))
    part = part_of(path.name)
    if part is None or part.count != count:
        raise FormatError(
            f"{path} is one of {count} parts, but its name is not in the required format",
            f"rename the parts to NAME-00001-of-{count:05}.gguf and so on",
        )
    paths = [path.with_name(name) for name in part_names(part.stem, count)]
    if part.number != 1:
        raise FormatError(f"{path} is not the first part of a split model", f"pass {paths[0]}")
    missing = [part_path.name for part_path in paths if not part_path.is_file()]
    if missing:
        raise FormatError(
            f"{path}: {len(missing)} of {count} parts are missing: {', '.join(missing)}",
            "put all parts in the same folder",
        )
    source = Source((first, *map(read_header, paths[1:])))
    _check_parts(source)
    return source


def sampled_sha256(source: Source) -> str:
    """Hash the headers and each tensor's first bytes (SHA-256, hex). Fine-tunes' hashes differ."""
    digest = hashlib.sha256()
    for header in source.parts:
        with header.path.open("rb", buffering=0) as file:
            digest.update(file.read(header.data_start))
            if sys.platform == "linux":  # disable readahead, which would cache small pages
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for tensor in header.tensors:
                n_bytes = min(tensor.size_bytes, SAMPLED_BYTES)
                digest.update(_sample(file, header.data_start + tensor.offset, n_bytes))
    return digest.hexdigest()


def _sample(file: FileIO, start: int, n_bytes: int) -> bytes:
    """Read `n_bytes` bytes, then drop them from the page cache.

    Otherwise Linux could not cache this part of the file in large pages later.
    """
    file.seek(start)
    data = file.read(n_bytes)
    if sys.platform == "linux":
        first = start // SAMPLED_BYTES * SAMPLED_BYTES
        os.posix_fadvise(file.fileno(), first, 2 * SAMPLED_BYTES, os.POSIX_FADV_DONTNEED)
    return data


def is_sidecar(header: Header) -> bool:
    return header.get("general.architecture") == SIDECAR_ARCH


def _check_parts(source: Source) -> None:
    for number, part in enumerate(source.parts):
        if _number(part, "split.no") != number or _number(part, "split.count") != len(source.parts):
            raise FormatError(
                f"{part.path} is not part {number + 1} of this model", "download the file again"
            )
    tensors = source.tensors
    expected = _number(source.first, "split.tensors.count")
    if len({tensor.name for tensor in tensors}) != len(tensors) or expected not in (
        None,
        len(tensors),
    ):
        raise FormatError(
            f"{source.first.path}: the parts belong to different models", "download all parts again"
        )


def _number(header: Header, name: str) -> int | None:
    value: Scalar | object = header.get(name)
    return value if isinstance(value, int) else None

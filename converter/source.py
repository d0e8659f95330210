"""A model as it lies on disk: one GGUF file, or the parts of a split one."""

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import FormatError
from .header import Header, Scalar, TensorInfo, read_header

SPLIT_PREFIX = "split."
# The architecture that a sidecar names: llama.cpp knows none of this name and says so.
SIDECAR_ARCH = "pop-sidecar"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class Source:
    """The headers of all parts in order; only the first carries the model's keys."""

    parts: tuple[Header, ...]

    @property
    def first(self) -> Header:
        return self.parts[0]

    @property
    def is_split(self) -> bool:
        return len(self.parts) > 1 or (_number(self.first, "split.count") or 0) > 0

    @property
    def name(self) -> str:
        """The file name that a single file of this model would have."""
        match = _PART.fullmatch(self.first.path.name) if self.is_split else None
        return f"{match['stem']}.gguf" if match else self.first.path.name

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)


def read_source(path: Path) -> Source:
    """Read the header of `path` and, when it begins a split model, of the other parts.

    Raises FormatError when a part is missing or does not belong, or when `path` is a later part or
    a sidecar.
    """
    first = read_header(path)
    if is_sidecar(first):
        raise FormatError(
            f"{path} is a sidecar: it has no model in it",
            f"give the model itself ({first.get('pop.source.name') or 'NAME.gguf'}), and --pop",
        )
    count = _number(first, "split.count") or 0
    if count == 0:
        return Source((first,))
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise FormatError(
            f"{path} is one of {count} parts, but is not named like one",
            f"parts are named NAME-00001-of-{count:05}.gguf",
        )
    paths = [path.with_name(f"{match['stem']}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    if int(match["number"]) != 1:
        raise FormatError(f"{path} is not the first part of its model", f"give {paths[0]}")
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise FormatError(
            f"{len(missing)} of {count} parts are missing beside {path}: {', '.join(missing)}",
            "all parts must lie in one folder",
        )
    source = Source((first, *map(read_header, paths[1:])))
    _check_parts(source)
    return source


def is_sidecar(header: Header) -> bool:
    return header.get("general.architecture") == SIDECAR_ARCH


def _check_parts(source: Source) -> None:
    for number, part in enumerate(source.parts):
        if _number(part, "split.no") != number or _number(part, "split.count") != len(source.parts):
            raise FormatError(
                f"{part.path} is not part {number + 1} of this model", "download it again"
            )
    tensors = source.tensors
    expected = _number(source.first, "split.tensors.count")
    if len({tensor.name for tensor in tensors}) != len(tensors) or expected not in (
        None,
        len(tensors),
    ):
        raise FormatError(
            f"the parts of {source.first.path} do not add up to one model", "download them again"
        )


def _number(header: Header, name: str) -> int | None:
    value: Scalar | object = header.get(name)
    return value if isinstance(value, int) else None

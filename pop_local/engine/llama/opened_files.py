"""The files of an open model, and values from their headers."""

from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from pop_converter.architecture.arch_keys import trained_ctx
from pop_converter.architecture.shape import ModelShape, source_shape
from pop_converter.base.errors import PopError
from pop_converter.gguf.header import Header
from pop_converter.gguf.source import Source
from pop_converter.popfile.format import PopMeta
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.models.sidecars import is_learned


class OpenedFiles:
    """The files of an open model.

    `sidecar`: None without one. `meta`: POP keys of the file or the sidecar (None: not converted).
    """

    def __init__(
        self, source: Source, meta: PopMeta | None, sidecar: Path | None, *, are_mapped: bool
    ) -> None:
        """`are_mapped`: whether llama.cpp maps the files into memory."""
        self.source, self.meta, self.sidecar = source, meta, sidecar
        self.path = source.first.path
        mapped = self._mapped() if are_mapped else ()
        self._marks = {path: _mark(path) for path in mapped}

    def _mapped(self) -> Iterator[Path]:
        """Yield the files that must not change while the model is open."""
        yield from self.source.paths
        # A learned sidecar is only replaced by renaming, so its pages stay mapped.
        if self.sidecar is not None and not is_learned(self.sidecar):
            yield self.sidecar

    @property
    def replaced(self) -> list[Path]:
        """Mapped files that changed since they were opened. Deleted files stay mapped."""
        return [path for path, mark in self._marks.items() if _mark(path) not in (None, mark)]

    @property
    def header(self) -> Header:
        """The keys of the model's file."""
        return self.source.first

    @property
    def n_ctx_train(self) -> int:
        """Trained context length in tokens (0: unknown)."""
        return trained_ctx(self.header) or 0

    @cached_property
    def n_positions(self) -> int:
        """Number of learned positions (0: no limit). llama.cpp aborts past it."""
        dims = {tensor.name: tensor.dims for tensor in self.source.tensors}
        return dims.get("position_embd.weight", (0,))[-1]

    @property
    def n_embd(self) -> int:
        """Width of a row's state."""
        n_embd = self.header.of_arch("embedding_length")
        assert isinstance(n_embd, int), "llama.cpp has loaded the file"
        return n_embd

    @cached_property
    def shape(self) -> ModelShape:
        """Sizes of the model's layers.

        Raises UnsupportedArchitectureError for a model that cannot be pruned.
        """
        return source_shape(self.source)

    @cached_property
    def no_refill(self) -> str:
        """Reason why rows cannot be selected or refilled, or ""."""
        with suppress(PopError):
            return self.shape.no_refill
        return ""

    @cached_property
    def macs(self) -> GraphMacs:
        """Counter of multiply-accumulates."""
        return GraphMacs(self.path, self.sidecar)


def _mark(path: Path) -> tuple[int, ...] | None:
    """Return values that change if a file is replaced, or None if it is missing."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

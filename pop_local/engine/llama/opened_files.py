"""An open model's files, and values from their headers."""

from contextlib import suppress
from functools import cached_property
from pathlib import Path

from pop_base.errors import PopError
from pop_converter.architecture.arch_keys import trained_ctx
from pop_converter.architecture.shape import ModelShape, source_shape
from pop_converter.gguf.source import Source
from pop_converter.popfile.format import PopMeta
from pop_local.engine.llama.graph_macs import GraphMacs


class OpenedFiles:
    """The files of an open model.

    `meta`: POP keys from the file or its sidecar (None: the model is unconverted). `header`:
    metadata from the model's file. `n_ctx_train`: training context length in tokens (0: unknown).
    `n_positions`: number of learned positions (0: no limit). llama.cpp aborts on longer prompts.
    `macs`: a function that counts a prompt's multiply-accumulates.
    """

    def __init__(
        self, source: Source, meta: PopMeta | None, sidecar: Path | None, *, are_mapped: bool
    ) -> None:
        """`are_mapped`: whether llama.cpp maps the files into memory."""
        self.source, self.meta, self.sidecar = source, meta, sidecar
        self.header, self.path = source.first, source.first.path
        self.n_ctx_train = trained_ctx(self.header) or 0
        dims = {tensor.name: tensor.dims for tensor in source.tensors}
        self.n_positions = dims.get("position_embd.weight", (0,))[-1]
        self.macs = GraphMacs(self.path, sidecar)
        mapped = list(source.paths) if are_mapped else []
        if are_mapped and sidecar is not None:
            mapped.append(sidecar)
        self._marks = {path: _mark(path) for path in mapped}

    @property
    def replaced(self) -> list[Path]:
        """Mapped files that have changed since they were opened, excluding deleted files."""
        return [path for path, mark in self._marks.items() if _mark(path) not in (None, mark)]

    @property
    def n_embd(self) -> int:
        """The width of the hidden state."""
        n_embd = self.header.of_arch("embedding_length")
        assert isinstance(n_embd, int), "llama.cpp requires the embedding length"
        return n_embd

    @property
    def untrained_hint(self) -> str:
        """Hint for prompts that are longer than the contexts used in training."""
        return (
            "shorten the prompt, or use a model with a longer context: this model was trained on"
            f" contexts of {self.n_ctx_train:,} tokens and is unreliable on longer prompts"
        )

    @cached_property
    def shape(self) -> ModelShape:
        """The shape of the model's layers.

        Raises UnsupportedArchitectureError if the model cannot be pruned.
        """
        return source_shape(self.source)

    @cached_property
    def no_refill(self) -> str:
        """The reason why the model does not support deep rows and refills, or "" if it does."""
        with suppress(PopError):
            return self.shape.no_refill
        return ""


def _mark(path: Path) -> tuple[int, ...] | None:
    """Return metadata that changes when the file is replaced, or None if the file is missing."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

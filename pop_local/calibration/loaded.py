"""A model's weights without a context, for work that needs contexts of its own shape."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pop_converter.gguf.source import read_source
from pop_converter.popfile.sidecar import pop_of
from pop_local.base.errors import PopError
from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.context import tokenized
from pop_local.engine.llama.devices import kernels_read_prompts
from pop_local.engine.llama.loading import load_model
from pop_local.engine.llama.rpc import Servers
from pop_local.engine.llama.threads import default_threads
from pop_local.engine.prompt.prompter import start_of_question
from pop_local.engine.prompt.templates import Template


class LoadedModel:
    """An opened file, with its sidecar if one is given.

    `vocab` and `handle` are llama.cpp's pointers. Raises PopError.
    """

    def __init__(
        self,
        path: Path,
        *,
        sidecar: Path | None = None,
        n_gpu_layers: int = -1,
        n_threads: int | None = None,
        rpc: Sequence[str] = (),
    ) -> None:
        backend.require_patched()
        self._api = backend.bindings()
        self.path = path
        source = read_source(path)
        meta = pop_of(source, sidecar)
        self._template = str(source.first.get("tokenizer.chat_template") or "")
        self.n_threads = n_threads or default_threads()
        params = self._api.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        # Kernels of ours read the weights as they are in the file: a copy would only take room.
        params.use_extra_bufts = not kernels_read_prompts()
        self._servers = Servers(rpc) if rpc else None
        self.handle = load_model(source, sidecar, meta, params, self._servers)
        self.vocab = self._api.llama_model_get_vocab(self.handle)
        self.n_vocab = int(self._api.llama_vocab_n_tokens(self.vocab))

    def __enter__(self) -> "LoadedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self._api.llama_model_free(self.handle)

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that the model wants before any text: BOS, or none."""
        adds = self._api.llama_vocab_get_add_bos(self.vocab)
        return (self.first_token,) if adds else ()

    @property
    def first_token(self) -> int:
        """The token that the model's own texts begin with.

        It is BOS, else EOS, else the first token of the vocabulary.
        """
        bos, eos = self._api.llama_vocab_bos(self.vocab), self._api.llama_vocab_eos(self.vocab)
        return next((int(token) for token in (bos, eos) if token >= 0), 0)

    @property
    def before_question(self) -> list[int]:
        """The tokens that the chat template puts before a user's first question.

        It is empty without a template, and where that wants something else than a question.
        Raises PopError where it goes beyond its limits.
        """
        if not self._template:
            return []
        template = Template(self._template, self.vocab)
        return self.tokenize(start_of_question(template), special=True)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Return the tokens of a text, without BOS.

        The name of a special token is plain text unless `special`.
        """
        return tokenized(self.vocab, text, special=special)

    @contextmanager
    def context(self, **params: Any) -> Iterator[Any]:
        """Open a context with some llama_context_params, everything else by default."""
        wanted = self._api.llama_context_default_params()
        wanted.n_threads = wanted.n_threads_batch = self.n_threads
        for name, value in params.items():
            setattr(wanted, name, value)
        logs.forget_errors()
        ctx = self._api.llama_init_from_model(self.handle, wanted)
        if not ctx:
            raise PopError(f"no context for {self.path}: {logs.first_error()}")
        try:
            yield ctx
        finally:
            self._api.llama_free(ctx)

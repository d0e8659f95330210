"""Open a model, read prompts with pruning, decode.

`PopModel` is llama_cpp's `Llama`, so templates, samplers, grammars and completions on top of it
work as they are.
"""

import os
from collections.abc import Generator, Sequence
from typing import Any

from pop_local.engine.llama import backend

api = backend.bindings()  # before the first import of llama_cpp: it explains a failure

from llama_cpp.llama_grammar import LlamaGrammar  # noqa: E402

from pop_local.engine.answer import Answering, Prompt, Prompts, answer  # noqa: E402
from pop_local.engine.decode.recommended import recommended  # noqa: E402
from pop_local.engine.llama.closed import closed  # noqa: E402
from pop_local.engine.pruned import PrunedLlama  # noqa: E402
from pop_local.engine.turn import Message, TurnOptions  # noqa: E402


def open_model(
    path: str | os.PathLike[str],
    *,
    sidecar: str | os.PathLike[str] | None = None,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int = -1,
    **options: Any,
) -> "PopModel":
    """Load a model; raises PopError with llama.cpp's reason when it cannot be.

    `sidecar`: a file with POP keys and tensors for this model. `n_ctx`: None takes the model's own
    context, at most 8192. `n_threads`: for prefill and decode, None takes the physical cores.
    `n_gpu_layers`: -1 for all, of no effect without a GPU. `options` go to `llama_cpp.Llama`
    (n_batch, n_ubatch, flash_attn, type_k, lora_path, ...).
    """
    return PopModel(
        os.fspath(path),
        sidecar=None if sidecar is None else os.fspath(sidecar),
        n_ctx=n_ctx,
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
        **options,
    )


class PopModel(PrunedLlama):
    """A model to talk to; a converted one starts in mode CONTEXT."""

    def __init__(
        self,
        model_path: str,
        *,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        n_gpu_layers: int = -1,
        **options: Any,
    ) -> None:
        """As open_model, which takes paths of any kind; `n_threads_batch`: as `n_threads`."""
        n_threads = n_threads or backend.default_threads()
        super().__init__(
            model_path,
            n_threads=n_threads,
            n_threads_batch=n_threads_batch or n_threads,
            n_gpu_layers=n_gpu_layers,
            **options,
        )
        self._prompts = Prompts(self)
        self.recommended = recommended(self.metadata)

    def sampled(
        self, tokens: Sequence[int], options: TurnOptions
    ) -> Generator[int, Sequence[int] | None, None]:
        """The tokens that follow, one after the other and without end."""
        self.set_seed(api.LLAMA_DEFAULT_SEED if options.seed is None else options.seed)
        return self.generate(
            tokens,
            temp=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repeat_penalty=options.repeat_penalty,
            frequency_penalty=options.frequency_penalty,
            presence_penalty=options.presence_penalty,
            grammar=None if options.grammar is None else LlamaGrammar(_grammar=options.grammar),
        )

    def chat_turn(self, messages: Sequence[Message], **options: Any) -> Answering:
        """Answer the last message; `options` are the fields of TurnOptions, by default as the
        file recommends.

        The last chunk carries the figures. Closing the iterator, or an exception in it, leaves the
        model usable. Raises PopError when the prompt does not fit the context or the template
        refuses the conversation.
        """
        chosen: dict[str, Any] = self.recommended | options
        return answer(self, lambda: self.chat_prompt(messages), TurnOptions(**chosen))

    def chat_prompt(self, messages: Sequence[Message]) -> Prompt:
        """Raises PopError when the template refuses the conversation."""
        return self._prompts.render(messages)

    def count_prompt(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt that this conversation makes. Raises PopError as chat_turn does."""
        return len(self.chat_prompt(messages).tokens)

    def close(self) -> None:
        super().close()
        if hasattr(self, "_prompts"):
            self._prompts = closed(self.model_path)

"""The error for a prompt that exceeds the context."""

from pop_converter.base.errors import PopError


class ContextFullError(PopError):
    """A prompt and its answer exceed the context. All numbers are tokens.

    `n_answer`: tokens reserved for the answer. `n_short`: missing tokens.
    """

    def __init__(self, n_prompt: int, n_answer: int, n_ctx: int) -> None:
        larger = n_prompt + max(512, n_answer)
        super().__init__(
            f"the prompt has {n_prompt:,} tokens, {n_prompt + n_answer - n_ctx:,} too many:"
            f" the context holds {n_ctx:,}, and an answer needs {n_answer:,}",
            f"open the model with a larger context (n_ctx={larger}) or a shorter prompt",
            cause="context-full",
            n_ctx=larger,
        )
        self.n_prompt = n_prompt
        self.n_answer = n_answer
        self.n_ctx = n_ctx

    @property
    def n_short(self) -> int:
        return self.n_prompt + self.n_answer - self.n_ctx

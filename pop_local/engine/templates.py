"""Chat templates rendered in a child process, with limits on time and memory."""

import atexit
import threading
from typing import Any

from pop_local.base.errors import PopError
from pop_local.engine import template_child
from pop_local.engine.limited.process import BeyondLimitsError, LimitedProcess, RefusedError
from pop_local.engine.llama import backend
from pop_local.engine.llama.upstream import Jinja2ChatFormatter, chat_format

LIMIT_S = 5.0
LIMIT_BYTES = 512 * 2**20
# Those of public models have some tens of thousands.
MAX_TEMPLATE_CHARACTERS = 1 << 20


class LimitedChatFormatter(Jinja2ChatFormatter):
    """llama_cpp's own, but for where it renders.

    Raises ValueError for what is no template, and where one refuses, and PopError where it goes
    beyond the limits.
    """

    def __init__(self, template: str, *arguments: Any, **options: Any) -> None:
        super().__init__("", *arguments, **options)
        self.template = template
        self._environment = self  # type: ignore[assignment]  # it asks this to render
        if len(template) > MAX_TEMPLATE_CHARACTERS:
            raise ValueError(f"its chat template has {len(template):,} characters")
        try:
            _renderer.render(template, None)
        except ValueError as error:
            raise ValueError(f"its chat template is broken: {error}") from error

    def render(self, **arguments: Any) -> str:
        """Render the template; functions among the arguments are the child's own."""
        plain = {name: value for name, value in arguments.items() if not callable(value)}
        return _renderer.render(self.template, plain)


def formatter_of(vocab: Any, template: str) -> LimitedChatFormatter:
    """With the BOS and EOS of llama.cpp's vocabulary, "" for one that it does not have."""
    api = backend.bindings()
    eos, bos = (
        api.llama_vocab_get_text(vocab, token).decode() if token >= 0 else ""
        for token in (api.llama_vocab_eos(vocab), api.llama_vocab_bos(vocab))
    )
    return LimitedChatFormatter(template, eos_token=eos, bos_token=bos)


def start() -> None:
    """Start the child, which takes a part of a second, before it is needed."""
    _renderer.start()


class _Renderer:
    """The one child of this process, begun again after it has ended."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: LimitedProcess | None = None
        atexit.register(self.close)

    def start(self) -> LimitedProcess:
        with self._lock:
            if self._process is None or not self._process.is_alive:
                self.close()
                self._process = LimitedProcess(
                    template_child.__name__, limit_s=LIMIT_S, limit_bytes=LIMIT_BYTES
                )
            return self._process

    def render(self, template: str, arguments: dict[str, Any] | None) -> str:
        with self._lock:
            process = self.start()
            try:
                text: str = process.call("rendered", template, arguments)
            except RefusedError as error:
                raise ValueError(error.message) from error
            except BeyondLimitsError as error:
                raise PopError(
                    f"the chat template takes {process.limits}",
                    "take the model from another publisher",
                ) from error
        return text

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = None


_renderer = _Renderer()
# Also the ones that llama_cpp makes of what a file says while it opens it.
chat_format.Jinja2ChatFormatter = LimitedChatFormatter  # type: ignore[misc]

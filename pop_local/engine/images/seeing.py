"""llama_cpp's `Llama` with eyes: the mmproj that it has, and the handlers that it may not have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pop_local.base.errors import PopError
from pop_local.engine.images.mmproj import Mmproj
from pop_local.engine.images.pictures import has_pillow
from pop_local.engine.llama.upstream import Llama, chat_format


class SeeingLlama(Llama):
    """A model that may have an mmproj, which is loaded with the first picture."""

    _mmproj: Mmproj | None = None

    def see_with(
        self, path: Path, use_gpu: bool, max_tokens: int | None, should_stop: Callable[[], bool]
    ) -> None:
        """Take an mmproj; the arguments are its own. Raises PopError for what is none."""
        self._mmproj = Mmproj(path, use_gpu=use_gpu, max_tokens=max_tokens, should_stop=should_stop)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        of_mmproj = self._mmproj and self._mmproj.max_tokens
        return {**state, "mmproj": self.mmproj and str(self.mmproj), "image_tokens": of_mmproj}

    @property
    def mmproj(self) -> Path | None:
        """The file that makes rows of pictures."""
        return self._mmproj.path if self._mmproj else None

    @property
    def mmproj_key(self) -> str:
        """What tells mmprojs apart, "" for none."""
        return self._mmproj.key if self._mmproj else ""

    @property
    def can_see(self) -> bool:
        """Whether pictures can be read: there is an mmproj, and Pillow."""
        return self._mmproj is not None and has_pillow()

    @property
    def eye(self) -> Mmproj:
        """The mmproj, loaded when it is asked for first. Raises PopError without one."""
        if self._mmproj is None:
            raise PopError(
                "a picture is given, but the model is open without its mmproj",
                "open it with the mmproj that was published with it",
                cause="no-mmproj",
            )
        return self._mmproj.open(self._model.model, self.n_threads_batch)

    @property
    def chat_handler(self) -> Any:
        """llama_cpp's own way to make prompts; those for pictures read past pruning and cache."""
        return self._chat_handler

    @chat_handler.setter
    def chat_handler(self, handler: Any) -> None:
        if isinstance(handler, chat_format.MTMDChatHandler | chat_format.Llava15ChatHandler):
            raise PopError(
                f"{type(handler).__name__} of llama_cpp would read past the pruning, and leave the"
                " KV cache in disorder",
                "open the model with mmproj=..., and ask with images=[...]",
            )
        self._chat_handler = handler

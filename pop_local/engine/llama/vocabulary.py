"""A model's vocabulary, which converts text to tokens and tokens to bytes."""

import ctypes
from collections.abc import Container, Iterable
from typing import Any

from pop_base.errors import PopError
from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.interrupt import Interrupt


class Vocabulary:
    """A model's vocabulary (llama_vocab).

    `n_tokens`: number of tokens in the vocabulary. The model's owner calls `close` before freeing
    the model. After `close`, all methods raise PopError.
    """

    def __init__(self, pointer: Any) -> None:
        self._api = backend.bindings()
        self._pointer = pointer
        self.n_tokens = int(self._api.llama_vocab_n_tokens(pointer))

    @property
    def pointer(self) -> Any:
        """llama.cpp's llama_vocab."""
        if self._pointer is None:
            raise PopError("the model is closed", "open it again")
        return self._pointer

    @property
    def bos(self) -> tuple[int, ...]:
        """The beginning-of-sequence token, or () if the model does not use one."""
        adds = self._api.llama_vocab_get_add_bos(self.pointer)
        return (int(self._api.llama_vocab_bos(self.pointer)),) if adds else ()

    def is_end(self, token: int) -> bool:
        """Return whether a token ends an answer."""
        return bool(self._api.llama_vocab_is_eog(self.pointer, token))

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        """Tokenize text. `special`: whether to parse special tokens.

        Raises PopError if the text cannot be tokenized or encoded as UTF-8. If interrupted, raises
        StoppedError or the signal handler's exception.
        """
        raw, split = utf8(text), backend.require_patched().llama_pop_tokenize
        room = len(raw) + 8
        tokens = (ctypes.c_int32 * room)()
        logs.forget_errors()
        with Interrupt().tokenizing() as callback:
            n = split(self.pointer, raw, len(raw), tokens, room, add_bos, special, callback, None)
            if n < 0 and (reason := logs.first_error()):
                raise PopError(f"the text cannot be tokenized: {reason}")
        return tokens[: max(n, 0)]

    def detokenize(self, tokens: Iterable[int]) -> str:
        """Return the tokens' text, omitting control tokens and incomplete characters."""
        pieces = Pieces(self)
        return b"".join(pieces[token] for token in tokens).decode(errors="ignore")

    def close(self) -> None:
        self._pointer = None


class Pieces:
    """A mapping from tokens to bytes. Control tokens map to b"" unless they are in `shown`."""

    def __init__(self, vocabulary: Vocabulary, shown: Container[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._shown = shown
        self._to_piece = backend.bindings().llama_token_to_piece
        self._buffer = ctypes.create_string_buffer(64)

    def __getitem__(self, token: int) -> bytes:
        n = self._write(token)
        if n < 0:
            self._buffer = ctypes.create_string_buffer(-n)
            n = self._write(token)
        return self._buffer.raw[:n]

    def _write(self, token: int) -> int:
        size = len(self._buffer)
        vocab, is_shown = self._vocabulary.pointer, token in self._shown
        return int(self._to_piece(vocab, token, self._buffer, size, 0, is_shown))


def utf8(text: str) -> bytes:
    """Encode text as UTF-8. Raises PopError if the text contains lone surrogates."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        hint = "save the file as UTF-8, or set the terminal's encoding to UTF-8"
        raise PopError("the prompt is not UTF-8 text", hint) from error

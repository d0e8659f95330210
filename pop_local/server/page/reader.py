"""Files of strangers, read in a child process with limits."""

from pathlib import Path

from pop_local.base.errors import PopError
from pop_local.engine.images.pictures import read_picture
from pop_local.engine.limited.child import serve
from pop_local.engine.limited.process import BeyondLimitsError, KeptProcess, RefusedError
from pop_local.texts.documents import read_document

LIMIT_S = 60.0
LIMIT_BYTES = 2**30
# More than any context holds.
MAX_CHARACTERS = 8_000_000


class Work:
    """The calls that the child answers."""

    @staticmethod
    def text(path: str) -> str:
        text = read_document(path).text
        if len(text) > MAX_CHARACTERS:
            message = f"{path} has {len(text):,} characters, more than any context holds"
            raise PopError(message, "give a part of it")
        return text.encode(errors="replace").decode()  # a PDF may have halves of characters

    @staticmethod
    def picture(path: str) -> None:
        read_picture(path)


def main(limit_s: float, limit_bytes: int) -> None:
    """Answer calls of Work until standard input is closed."""
    serve(Work(), limit_s, limit_bytes)


class _Reader(KeptProcess):
    """The caller's side."""

    def read(self, path: Path, name: str, *, is_picture: bool) -> str | None:
        """Return a document's text, or None of a picture that may be shown to a model.

        Messages call the file by its `name`. Raises PopError for what cannot be read.
        """
        try:
            text: str | None = self.call("picture" if is_picture else "text", str(path))
        except RefusedError as error:
            message = error.message.replace(str(path), name)
            raise PopError(message, error.hint or "save it as plain text first") from error
        except BeyondLimitsError as error:
            message = f"reading {name} takes {self.limits}"
            raise PopError(message, "save it as plain text first") from error
        return text


reader = _Reader(__name__, limit_s=LIMIT_S, limit_bytes=LIMIT_BYTES)

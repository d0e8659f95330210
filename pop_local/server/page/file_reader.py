"""Read uploaded files in a child process with limited time and memory."""

import base64
from pathlib import Path

from pop_converter.base.errors import PopError
from pop_local.engine.images.pictures import read_picture
from pop_local.engine.limited.process import BeyondLimitsError, KeptProcess, RefusedError
from pop_local.texts.document_readers import read_document

LIMIT_S = 60.0
LIMIT_BYTES = 2**30
MAX_CHARACTERS = 8_000_000  # more than any context holds
_HINT = "save the file as plain text first"


class FileReader:
    """The functions that run in the child process."""

    @staticmethod
    def text(path: str) -> str:
        text = read_document(path).text
        if len(text) > MAX_CHARACTERS:
            message = f"{path} is too long: it has {len(text):,} characters"
            raise PopError(message, f"send a file of up to {MAX_CHARACTERS:,} characters")
        return text.encode(errors="replace").decode()  # PDFs may contain lone surrogates

    @staticmethod
    def picture(path: str) -> str:
        """Return an image file as base64. Only the image's header is decoded."""
        return base64.b64encode(read_picture(path).content).decode()


class _Reader(KeptProcess):
    def read(self, kind: str, path: Path, name: str) -> str:
        """Call FileReader's function `kind` in the child process.

        Raises PopError, which names the file `name`.
        """
        try:
            found: str = self.call(kind, str(path))
        except RefusedError as error:
            message = error.message.replace(str(path), name)
            raise PopError(message, error.hint or _HINT) from error
        except BeyondLimitsError as error:
            raise PopError(f"reading {name} takes {self.limits}", _HINT) from error
        return found


reader = _Reader(FileReader, limit_s=LIMIT_S, limit_bytes=LIMIT_BYTES)

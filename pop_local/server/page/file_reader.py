"""Read uploaded files in a child process with limited time and memory."""

import base64

from pop_base.errors import PopError
from pop_local.engine.images.pictures import read_picture
from pop_local.engine.limited.process import KeptProcess
from pop_local.texts.document_readers import read_document

MAX_CHARACTERS = 8_000_000  # more than any context holds


class FileReader:
    """The functions that run in the child process."""

    @staticmethod
    def text(path: str) -> str:
        text = read_document(path).text
        if len(text) > MAX_CHARACTERS:
            message = f"{path} is too long: {len(text):,} characters"
            raise PopError(message, f"send a file of up to {MAX_CHARACTERS:,} characters")
        return text.encode(errors="replace").decode()  # PDFs may contain lone surrogates

    @staticmethod
    def picture(path: str) -> str:
        """Return an image file as base64 after checking its header."""
        return base64.b64encode(read_picture(path).content).decode()


reader = KeptProcess(FileReader, limit_s=60.0, limit_bytes=2**30)

"""Error types of both packages: a message, a hint and a cause."""

import zlib
from tokenize import TokenError
from zipfile import BadZipFile

# Errors of numpy.load for a damaged archive. RuntimeError: an encrypted zip or an unknown
# compression. TokenError: numpy parses an array's header as Python.
DAMAGED_ARCHIVE = (
    OSError,
    ValueError,
    LookupError,
    EOFError,
    TypeError,
    MemoryError,
    RuntimeError,
    BadZipFile,
    TokenError,
    zlib.error,
)


class PopError(Exception):
    """A failure that the user can understand.

    `hint` is a remedy for the library's caller ("" for none). It names parameters, never a command.
    Programs with their own remedies identify the failure by `cause` ("" for most failures) and read
    numbers, names and paths from `fields`.
    """

    def __init__(self, message: str, hint: str = "", *, cause: str = "", **fields: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.cause = cause
        self.fields = fields
        if hint and hasattr(self, "add_note"):  # Python 3.11 or newer
            self.add_note(f"hint: {hint}")


class StoppedError(Exception):
    """Work stopped by the caller's `should_stop`."""


class FormatError(PopError):
    """An invalid file: not GGUF, truncated, or with inconsistent POP keys."""


class TruncatedError(FormatError):
    """A file shorter than its header requires."""


class UnsupportedArchitectureError(PopError):
    """A model whose architecture cannot be pruned, or is missing in this build."""


class PlanError(PopError):
    """A boundary, skipped share or token count that does not fit the model."""


class OutputExistsError(PopError):
    """An existing output file that must not be replaced."""


class WriteError(PopError):
    """A failed write, or a file whose content differs after writing."""

"""Define the error types of both packages, with a message, a hint and a cause."""

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
    """A failure with a message that users can understand.

    `hint` is a remedy for the library's caller ("" for none). The hint names parameters, never a
    command. Programs with their own remedies identify the failure by `cause` ("" for most failures)
    and read numbers, names and paths from `fields`.
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
    """The error for work that the caller's `should_stop` has stopped."""


class FormatError(PopError):
    """The error for a file that is not GGUF, is truncated, or has inconsistent POP keys."""


class TruncatedError(FormatError):
    """The error for a file that is shorter than its header requires."""


class UnsupportedArchitectureError(PopError):
    """The error for a model whose architecture cannot be pruned, or is missing in this build."""


class PlanError(PopError):
    """The error for a boundary, skipped share or token count that does not fit the model."""


class OutputExistsError(PopError):
    """The error for an existing output file that must not be replaced."""


class WriteError(PopError):
    """The error for a failed write, or for a file whose content differs after writing."""

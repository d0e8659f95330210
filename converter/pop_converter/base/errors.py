"""The errors of both packages: what went wrong, and what to do."""


class PopError(Exception):
    """A failure that the user can understand.

    `hint` names a remedy for callers of the library: parameters, never a command ("" for none). A
    program that words a remedy itself identifies the failure by `cause` ("" for most failures) and
    takes numbers, names and paths from `fields`.
    """

    def __init__(self, message: str, hint: str = "", *, cause: str = "", **fields: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.cause = cause
        self.fields = fields
        if hint and hasattr(self, "add_note"):  # from Python 3.11 on
            self.add_note(f"hint: {hint}")


class StoppedError(Exception):
    """Work ended by the caller's `should_stop`."""


class FormatError(PopError):
    """An invalid file: not GGUF, truncated, or with inconsistent POP keys."""


class TruncatedError(FormatError):
    """A file shorter than its header requires."""


class UnsupportedArchitectureError(PopError):
    """A model whose architecture cannot be pruned, or is not in this build."""


class PlanError(PopError):
    """A boundary, skipped share or token count that does not fit the model."""


class OutputExistsError(PopError):
    """An output file that exists, without permission to replace it."""


class WriteError(PopError):
    """A failed write, or a file whose content differs after writing."""

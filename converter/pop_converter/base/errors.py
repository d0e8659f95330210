"""The one family of errors: what is wrong, and what to do about it."""


class PopError(Exception):
    """A failure that the user can understand; `hint` says what to do, or is empty.

    `hint` is for whoever calls this library: it names parameters, never a command; a trace has it.
    A program that has better words for some failures tells these by `cause`, a short name, and
    builds its words from `fields`: the numbers, names and paths that the remedy needs. Other
    failures have no cause.
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
    """The caller's should_stop ended the work."""


class FormatError(PopError):
    """A file is not what it should be: no GGUF, cut short, or with POP keys that do not fit."""


class TruncatedError(FormatError):
    """The file ends before all that its own header announces."""


class UnsupportedArchitectureError(PopError):
    """Pruning is not defined (or not built) for this model's architecture."""


class PlanError(PopError):
    """The boundary, the skipped share or the token counts do not fit the model."""


class OutputExistsError(PopError):
    """The output is there already and nobody said that it may be replaced."""


class WriteError(PopError):
    """The output could not be written, or is not what was meant to be written."""

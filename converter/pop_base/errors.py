"""Error types for both packages."""


class PopError(Exception):
    """An error with a message for users.

    `hint` suggests a fix in terms of function parameters, or is "". A program that shows its own
    hints can identify the error by `cause` and read numbers, names, and paths from `fields`. For
    most errors, `cause` is "".
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
    """Error raised when the caller stops the work through `should_stop`."""


class FormatError(PopError):
    """Error for a file that is not a GGUF file, is truncated, or has inconsistent POP keys."""


class TruncatedError(FormatError):
    """Error for a file that is shorter than its header requires."""


class UnsupportedArchitectureError(PopError):
    """Error for an architecture that cannot be pruned or that this build does not support."""


class PlanError(PopError):
    """Error for a boundary, layer count, or token count that is invalid for the model."""


class OutputExistsError(PopError):
    """Error raised if an output file already exists and must not be replaced."""


class WriteError(PopError):
    """Error for a write that failed or that produced a damaged file."""

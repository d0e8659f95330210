"""The build's error type."""


class BuildError(Exception):
    """A failure that the user can fix, with a remedy as `hint`."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"\npop-local: {self.message}\n  -> {self.hint}\n"

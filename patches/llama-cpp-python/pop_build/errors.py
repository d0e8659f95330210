"""The one error of the build: what is wrong, and what to do about it."""


class BuildError(Exception):
    """A failure that the user can understand; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"\npop-local: {self.message}\n  -> {self.hint}\n"

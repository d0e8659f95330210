"""The error that every part of the build raises."""


class BuildError(Exception):
    """A failure that the user can fix. `hint` is the suggested action."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"\npop-local: {self.message}\n  -> {self.hint}\n"

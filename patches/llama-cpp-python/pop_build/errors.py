"""The error type for build failures."""


class BuildError(Exception):
    """A build failure that the user can fix. `hint` suggests a fix."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"\npop-local: {self.message}\n  -> {self.hint}\n"

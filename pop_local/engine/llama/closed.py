"""What takes the place of llama.cpp's objects once they are freed, and any use would crash."""

from typing import Any, NoReturn

from converter.errors import PopError


class Closed:
    """Every use is a PopError."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> NoReturn:
        raise PopError(f"the model {self._path} is closed", "open it again")


def closed(path: str) -> Any:
    """To be assigned to attributes of whatever type."""
    return Closed(path)

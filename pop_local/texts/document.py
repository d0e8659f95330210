"""The document type: a file's text and name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """The text of a file or of a part of it; `name` is shown to the user."""

    name: str
    text: str

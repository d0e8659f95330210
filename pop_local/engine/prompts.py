"""What the prompt of a conversation is, and how it looks without a chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pop_local.engine.images.mmproj import Seen

# For base models, which come without a template; it needs no special tokens.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}Assistant:"
)
PLAIN_STOPS = ("\nUser:", "\nSystem:")
# Templates of some reasoning models open the block themselves, so that only its end is sampled.
THINK = "<think>"


@dataclass(frozen=True)
class Prompt:
    """Tokens, the strings that end the answer, and what the template has begun of it already.

    `seen`: the pictures that some of the tokens stand for, kept until they are decoded.
    """

    tokens: list[int]
    stops: tuple[str, ...] = ()
    begun: str = ""
    seen: tuple[Seen, ...] = ()

    @property
    def n_image(self) -> int:
        """How many tokens are rows of pictures."""
        return sum(image.n_rows for seen in self.seen for image in seen.images)

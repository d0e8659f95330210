"""A prompt: tokens, and images in the place of some of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pop_local.engine.images.mmproj import ImageChunk

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

    `images`: by the row where each begins; its rows have NO_TOKEN among the tokens.
    """

    tokens: Sequence[int]
    stops: tuple[str, ...] = ()
    begun: str = ""
    images: Mapping[int, ImageChunk] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_image(self) -> int:
        return sum(image.n_rows for image in self.images.values())

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The (start, end) rows of each image, in order."""
        return tuple((start, start + image.n_rows) for start, image in self.images.items())

    @property
    def text_from(self) -> int:
        """The row after the last image."""
        return self.spans[-1][1] if self.images else 0

    def from_row(self, row: int) -> "Prompt":
        """Return the rest from a row on, which lies within no image."""
        images = {start - row: image for start, image in self.images.items() if start >= row}
        return Prompt(self.tokens[row:], self.stops, self.begun, images)

    def whole(self, n_rows: int) -> int:
        """Return how many of the first rows are there without a part of an image."""
        return next((start for start, end in self.spans if start < n_rows < end), n_rows)

    def n_equal(self, tokens: np.ndarray, images: Mapping[int, str]) -> int:
        """Count the rows, from the first on, that are the same.

        `tokens`: int32 [n], `images`: the key of each by the row where it begins. An image of
        which only a part is there is not the same.
        """
        n = min(len(self.tokens), len(tokens))
        differ = np.flatnonzero(tokens[:n] != np.asarray(self.tokens[:n], dtype=np.intc))
        n = int(differ[0]) if differ.size else n
        for start, image in self.images.items():
            if start < n and (images.get(start) != image.key or start + image.n_rows > n):
                return start
        return n

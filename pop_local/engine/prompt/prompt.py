"""A prompt that consists of tokens and images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pop_local.engine.images.mmproj import ImageChunk

# A template without special tokens, for base models.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}Assistant:"
)
PLAIN_STOPS = ("\nUser:", "\nSystem:")
# Some reasoning models' templates end with this tag, so the model generates only the end tag.
THINK = "<think>"


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens and images.

    `stops`: strings that end the answer. `begun`: the start of the answer, as rendered by the
    template. `images` maps each image's first row to the image. Image rows have NO_TOKEN in
    `tokens`.
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
        """Return each image's range of rows as (start, end), in ascending order."""
        return tuple((start, start + image.n_rows) for start, image in self.images.items())

    @property
    def text_from(self) -> int:
        """Return the row after the last image, or 0 if the prompt contains no images."""
        return self.spans[-1][1] if self.images else 0

    def from_row(self, row: int) -> "Prompt":
        """Return the prompt from `row` to the end. `row` must not be inside an image."""
        images = {start - row: image for start, image in self.images.items() if start >= row}
        return Prompt(self.tokens[row:], self.stops, self.begun, images)

    def whole(self, n_rows: int) -> int:
        """Round `n_rows` down so that no image is split."""
        return next((start for start, end in self.spans if start < n_rows < end), n_rows)

    def n_equal(self, tokens: np.ndarray, images: Mapping[int, str]) -> int:
        """Return the number of matching leading rows, rounded down so that no image is split.

        `tokens`: int32 [n]. `images` maps each image's first row to the image's key.
        """
        n = min(len(self.tokens), len(tokens))
        differ = np.flatnonzero(tokens[:n] != np.asarray(self.tokens[:n], dtype=np.intc))
        n = int(differ[0]) if differ.size else n
        for start, image in self.images.items():
            if start < n and (images.get(start) != image.key or start + image.n_rows > n):
                return start
        return n

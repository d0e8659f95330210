"""Pictures: a file's bytes to pixels, within limits that are checked before a pixel is decoded.

Pillow decodes them, not the decoder inside libmtmd, which promises nothing for bytes from
strangers, knows no WebP and does not turn photographs upright.
"""

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import PopError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000
# Nothing is left of a strip once a model has scaled it.
MAX_ASPECT = 100
_WHITE = (255, 255, 255, 255)


@dataclass(frozen=True)
class Picture:
    """A picture as its file has it; `name` is for people, `width` and `height` are upright pixels.

    Two pictures are equal if their files are; `content` is checked as far as `picture_of` does.
    """

    name: str
    content: bytes
    width: int
    height: int

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def rgb(self) -> bytes:
        """The pixels row by row, three bytes each; the first frame, on white where transparent.

        Raises PopError for a damaged file.
        """
        from PIL import Image, ImageOps

        with _opened(self.content, self.name) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.size != (self.width, self.height):
                raise ValueError("another size than its head says")
            if upright.has_transparency_data:
                layer = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", layer.size, _WHITE), layer)
            pixels: bytes = upright.convert("RGB").tobytes()
        return pixels


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """Read a file. Raises PopError for what is no picture, OSError for what cannot be read."""
    with Path(path).open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    return picture_of(content, Path(path).name)


def picture_of(content: bytes, name: str) -> Picture:
    """Take a file's bytes, which are decoded as far as its head, for a picture.

    Raises PopError for what is none, and for one beyond MAX_BYTES, MAX_PIXELS or MAX_ASPECT.
    """
    if len(content) > MAX_BYTES:
        raise PopError(f"{name} is larger than {MAX_BYTES // 2**20} MiB", "scale the picture down")
    with _opened(content, name) as opened:
        width, height = opened.size
        if opened.getexif().get(0x0112, 1) >= 5:  # lying on its side
            width, height = height, width
    return Picture(name, content, width, height)


@contextmanager
def _opened(content: bytes, name: str) -> "Iterator[Image]":
    try:
        from PIL import Image
    except ImportError as error:
        raise PopError(
            f"reading pictures needs Pillow: {error}",
            "install it with: pip install 'pop-local[images]'",
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(content), formats=FORMATS) as opened:
                _check(opened.width, opened.height, name)
                yield opened
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except PopError:
        raise
    except (Exception, MemoryError) as error:  # decoders raise what they like on damaged files
        raise PopError(
            f"{name} is no picture that can be read",
            f"give a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file",
        ) from error


def _check(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise _too_large(name)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise PopError(f"{name} is a strip of {width} x {height} pixels", "cut a piece out of it")


def _too_large(name: str) -> PopError:
    return PopError(
        f"{name} has more than {MAX_PIXELS // 10**6} million pixels", "scale the picture down"
    )

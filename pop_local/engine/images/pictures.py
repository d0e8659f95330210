"""Read and decode image files within limits on size, time, and memory.

Pillow decodes the images. libmtmd's own decoder is not meant for untrusted files, does not support
WebP, and ignores the EXIF orientation. A child process decodes large WebP files, because Pillow
blocks all threads while it decodes WebP.
"""

import base64
import hashlib
import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from pop_base.errors import PopError
from pop_base.files import read_file
from pop_local.engine.limited.process import BeyondLimitsError, KeptProcess

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000
# Maximum pixels in all passes of a progressive JPEG. Even a small file can have many passes.
MAX_SCANNED = 20 * MAX_PIXELS
# A more elongated picture would disappear when scaled to a model's input.
MAX_ASPECT = 100
_WHITE = (255, 255, 255, 255)
# Larger pictures are scaled down first, because models use fewer pixels.
MAX_SHOWN = 8_000_000
# Pillow cannot decode a WebP at reduced size and keeps several copies of its pixels in memory.
MAX_WEBP_PIXELS = 2 * MAX_SHOWN
# Decoding a larger WebP takes longer than starting a child process.
_MAX_INLINE = 1_000_000
LIMIT_S = 20.0
LIMIT_BYTES = 512 * 2**20
# A scan's header in a JPEG file, with 1 to 4 components.
_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations


@dataclass(frozen=True)
class Picture:
    """An image file whose header `picture_of` has checked.

    `name` appears in messages. `width`, `height`: size in pixels after EXIF rotation. Two Pictures
    are equal if their files are identical.
    """

    name: str = field(compare=False)
    content: bytes
    width: int
    height: int

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def rgb(self, most: int = MAX_SHOWN) -> tuple[int, int, bytes]:
        """Decode the first frame and return its width, height, and RGB bytes.

        The decoder applies the EXIF orientation, replaces transparency with white, and scales large
        frames down to about `most` pixels. Raises PopError if the file is damaged.
        """
        is_webp = self.content[8:12] == b"WEBP"
        if not is_webp or self.width * self.height <= _MAX_INLINE:
            return _rgb(self.content, self.name, most)
        content = base64.b64encode(self.content).decode()
        try:
            width, height, pixels = _decoder.call("rgb", content, self.name, most)
        except BeyondLimitsError as error:
            message = f"decoding {self.name} exceeds the limit ({_decoder.limits})"
            raise PopError(message, "scale the image down") from error
        return width, height, base64.b64decode(pixels)


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """Read an image from a file or a pipe.

    Raises PopError if the file is not an image, or OSError if it cannot be read.
    """
    return picture_of(read_file(Path(path), MAX_BYTES + 1), str(path))


def picture_of(content: bytes, name: str) -> Picture:
    """Create a Picture from a file's bytes. Only the header is decoded.

    Raises PopError if the bytes are not an image or exceed one of this module's limits.
    """
    if len(content) > MAX_BYTES:
        raise PopError(f"{name} is larger than {MAX_BYTES // 2**20} MiB", "scale the image down")
    with _opened(content, name) as opened:
        width, height = opened.size
        if _orientation(opened) in _SIDEWAYS:
            width, height = height, width
    is_jpeg = content.startswith(b"\xff\xd8")
    if is_jpeg and len(_SCAN.findall(content)) * width * height > MAX_SCANNED:
        raise PopError(f"decoding {name} takes too many passes", "save it as a baseline JPEG")
    return Picture(name, content, width, height)


def _rgb(content: bytes, name: str, most: int) -> tuple[int, int, bytes]:
    from PIL import Image, ImageOps

    with _opened(content, name) as opened:
        _orientation(opened)
        image: Image.Image = opened
        if opened.mode.startswith("I"):  # convert would clip 16-bit gray at 255
            image = opened.convert("I").point(lambda value: value * (1 / 256)).convert("L")
            image.info.pop("transparency", None)
        n_pixels = opened.width * opened.height
        if n_pixels > most:
            if image.mode in ("1", "P"):  # these modes cannot be scaled smoothly
                image = opened.convert("RGBA" if opened.has_transparency_data else "RGB")
            share = (most / n_pixels) ** 0.5
            size = opened.width * share, opened.height * share
            image.thumbnail(size, reducing_gap=1.1)  # the JPEG decoder scales first
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layer.size, _WHITE), layer)
        image = image.convert("RGB")
    return image.width, image.height, image.tobytes()


class PictureDecoder:
    """Methods that the parent process calls in the child process."""

    @staticmethod
    def rgb(content: str, name: str, most: int) -> tuple[int, int, str]:
        """Decode a picture as Picture.rgb does. `content` and the returned pixels are in base64."""
        width, height, pixels = _rgb(base64.b64decode(content), name, most)
        return width, height, base64.b64encode(pixels).decode()


_decoder = KeptProcess(PictureDecoder, limit_s=LIMIT_S, limit_bytes=LIMIT_BYTES)


def has_pillow() -> bool:
    return importlib.util.find_spec("PIL") is not None


def require_pillow() -> None:
    """Raise PopError if Pillow is not installed."""
    if not has_pillow():
        raise PopError(
            "reading images requires Pillow", "install it with: pip install 'pop-local[images]'"
        )


def _orientation(opened: "Image") -> object:
    """Return the header's EXIF orientation. For a PNG, `opened.getexif` would decode all pixels."""
    from PIL import Image

    return Image.Image.getexif(opened).get(0x0112)


@contextmanager
def _opened(content: bytes, name: str) -> "Iterator[Image]":
    require_pillow()
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(content), formats=FORMATS) as opened:
                n_pixels = opened.width * opened.height
                if n_pixels > MAX_PIXELS:
                    raise _too_large(name)
                if opened.format == "WEBP" and n_pixels > MAX_WEBP_PIXELS:
                    raise _too_large(f"{name}, a WebP,", MAX_WEBP_PIXELS)
                if max(opened.size) > MAX_ASPECT * min(opened.size):
                    raise PopError(
                        f"{name} is too long and narrow: {opened.width} x {opened.height} pixels",
                        "crop the image",
                    )
                yield opened
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except PopError:
        raise
    except MemoryError as error:
        message = f"there is not enough memory to decode {name}"
        raise PopError(message, "scale the image down") from error
    except Exception as error:  # decoders may raise any exception on damaged files
        raise PopError(
            f"{name} is not a readable image",
            f"use a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file",
        ) from error


def _too_large(name: str, limit: int = MAX_PIXELS) -> PopError:
    return PopError(f"{name} has more than {limit // 10**6} million pixels", "scale the image down")

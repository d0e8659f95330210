"""Pictures to calibrate on, the user's or generated, and their encoded images."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np

from pop_converter.base.errors import PopError
from pop_local.calibration.texts import N_WINDOW, CalibrationError
from pop_local.engine.images.mmproj import ImageChunk, Mmproj
from pop_local.engine.images.pictures import (
    Picture,
    picture_of,
    read_picture,
    require_pillow,
)
from pop_local.engine.llama.context import Context

N_DRAWN = 24
_MAX_PICTURES = 200
_SIZES = ((512, 512), (640, 480), (480, 640), (768, 432))
_WORDS = "total date amount name sum of page figure table left right red blue open file 2024 17 %"


def open_vision(context: Context, mmproj: Path, should_stop: Callable[[], bool]) -> Mmproj:
    """Open an mmproj. Raises PopError if it is invalid or belongs to another model."""
    vision = Mmproj(
        mmproj,
        use_gpu=False,
        max_tokens=N_WINDOW,
        should_stop=lambda: context.interrupt.is_wanted() or should_stop(),
    )
    return vision.open(context.model, context.n_threads)


def images_of(vision: Mmproj, pictures: Sequence[Picture]) -> list[ImageChunk]:
    """Split pictures into images of up to N_WINDOW rows. Raises CalibrationError without any."""
    every = [image for picture in pictures for image in vision.see(picture).images.values()]
    found = [image for image in every if image.n_rows <= N_WINDOW]
    if not found:
        raise CalibrationError(
            f"{vision.path} turns every picture into more than {N_WINDOW} tokens",
            "omit the mmproj, to fit on text alone",
        )
    return found


def pictures_of(folder: Path | None) -> Sequence[Picture]:
    """Read the pictures in a folder and its subfolders, or draw some if it is None.

    Raises CalibrationError for a folder without pictures, PopError without Pillow.
    """
    if folder is None:
        return draw_pictures(N_DRAWN)
    found: list[Picture] = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and len(found) < _MAX_PICTURES:
            with suppress(PopError, OSError):
                found.append(read_picture(path))
    if not found:
        raise CalibrationError(
            f"{folder} has no pictures", "give a folder of PNG or JPEG files, or omit it"
        )
    return found


def identity(mmproj: Path, pictures: Sequence[Picture]) -> str:
    """Return a hash that identifies the images of a calibration."""
    parts = [picture.sha256 for picture in pictures]
    stat = mmproj.stat()
    return hashlib.sha256(repr([stat.st_size, stat.st_mtime_ns, *parts]).encode()).hexdigest()


@functools.cache
def draw_pictures(n: int, seed: int = 0) -> tuple[Picture, ...]:
    """Draw pictures of gradients, shapes and words, determined by the seed.

    Raises PopError without Pillow.
    """
    require_pillow()
    rng = np.random.default_rng(seed)
    return tuple(_drawn(rng, number) for number in range(n))


def _drawn(rng: np.random.Generator, number: int) -> Picture:
    from PIL import Image as Pil
    from PIL import ImageDraw, ImageFont

    width, height = _SIZES[number % len(_SIZES)]
    corners = rng.uniform(0, 255, (2, 2, 3))
    across, down = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    top = corners[0, 0] * (1 - across) + corners[0, 1] * across
    bottom = corners[1, 0] * (1 - across) + corners[1, 1] * across
    pixels = top * (1 - down) + bottom * down + rng.normal(0, 6, (height, width, 3))
    image = Pil.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    words = _WORDS.split()
    for _ in range(int(rng.integers(4, 12))):
        x, y = int(rng.integers(0, width - 40)), int(rng.integers(0, height - 40))
        box = (x, y, x + int(rng.integers(20, width // 2)), y + int(rng.integers(20, height // 2)))
        colour = tuple(int(part) for part in rng.integers(0, 256, 3))
        kind = rng.integers(0, 4)
        if kind == 0:
            pen.rectangle(box, fill=colour)
        elif kind == 1:
            pen.ellipse(box, fill=colour, outline="black")
        elif kind == 2:
            pen.line(box, fill=colour, width=int(rng.integers(1, 12)))
        else:
            text = " ".join(rng.choice(words, int(rng.integers(1, 6))))
            pen.text(
                (x, y), text, fill=colour, font=ImageFont.load_default(int(rng.integers(12, 48)))
            )
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return picture_of(buffer.getvalue(), f"drawn {number + 1}")

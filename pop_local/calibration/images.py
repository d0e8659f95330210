"""Pictures to calibrate on, and the images that a model makes of them."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pop_local.base.errors import PopError
from pop_local.calibration.loaded import LoadedModel
from pop_local.calibration.texts import N_WINDOW, CalibrationError
from pop_local.engine.images.mmproj import ImageChunk, Mmproj, Seen
from pop_local.engine.images.pictures import Picture, read_picture, require_pillow

_MAX_PICTURES = 200


class CalibrationImages:
    """The images of some pictures, cut up by an mmproj, of up to N_WINDOW rows each."""

    def __init__(
        self,
        model: LoadedModel,
        mmproj: Path,
        pictures: Sequence[Picture],
        should_stop: Callable[[], bool],
    ) -> None:
        """Raises PopError where the mmproj is none, or belongs to another model."""
        self.eye = Mmproj(mmproj, use_gpu=False, max_tokens=N_WINDOW, should_stop=should_stop)
        self.eye.open(model.handle, model.n_threads)
        self._seen: list[Seen] = [self.eye.see(picture) for picture in pictures]
        images = [image for seen in self._seen for image in seen.images.values()]
        self.images: list[ImageChunk] = [image for image in images if image.n_rows <= N_WINDOW]
        if not self.images:
            raise CalibrationError(
                f"{mmproj} makes more than {N_WINDOW} tokens of every picture",
                "fit on text alone: leave the mmproj out",
            )

    @property
    def n_rows(self) -> int:
        return sum(image.n_rows for image in self.images)


def pictures_of(folder: Path | None) -> Sequence[Picture]:
    """Read the pictures in a folder and below.

    Raises CalibrationError where there are none, PopError without Pillow.
    """
    if folder is None:
        raise CalibrationError("a fit on pictures needs some", "give a folder of PNG or JPEG files")
    require_pillow()
    found: list[Picture] = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and len(found) < _MAX_PICTURES:
            with suppress(PopError, OSError):
                found.append(read_picture(path))
    if not found:
        raise CalibrationError(f"{folder} holds no pictures", "give a folder of PNG or JPEG files")
    return found


def identity(mmproj: Path, pictures: Sequence[Picture]) -> str:
    """Tell apart what a calibration with images reads."""
    parts = [picture.sha256 for picture in pictures]
    stat = mmproj.stat()
    return hashlib.sha256(repr([stat.st_size, stat.st_mtime_ns, *parts]).encode()).hexdigest()

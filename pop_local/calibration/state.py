"""A calibration's progress, and the file that stores it after a stop."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pop_converter.base.errors import DAMAGED_ARCHIVE
from pop_converter.base.output_file import replacing
from pop_converter.gguf.content import NewTensor
from pop_converter.projection import Projection
from pop_local.calibration.needs import FitPair
from pop_local.calibration.texts import CalibrationError, CalibrationText
from pop_local.engine.learning.sums import Sums


@dataclass
class CalibrationState:
    """A calibration's progress; `n_done`: the number of windows read for the current group.

    `groups`: the pairs that each pass over the text fits. `sums`: the current group's Gram
    matrices. `tensors`: the fitted tensors of earlier groups, by boundary and projection.
    """

    text: CalibrationText
    groups: tuple[tuple[FitPair, ...], ...]
    group: int = 0
    n_done: int = 0
    sums: Sums = field(default_factory=Sums)
    tensors: dict[tuple[int, Projection], list[NewTensor]] = field(default_factory=dict)


def save(path: Path, identity: str, state: CalibrationState) -> None:
    """Write the state to the file `path` atomically. Raises WriteError."""
    tensors = [(*key, each) for key, some in state.tensors.items() for each in some]
    head = {
        "identity": identity,
        "text": [state.text.name, state.text.sha256],
        "groups": state.groups,
        "counts": [state.group, state.n_done],
        "tensors": [(*key, each.name, each.dims, each.type) for *key, each in tensors],
    }
    sums, arrays = state.sums.arrays()
    arrays |= {"head": json.dumps(head | sums), "windows": state.text.windows}
    for number, (*_, tensor) in enumerate(tensors):
        arrays[f"data.{number}"] = np.frombuffer(tensor.data, np.uint8)
    with replacing(path, force=True) as file:
        np.savez(file, **arrays)


def load(path: Path, identity: str) -> CalibrationState | None:
    """Return the state in the file `path`, or None if the file does not exist.

    Raises CalibrationError if the file is damaged or stores a calibration with another model, text
    or setting.
    """
    if not path.exists():
        return None
    with _opened(path) as (head, arrays):
        if head["identity"] != identity:
            raise _cannot_resume(f"{path} stores a calibration with another model, text or setting")
        name, sha256 = head["text"]
        text = CalibrationText(name, sha256, arrays["windows"])
        state = CalibrationState(text, _groups(head), *head["counts"])
        state.sums = Sums.of(head, arrays)
        for number, (boundary, projection, tensor_name, dims, kind) in enumerate(head["tensors"]):
            data = arrays[f"data.{number}"].tobytes()
            tensor = NewTensor(tensor_name, tuple(dims), kind, data)
            state.tensors.setdefault((boundary, projection), []).append(tensor)
        return state


def kept_boundaries(path: Path) -> tuple[int, ...]:
    """Return the boundaries in a calibration's file, if it exists. Raises CalibrationError."""
    if not path.exists():
        return ()
    with _opened(path) as (head, _):
        return tuple(dict.fromkeys(pair.boundary for group in _groups(head) for pair in group))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield json.loads(str(arrays["head"])), arrays
    except DAMAGED_ARCHIVE as error:
        raise _cannot_resume(f"{path} is damaged") from error


def _groups(head: Any) -> tuple[tuple[FitPair, ...], ...]:
    return tuple(tuple(FitPair(*pair) for pair in group) for group in head["groups"])


def _cannot_resume(message: str) -> CalibrationError:
    return CalibrationError(
        message, "move the file away, or convert without resuming", cause="cannot-resume"
    )

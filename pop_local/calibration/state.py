"""A calibration in progress, and the file that keeps it when it is stopped."""

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np

from pop_converter.fit.least_squares import Gram
from pop_converter.fit.wide import Neurons, WideInput
from pop_converter.gguf.content import NewTensor
from pop_converter.projection import Projection
from pop_local.base.output import replacing
from pop_local.calibration.needs import Pair
from pop_local.calibration.texts import CalibrationError, CalibrationText

# RuntimeError: a zip marked as encrypted, or packed in a way that is not known.
# TokenError: an array whose head numpy takes apart as Python.
_DAMAGES = (
    OSError,
    ValueError,
    LookupError,
    EOFError,
    TypeError,
    RuntimeError,
    BadZipFile,
    TokenError,
    zlib.error,
)


@dataclass
class State:
    """How far a calibration is: `n_done` windows of the group at work are read.

    `groups`: the pairs of each pass over the text. By boundary, `wides`: what makes the wider
    input where there is one, `grams`: the sums of the group at work. `tensors`: the fits of the
    groups before it, by boundary and projection.
    """

    text: CalibrationText
    groups: tuple[tuple[Pair, ...], ...]
    group: int = 0
    n_done: int = 0
    wides: dict[int, WideInput] = field(default_factory=dict)
    grams: dict[int, Gram] = field(default_factory=dict)
    tensors: dict[tuple[int, Projection], list[NewTensor]] = field(default_factory=dict)


def save(path: Path, identity: str, state: State) -> None:
    """Write the state beside `path`, then replace it. Raises WriteError."""
    tensors = [(*key, each) for key, some in state.tensors.items() for each in some]
    head = {
        "identity": identity,
        "text": [state.text.name, state.text.sha256],
        "groups": state.groups,
        "counts": [state.group, state.n_done],
        "grams": [(boundary, list(gram.xy)) for boundary, gram in state.grams.items()],
        "tensors": [(*key, each.name, each.dims, each.type) for *key, each in tensors],
        "wides": [
            (boundary, wide.neurons and wide.neurons.is_gelu)
            for boundary, wide in state.wides.items()
        ],
    }
    arrays: dict[str, Any] = {"head": json.dumps(head), "windows": state.text.windows}
    for boundary, gram in state.grams.items():
        arrays[f"xx.{boundary}"] = gram.xx
        arrays |= {f"xy.{boundary}.{layer}": xy for layer, xy in gram.xy.items()}
    for boundary, wide in state.wides.items():
        arrays[f"previous.{boundary}"] = wide.previous
        if (made := wide.neurons) is not None:
            parts = {"gain": made.gain, "gate": made.gate, "up": made.up}
            arrays |= {f"{part}.{boundary}": array for part, array in parts.items()}
    for number, (*_, tensor) in enumerate(tensors):
        arrays[f"data.{number}"] = np.frombuffer(tensor.data, np.uint8)
    with replacing(path, force=True) as file:
        np.savez(file, **arrays)


def load(path: Path, identity: str) -> State | None:
    """Return the state that `save` wrote, None when there is no file.

    Raises CalibrationError when it is damaged, or of another model, text or setting.
    """
    if not path.exists():
        return None
    with _opened(path) as (head, arrays):
        if head["identity"] != identity:
            raise _cannot_resume(f"{path} belongs to another calibration")
        name, sha256 = head["text"]
        text = CalibrationText(name, sha256, arrays["windows"])
        state = State(text, _groups(head), *head["counts"])
        for boundary, layers in head["grams"]:
            xy = {layer: arrays[f"xy.{boundary}.{layer}"] for layer in layers}
            state.grams[boundary] = Gram(arrays[f"xx.{boundary}"], xy)
        for boundary, is_gelu in head["wides"]:
            neurons = None
            if is_gelu is not None:
                gain, gate, up = (arrays[f"{part}.{boundary}"] for part in ("gain", "gate", "up"))
                neurons = Neurons(gain, gate, up, is_gelu)
            state.wides[boundary] = WideInput(arrays[f"previous.{boundary}"], neurons)
        for number, (boundary, projection, tensor_name, dims, kind) in enumerate(head["tensors"]):
            data = arrays[f"data.{number}"].tobytes()
            tensor = NewTensor(tensor_name, tuple(dims), kind, data)
            state.tensors.setdefault((boundary, projection), []).append(tensor)
        return state


def kept_boundaries(path: Path) -> tuple[int, ...]:
    """Return the boundaries of the plans whose calibration is kept, none without a file.

    Raises CalibrationError when it is damaged.
    """
    if not path.exists():
        return ()
    with _opened(path) as (head, _):
        return tuple(dict.fromkeys(pair.boundary for group in _groups(head) for pair in group))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield json.loads(str(arrays["head"])), arrays
    except _DAMAGES as error:
        raise _cannot_resume(f"{path} is damaged") from error


def _groups(head: Any) -> tuple[tuple[Pair, ...], ...]:
    return tuple(tuple(Pair(*pair) for pair in group) for group in head["groups"])


def _cannot_resume(message: str) -> CalibrationError:
    return CalibrationError(
        message, "move it away, or do not resume, to start afresh", cause="cannot-resume"
    )

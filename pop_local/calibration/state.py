"""A calibration in progress, and the file that keeps it when it is stopped."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from converter.content import NewTensor
from converter.errors import WriteError
from converter.fit import Gram
from pop_local.calibration.needs import Pair
from pop_local.calibration.texts import CalibrationError, CalibrationText


@dataclass
class State:
    """How far a calibration is: the `grams` of the group at work after `n_done` windows.

    `groups`: the pairs of each pass over the text. `tensors`: those of the groups before the one at
    work, by boundary.
    """

    text: CalibrationText
    groups: tuple[tuple[Pair, ...], ...]
    group: int = 0
    n_done: int = 0
    grams: dict[Pair, Gram] = field(default_factory=dict)
    tensors: dict[int, list[NewTensor]] = field(default_factory=dict)


def save(path: Path, identity: str, state: State) -> None:
    """Write the state beside `path`, then replace it. Raises WriteError."""
    arrays: dict[str, Any] = {"windows": state.text.windows}
    for number, gram in enumerate(state.grams.values()):
        arrays[f"xx.{number}"], arrays[f"xy.{number}"] = gram.xx, gram.xy
    tensors = [(boundary, each) for boundary, some in state.tensors.items() for each in some]
    for number, (_, tensor) in enumerate(tensors):
        arrays[f"data.{number}"] = np.frombuffer(tensor.data, np.uint8)
    arrays["pairs"] = np.array(list(state.grams), np.int64).reshape(-1, 2)
    arrays["texts"] = np.array(
        [identity, state.text.name, state.text.sha256, *(tensor.name for _, tensor in tensors)]
    )
    arrays["groups"] = np.array(
        [(number, *pair) for number, group in enumerate(state.groups) for pair in group], np.int64
    )
    arrays["counts"] = np.array([state.group, state.n_done], np.int64)
    arrays["shapes"] = np.array(
        [[boundary, each.type, len(each.dims), *(*each.dims, 0)[:2]] for boundary, each in tensors],
        np.int64,
    ).reshape(-1, 5)
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    except OSError as error:
        raise WriteError(
            f"cannot write {path}: {error.strerror}", f"check the free space of {path.parent}"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def load(path: Path, identity: str) -> State | None:
    """Return the state that `save` wrote, None when there is no file.

    Raises CalibrationError when it is damaged, or of another model, text or setting.
    """
    if not path.exists():
        return None
    with _arrays(path) as arrays:
        found, name, sha256, *names = map(str, arrays["texts"])
        if found != identity:
            raise _cannot_resume(f"{path} belongs to another calibration")
        group, n_done = map(int, arrays["counts"])
        text = CalibrationText(name, sha256, arrays["windows"])
        state = State(text, _groups(arrays["groups"].tolist()), group, n_done)
        for number, pair in enumerate(arrays["pairs"].tolist()):
            gram = Gram.of(arrays[f"xx.{number}"], arrays[f"xy.{number}"])
            state.grams[Pair(*pair)] = gram
        rows = zip(names, arrays["shapes"].tolist(), strict=True)
        for number, (tensor_name, (boundary, kind, n_dims, *dims)) in enumerate(rows):
            data = arrays[f"data.{number}"].tobytes()
            tensor = NewTensor(tensor_name, tuple(dims[:n_dims]), kind, data)
            state.tensors.setdefault(boundary, []).append(tensor)
        return state


def kept_boundaries(path: Path) -> tuple[int, ...]:
    """Return the boundaries of the plans whose calibration is kept, none without a file.

    Raises CalibrationError when it is damaged.
    """
    if not path.exists():
        return ()
    with _arrays(path) as arrays:
        groups = _groups(arrays["groups"].tolist())
    return tuple(dict.fromkeys(pair.boundary for group in groups for pair in group))


@contextmanager
def _arrays(path: Path) -> Iterator[Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (OSError, ValueError, LookupError, EOFError, BadZipFile) as error:
        raise _cannot_resume(f"{path} is damaged") from error


def _groups(rows: list[list[int]]) -> tuple[tuple[Pair, ...], ...]:
    groups: list[list[Pair]] = []
    for number, *pair in rows:
        if number == len(groups):
            groups.append([])
        groups[number].append(Pair(*pair))
    return tuple(map(tuple, groups))


def _cannot_resume(message: str) -> CalibrationError:
    return CalibrationError(
        message, "delete it, or do not resume, to start afresh", cause="cannot-resume"
    )

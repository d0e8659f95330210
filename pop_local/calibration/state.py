"""A calibration in progress, and the file that keeps it when it is stopped."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from pop_converter.content import NewTensor
from pop_converter.errors import WriteError
from pop_converter.fit import Gram

from .texts import CalibrationError, CalibrationText

RESTART_HINT = "delete it, or leave out --resume, to start afresh"


@dataclass
class State:
    """`grams` of the group of layers at work, after `n_done` of the text's windows.

    `tensors`: those of the groups before it.
    """

    text: CalibrationText
    group: int = 0
    n_done: int = 0
    grams: dict[int, Gram] = field(default_factory=dict)
    tensors: list[NewTensor] = field(default_factory=list)


def save(path: Path, identity: str, state: State) -> None:
    """Write beside `path`, then replace it. Raises WriteError."""
    arrays: dict[str, Any] = {"windows": state.text.windows}
    for layer, gram in state.grams.items():
        arrays[f"xx.{layer}"], arrays[f"xy.{layer}"] = gram.xx, gram.xy
    for number, tensor in enumerate(state.tensors):
        arrays[f"data.{number}"] = np.frombuffer(tensor.data, np.uint8)
    arrays["layers"] = np.array(list(state.grams), np.int64)
    arrays["texts"] = np.array(
        [identity, state.text.name, state.text.sha256, *(tensor.name for tensor in state.tensors)]
    )
    arrays["counts"] = np.array([state.group, state.n_done], np.int64)
    arrays["shapes"] = np.array(
        [[tensor.type, len(tensor.dims), *(*tensor.dims, 0)[:2]] for tensor in state.tensors],
        np.int64,
    ).reshape(-1, 4)
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
    """The state that `save` wrote, None when there is no file.

    Raises CalibrationError when it is damaged, or of another model, text or setting.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found, name, sha256, *names = map(str, arrays["texts"])
            if found != identity:
                raise CalibrationError(f"{path} belongs to another calibration", RESTART_HINT)
            group, n_done = map(int, arrays["counts"])
            state = State(CalibrationText(name, sha256, arrays["windows"]), group, n_done)
            for layer in map(int, arrays["layers"]):
                state.grams[layer] = Gram.of(arrays[f"xx.{layer}"], arrays[f"xy.{layer}"])
            for number, (tensor_name, shape) in enumerate(
                zip(names, arrays["shapes"], strict=True)
            ):
                kind, n_dims, *dims = map(int, shape)
                data = arrays[f"data.{number}"].tobytes()
                state.tensors.append(NewTensor(tensor_name, tuple(dims[:n_dims]), kind, data))
            return state
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise CalibrationError(f"{path} is damaged", RESTART_HINT) from error

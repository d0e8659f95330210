"""What a conversion writes: a copy of the model, or a sidecar beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from converter.format import PopMeta
from converter.plan import Plan
from converter.rewrite import Sizes, convert, measure
from converter.sidecar import measure_sidecar, sidecar_path, write_sidecar
from converter.source import Source
from pop_local.models.stored import ModelFiles

OutputName = Literal["copy", "sidecar"]


@dataclass(frozen=True)
class Output:
    """One kind of output.

    `stage` names what writing it takes, `write` is the converter's function that does, and
    `files(source, written)` are what to open then.
    """

    name: OutputName
    stage: str
    measure: Callable[[Plan, Path, str], Sizes]
    default_path: Callable[[Source], Path]
    write: Callable[..., PopMeta]
    files: Callable[[Path, Path], ModelFiles]


def _copy_path(source: Source) -> Path:
    return source.first.path.with_name(f"{Path(source.name).stem}.pop.gguf")


_COPIED = "Writing, then reading back"
OUTPUTS: dict[OutputName, Output] = {
    "copy": Output(
        "copy", _COPIED, measure, _copy_path, convert, lambda src, written: ModelFiles(written)
    ),
    "sidecar": Output(
        "sidecar", "Reading the model", measure_sidecar, sidecar_path, write_sidecar, ModelFiles
    ),
}

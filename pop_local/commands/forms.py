"""What a conversion writes: a copy of the model, or a sidecar beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from converter.format import PopMeta
from converter.plan import Plan
from converter.rewrite import Examine, Fitted, Progress, Sizes, convert, measure
from converter.sidecar import measure_sidecar, sidecar_path, write_sidecar
from converter.source import Source
from pop_local.models.files import ModelFiles


class Writer(Protocol):
    """`convert` and `write_sidecar` of the converter."""

    def __call__(
        self,
        plan: Plan,
        src: Path,
        dst: Path,
        *,
        fitted: Fitted | None,
        examine: Examine | None,
        progress: Progress,
        force: bool,
    ) -> PopMeta: ...


@dataclass(frozen=True)
class Form:
    """`files`: what to open, from the source and what was written."""

    name: str
    progress: str
    measure: Callable[[Plan, Path, str], Sizes]
    default_path: Callable[[Source], Path]
    write: Writer
    files: Callable[[Path, Path], ModelFiles]


def _copy_path(source: Source) -> Path:
    return source.first.path.with_name(f"{Path(source.name).stem}.pop.gguf")


COPY = Form(
    "copy",
    "Writing, then reading back",
    measure,
    _copy_path,
    convert,
    lambda src, written: ModelFiles(written),
)
SIDECAR = Form(
    "sidecar", "Reading the model", measure_sidecar, sidecar_path, write_sidecar, ModelFiles
)

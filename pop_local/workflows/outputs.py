"""What a conversion writes: a copy of the model, or a sidecar beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from converter.format import PopMeta
from converter.plan import Plan
from converter.rewrite import Examine, Fitted, Sizes, convert, measure
from converter.rewrite import Progress as BytesProgress
from converter.sidecar import measure_sidecar, sidecar_path, write_sidecar
from converter.source import Source
from pop_local.models.stored import ModelFiles

OutputName = Literal["copy", "sidecar"]


class Writer(Protocol):
    """`rewrite.convert` and `sidecar.write_sidecar` of the converter."""

    def __call__(
        self,
        plan: Plan,
        src: Path,
        dst: Path,
        *,
        fitted: Fitted | None,
        examine: Examine | None,
        progress: BytesProgress,
        force: bool,
    ) -> PopMeta: ...


@dataclass(frozen=True)
class Output:
    """One kind of output.

    `stage` names what writing it takes, `files(source, written)` are what to open then.
    """

    name: OutputName
    stage: str
    measure: Callable[[Plan, Path, str], Sizes]
    default_path: Callable[[Source], Path]
    write: Writer
    files: Callable[[Path, Path], ModelFiles]


def _copy_path(source: Source) -> Path:
    return source.first.path.with_name(f"{Path(source.name).stem}.pop.gguf")


COPY = Output(
    "copy",
    "Writing, then reading back",
    measure,
    _copy_path,
    convert,
    lambda src, written: ModelFiles(written),
)
SIDECAR = Output(
    "sidecar", "Reading the model", measure_sidecar, sidecar_path, write_sidecar, ModelFiles
)
OUTPUTS: dict[OutputName, Output] = {output.name: output for output in (COPY, SIDECAR)}

"""Kinds of output: a converted copy, and a sidecar of the unchanged model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pop_converter.fit.least_squares import KvType
from pop_converter.gguf.source import Source
from pop_converter.popfile import rewrite
from pop_converter.popfile.format import PopMeta
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import FileSizes, measure
from pop_converter.popfile.sidecar import measure_sidecar, sidecar_path, write_sidecar
from pop_local.models.model_files import ModelFiles

OutputName = Literal["copy", "sidecar"]


@dataclass(frozen=True)
class Output:
    """A kind of output. `files(source, written)`: the files to open. `stage`: its stage's name."""

    name: OutputName
    stage: str
    measure: Callable[[Plan, Path, KvType], FileSizes]
    default_path: Callable[[Source], Path]
    write: Callable[..., PopMeta]
    files: Callable[[Path, Path], ModelFiles]


def _copy_path(source: Source) -> Path:
    return source.first.path.with_name(f"{Path(source.name).stem}.pop.gguf")


OUTPUTS: dict[OutputName, Output] = {
    "copy": Output(
        "copy",
        "Writing, then reading back",
        measure,
        _copy_path,
        rewrite.convert,
        lambda src, written: ModelFiles(written),
    ),
    "sidecar": Output(
        "sidecar", "Reading the model", measure_sidecar, sidecar_path, write_sidecar, ModelFiles
    ),
}

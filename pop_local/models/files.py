"""The files that are one model."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelFiles:
    """A model, and the sidecar that says how it is pruned if it does not say so itself."""

    path: Path
    sidecar: Path | None = None

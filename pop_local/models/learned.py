"""Find the files of online calibration: each model's sums, and the sidecar built from the sums."""

import glob
from dataclasses import dataclass
from pathlib import Path

from pop_converter.gguf.source import Source, sampled_sha256
from pop_converter.popfile.sidecar import SUFFIX
from pop_local.config.settings import learned_dir

SUMS = ".sums.npz"


@dataclass(frozen=True)
class LearnedFiles:
    """Paths of one model's learned files, which may not exist. `name` contains a hash."""

    name: str

    @classmethod
    def of(cls, base: Source) -> "LearnedFiles":
        return cls(f"{Path(base.name).stem}-{sampled_sha256(base)[:16]}")

    @property
    def sums(self) -> Path:
        return learned_dir() / f"{self.name}{SUMS}"

    @property
    def sidecar(self) -> Path:
        return learned_dir() / f"{self.name}{SUFFIX}"

    @property
    def size_bytes(self) -> int:
        """The total size in bytes of the model's learned files."""
        return sum(path.stat().st_size for path in (self.sums, self.sidecar) if path.exists())

    def forget(self) -> None:
        """Remove the model's learned files, including temporary files."""
        for path in learned_dir().glob(f"{glob.escape(self.name)}.*"):
            path.unlink(missing_ok=True)


def learned_files() -> list[LearnedFiles]:
    """Return the learned files of every model."""
    endings = (SUMS, SUFFIX)
    names = {
        path.name.removesuffix(ending)
        for ending in endings
        for path in learned_dir().glob(f"*{ending}")
    }
    return [LearnedFiles(name) for name in sorted(names)]

"""The folder of what was learned: of each model its sums, and the sidecar that was made of them."""

import glob
from dataclasses import dataclass
from pathlib import Path

from pop_converter.gguf.source import Source, sampled_sha256
from pop_converter.popfile.sidecar import SUFFIX
from pop_local.config.settings import learned_dir

SUMS = ".sums.npz"


@dataclass(frozen=True)
class LearnedFiles:
    """The files of one model, by its name and hash; they need not be there."""

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
        """The size of both, as far as they are there."""
        return sum(path.stat().st_size for path in (self.sums, self.sidecar) if path.exists())

    def forget(self) -> None:
        """Remove both, and what belongs to them."""
        for path in learned_dir().glob(f"{glob.escape(self.name)}.*"):
            path.unlink(missing_ok=True)


def learned_files() -> list[LearnedFiles]:
    """Return the models of which something was learned here."""
    endings = (SUMS, SUFFIX)
    names = {
        path.name.removesuffix(ending)
        for ending in endings
        for path in learned_dir().glob(f"*{ending}")
    }
    return [LearnedFiles(name) for name in sorted(names)]

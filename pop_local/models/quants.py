"""Choose a model and its mmproj from a repository's GGUF files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pop_base.errors import PopError
from pop_converter.gguf.source import part_names, part_of
from pop_local.models.mmproj_files import n_shared
from pop_local.models.model_files import SUFFIX

# The first match is the default quantization. Small types with good quality come first, then larger
# types, and finally types that reduce quality or waste space.
PREFERRED = (
    *("Q4_K_M", "Q4_K_S", "Q4_K_L", "IQ4_XS", "IQ4_NL", "Q4_1", "Q4_0"),
    *("Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q6_K", "Q8_0"),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "Q2_K", "BF16", "F16", "F32"),
)
# GGUF files that are not language models: image encoders and calibration statistics.
_HELPERS = re.compile(r"mmproj|imatrix", re.IGNORECASE)
# Types of mmprojs, smallest first.
_MMPROJ_TYPES = ("Q8_0", "F16", "BF16", "F32")
_MAX_LISTED = 40


@dataclass(frozen=True)
class QuantFile:
    """A model in a repository. `name` has no suffix, and `files` lists the parts in order."""

    name: str
    files: tuple[str, ...]


def _complete_models(files: Sequence[str]) -> list[QuantFile]:
    """Return the models and helper files whose parts are all in the repository."""
    by_name = {usual_ending(file): file for file in files if file.lower().endswith(SUFFIX)}
    models = []
    for name in sorted(by_name):
        part = part_of(name)
        names = part_names(part.stem, part.count) if part else [name]
        if name == names[0] and by_name.keys() >= set(names):
            stem = part.stem if part else name.removesuffix(SUFFIX)
            models.append(QuantFile(stem, tuple(by_name[part_name] for part_name in names)))
    return models


def choose_mmproj(files: Sequence[str], model: str) -> str | None:
    """Return the mmproj for a model file, or None if the repository has none.

    Prefers files in the model's folder, then files with more similar names, and then files with
    smaller data types.
    """
    of = PurePosixPath(model)

    def distance(path: PurePosixPath) -> tuple[bool, int, int, str]:
        kinds = [bool(_word(kind).search(path.name.lower())) for kind in _MMPROJ_TYPES]
        kind = [*kinds, True].index(True)
        return path.parent != of.parent, -n_shared(path.name, of.name), kind, path.name

    paths = [PurePosixPath(file) for file in files if file.lower().endswith(SUFFIX)]
    paths = [path for path in paths if "mmproj" in path.name.lower()]
    return str(min(paths, key=distance)) if paths else None


def usual_ending(file: str) -> str:
    """Return the name with its suffix in lowercase, as llama.cpp requires for split models."""
    return file[: -len(SUFFIX)] + SUFFIX


def choose(repo: str, files: Sequence[str], name: str) -> QuantFile:
    """Return the model whose name contains `name`, or the default model if `name` is "".

    Raises PopError unless exactly one model matches. The error's hint lists the models, if any.
    """
    candidates = _complete_models(files)
    if not candidates:
        raise PopError(
            f"{repo} contains no complete GGUF model", "search for a repository with GGUF files"
        )
    models = [choice for choice in candidates if not _HELPERS.search(choice.name)]
    if not name and len(models) != 1:
        candidates = models
        name = next((quant for quant in PREFERRED if _matching(models, quant)), "")
        if not name:
            raise PopError(f"{repo} contains multiple models", _listed(repo, models))
    matches = _named(candidates, models, name) if name else models
    if not matches:
        raise PopError(f"{repo} contains no file named {name!r}", _listed(repo, models))
    if len(matches) > 1:
        raise PopError(f"{name!r} matches {len(matches)} files in {repo}", _listed(repo, matches))
    return matches[0]


def _named(candidates: list[QuantFile], models: list[QuantFile], name: str) -> list[QuantFile]:
    exact = [choice for choice in candidates if name in (choice.name, *choice.files)]
    stem = name.lower().removesuffix(".gguf")
    by_file_name = [c for c in candidates if c.name.lower().rpartition("/")[2] == stem]
    return exact or by_file_name or _matching(models, name)


def _matching(models: list[QuantFile], name: str) -> list[QuantFile]:
    """Return the models whose names contain `name` as a word or, failing that, as a substring."""
    contained = [choice for choice in models if name.lower() in choice.name.lower()]
    whole = [choice for choice in contained if _word(name).search(choice.name.lower())]
    return whole or contained


def _word(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-z0-9]){re.escape(text.lower())}(?![a-z0-9_])")


def _listed(repo: str, models: Sequence[QuantFile]) -> str:
    names = [choice.name for choice in models[:_MAX_LISTED]]
    more = f" and {len(models) - len(names)} more" if len(models) > len(names) else ""
    return f"pass hf:{repo}:NAME with one of these names: {', '.join(names)}{more}"

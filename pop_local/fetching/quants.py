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
    found = []
    for name in sorted(by_name):
        part = part_of(name)
        names = part_names(part.stem, part.count) if part else [name]
        if name == names[0] and by_name.keys() >= set(names):
            stem = part.stem if part else name.removesuffix(SUFFIX)
            found.append(QuantFile(stem, tuple(by_name[each] for each in names)))
    return found


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

    found = [PurePosixPath(file) for file in files if file.lower().endswith(SUFFIX)]
    found = [path for path in found if "mmproj" in path.name.lower()]
    return str(min(found, key=distance)) if found else None


def usual_ending(file: str) -> str:
    """Return the name with its suffix in lowercase, as llama.cpp requires for split models."""
    return file[: -len(SUFFIX)] + SUFFIX


def choose(repo: str, files: Sequence[str], wanted: str) -> QuantFile:
    """Return the model whose name contains `wanted`, or the default model if `wanted` is "".

    Raises PopError unless exactly one model matches. The error's hint lists the models, if any.
    """
    known = _complete_models(files)
    if not known:
        raise PopError(
            f"{repo} contains no complete GGUF model", "search for a repository with GGUF files"
        )
    models = [choice for choice in known if not _HELPERS.search(choice.name)]
    if not wanted and len(models) != 1:
        known = models
        wanted = next((quant for quant in PREFERRED if _matching(models, quant)), "")
        if not wanted:
            raise PopError(f"{repo} contains multiple models", _listed(repo, models))
    found = _named(known, models, wanted) if wanted else models
    if not found:
        raise PopError(f"{repo} contains no file named {wanted!r}", _listed(repo, models))
    if len(found) > 1:
        raise PopError(f"{wanted!r} matches {len(found)} files in {repo}", _listed(repo, found))
    return found[0]


def _named(known: list[QuantFile], models: list[QuantFile], wanted: str) -> list[QuantFile]:
    exact = [choice for choice in known if wanted in (choice.name, *choice.files)]
    stem = wanted.lower().removesuffix(".gguf")
    by_file_name = [c for c in known if c.name.lower().rpartition("/")[2] == stem]
    return exact or by_file_name or _matching(models, wanted)


def _matching(models: list[QuantFile], wanted: str) -> list[QuantFile]:
    """Return the models whose names contain `wanted` as a word or, failing that, as a substring."""
    contained = [choice for choice in models if wanted.lower() in choice.name.lower()]
    whole = [choice for choice in contained if _word(wanted).search(choice.name.lower())]
    return whole or contained


def _word(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-z0-9]){re.escape(text.lower())}(?![a-z0-9_])")


def _listed(repo: str, models: Sequence[QuantFile]) -> str:
    names = [choice.name for choice in models[:_MAX_LISTED]]
    more = f" and {len(models) - len(names)} more" if len(models) > len(names) else ""
    return f"pass hf:{repo}:NAME with one of these names: {', '.join(names)}{more}"

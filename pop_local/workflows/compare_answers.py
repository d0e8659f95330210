"""Comparison of full and pruned answers to the user's prompts, which can be resumed."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pop_converter.base.errors import PopError, StoppedError, WriteError
from pop_converter.base.files import read_file
from pop_converter.base.output_file import replacing
from pop_converter.base.progress import counting
from pop_converter.gguf.source import read_source
from pop_converter.popfile.sidecar import pop_of
from pop_local.engine.images.mmproj import fingerprint
from pop_local.measure.compared_prompts import (
    Answered,
    Comparison,
    PromptFile,
    answered,
    compared,
    read_prompts,
)
from pop_local.models.mmproj_files import find_mmproj
from pop_local.models.model_files import ModelFiles
from pop_local.workflows.events import Watch
from pop_local.workflows.hardware import Hardware
from pop_local.workflows.measuring import opened
from pop_local.workflows.open import model_files

MAX_TOKENS = 256
_MODES = {"full": False, "pruned": True}


@dataclass(frozen=True)
class CompareOptions:
    """Options of a comparison.

    `max_tokens`: maximum length of the greedy answers. `n_ctx`: context length in tokens (default:
    as for a chat). `answers`: a file that stores the answers, to resume from. `mmproj`: default:
    the one next to the model.
    """

    max_tokens: int = MAX_TOKENS
    n_ctx: int | None = None
    answers: Path | None = None
    mmproj: Path | None = None


def compare_answers(
    model: str | os.PathLike[str],
    prompts: str | os.PathLike[str],
    options: CompareOptions = CompareOptions(),
    *,
    sidecar: Path | None = None,
    hardware: Hardware = Hardware(),
    watch: Watch = Watch(),
) -> Comparison:
    """Answer all prompts of a file (`read_prompts`) in full, then pruned, and compare.

    The model must be converted. Consecutive prompts share the reading of a common prefix. Raises
    PopError, StoppedError.
    """
    given = read_prompts(Path(prompts))
    files = model_files(os.fspath(model), sidecar, watch)
    mmproj = options.mmproj or find_mmproj(files.path)
    kept = _Kept(options.answers, _identity(files, mmproj, given, options.max_tokens))
    seeing = {"n_ctx": options.n_ctx, "mmproj": mmproj}
    with opened(files, hardware, watch, **seeing) as loaded:
        try:
            for mode, is_pruning in _MODES.items():
                loaded.pruning = is_pruning
                ran = counting(len(given.prompts), watch.stage(f"Answering, {mode}"))
                for prompt in given.prompts:
                    if (mode, prompt.line) not in kept.found:
                        kept.add(mode, prompt.line, answered(loaded, prompt, options.max_tokens))
                    ran(1)
        except (KeyboardInterrupt, StoppedError):
            if (path := options.answers) is not None:
                watch.on_note(
                    f"{path} has {len(kept.found)} answers. Run the same command again to resume."
                )
            raise
        found = tuple(
            compared(loaded, prompt, *(kept.found[mode, prompt.line] for mode in _MODES))
            for prompt in given.prompts
        )
    return Comparison(given, found)


def _identity(
    files: ModelFiles, mmproj: Path | None, given: PromptFile, max_tokens: int
) -> dict[str, Any]:
    """Return everything that answers depend on. Raises PopError for an unconverted model."""
    source = read_source(files.path)
    meta = pop_of(source, files.sidecar)
    if meta is None:
        raise PopError(
            f"{source.first.path} is not converted, so there is nothing to compare",
            "convert it",
            cause="not-converted",
            model=source.first.path,
        )
    has_pictures = any(each.pictures for prompt in given.prompts for each in prompt.messages)
    return {
        "model": meta.source_sha256,
        "mmproj": fingerprint(mmproj) if mmproj and has_pictures else None,
        # Includes the measured quality, which differs between two fits.
        "conversion": hashlib.sha256(repr(meta).encode()).hexdigest(),
        "prompts": given.sha256,
        "max_tokens": max_tokens,
    }


class _Kept:
    """The answers so far, by mode and line, and the file that stores them.

    Raises PopError if the file belongs to another comparison.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self.found: dict[tuple[str, int], Answered] = {}
        self._path = path
        if path is None:
            return
        if path.exists():
            self._load(path, identity)
        with replacing(path, force=True) as file:
            file.write(_json_line(identity))
            file.writelines(_entry(*key, answer) for key, answer in self.found.items())

    def add(self, mode: str, line: int, answer: Answered) -> None:
        self.found[mode, line] = answer
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                file.write(_entry(mode, line, answer))
        except OSError as error:
            raise WriteError(f"cannot write {self._path}: {error.strerror}") from error

    def _load(self, path: Path, identity: dict[str, Any]) -> None:
        # A line that was cut off when the machine was is given again.
        whole = read_file(path).decode("utf-8", errors="replace").rpartition("\n")[0].splitlines()
        try:
            head, *entries = map(json.loads, whole)
            for entry in entries:
                key = (entry.pop("mode"), entry.pop("line"))
                self.found[key] = _checked(Answered(**entry))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _foreign(path) from error
        if head != identity:
            raise _foreign(path)


def _checked(answer: Answered) -> Answered:
    """Raises TypeError and ValueError for what is no answer."""
    for field in fields(answer):
        if type(getattr(answer, field.name)) is not field.type:
            raise TypeError
    answer.text.encode()
    return answer


def _entry(mode: str, line: int, answer: Answered) -> bytes:
    return _json_line({"mode": mode, "line": line, **asdict(answer)})


def _json_line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _foreign(path: Path) -> PopError:
    return PopError(
        f"{path} does not hold answers of this model to these prompts",
        "give another file, or move this one away",
    )

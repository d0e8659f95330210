"""Compare full and pruned answers to the user's prompts."""

import os
from pathlib import Path

from pop_base.progress import Watch, counting
from pop_converter.gguf.source import read_source
from pop_converter.popfile.sidecar import pop_of
from pop_local.measure.compare import Comparison, answer_prompt, compare_pair, read_prompts
from pop_local.models.mmproj_files import find_mmproj
from pop_local.workflows.hardware import Hardware
from pop_local.workflows.measuring import not_converted, opened
from pop_local.workflows.open import model_files


def compare_answers(
    model: str | os.PathLike[str],
    prompts: str | os.PathLike[str],
    *,
    max_tokens: int = 256,
    n_ctx: int | None = None,
    sidecar: Path | None = None,
    mmproj: Path | None = None,
    hardware: Hardware = Hardware(),
    watch: Watch = Watch(),
) -> Comparison:
    """For each prompt in a file (see `read_prompts`), compare the full and the pruned answer.

    The model must be converted. A prefix shared by consecutive prompts is prefilled only once.
    `max_tokens` limits the length of each answer. `n_ctx` is the context length in tokens
    (default: the model's context length or 8,192, whichever is smaller). `mmproj` is the image
    encoder (default: the mmproj next to the model). Raises PopError or StoppedError.
    """
    prompt_file = read_prompts(Path(prompts))
    files = model_files(os.fspath(model), sidecar, watch)
    if pop_of(read_source(files.path), files.sidecar) is None:
        why = ", so there is nothing to compare"
        raise not_converted(model=files.path, cause="not-converted", consequence=why)
    mmproj = mmproj or find_mmproj(files.path)
    with opened(files, hardware, watch, n_ctx=n_ctx, mmproj=mmproj) as loaded:
        both = []
        for name, is_pruning in (("full", False), ("pruned", True)):
            loaded.pruning = is_pruning
            ran, answers = counting(len(prompt_file.prompts), watch.stage(f"Answering, {name}")), []
            for prompt in prompt_file.prompts:
                answers.append(answer_prompt(loaded, prompt, max_tokens))
                ran(1)
            both.append(answers)
        triples = zip(prompt_file.prompts, *both, strict=True)
        return Comparison(prompt_file, tuple(compare_pair(loaded, *triple) for triple in triples))

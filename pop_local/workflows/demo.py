"""Answer a question about a long document with and without pruning to show the speedup."""

import importlib.resources
from dataclasses import dataclass, replace
from statistics import median

from pop_base.errors import PopError
from pop_base.progress import Watch
from pop_converter.architecture.work import speedup_limit
from pop_converter.popfile.pruning_plan import require_prunable
from pop_local.engine.chat_messages import Message
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.engine.prompt.prompt import Prompt
from pop_local.measure.speed import Spread, spread
from pop_local.workflows.measuring import not_converted

# Maximum length of an answer in tokens.
MAX_TOKENS = 32
WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class TimedAnswer:
    """A demonstration's answer. `ttft_s` is the median time to first token over all pairs."""

    text: str
    ttft_s: float
    n_pruned: int
    n_full: int


@dataclass(frozen=True)
class Demonstration:
    """An answer from full reading, an answer from pruned reading, and the measured speedup.

    `limit` is the maximum speedup, computed from the multiply-accumulate counts of both prefills.
    """

    model: str
    boundary: int
    n_layer: int
    question: str
    n_prompt: int
    full: TimedAnswer
    pop: TimedAnswer
    n_pairs: int
    speedup: Spread
    limit: float


def demonstrate(opened: PopModel, n_pairs: int, watch: Watch) -> Demonstration:
    """Answer the question `n_pairs` times with pruning and `n_pairs` times without pruning.

    The order is reversed after each pair. Leaves pruning on. Raises StoppedError. Raises PopError
    if the model has not been converted, or if the row counters show unexpected values.
    """
    files, boundary = opened.engine.context.files, opened.engine.sequences[0].settings.boundary
    if opened.engine.sequences[0].settings.exact:
        require_prunable(files.shape)
    if files.meta is None:
        raise not_converted(model=files.path, cause="not-converted")
    # The first run is slower, because it reads the weights from the disk.
    tokens = opened.engine.context.vocabulary.tokenize(_text("document.md"))
    opened.read(Prompt(tokens[:WARM_UP_TOKENS]))
    pairs = []
    for pair in range(n_pairs):
        order = [Mode.CONTEXT, Mode.OFF] if pair % 2 else [Mode.OFF, Mode.CONTEXT]
        nth = f"{pair + 1} of {n_pairs}"
        answers = {mode: _answer(opened, mode, nth, watch) for mode in order}
        pairs.append((answers[Mode.OFF], answers[Mode.CONTEXT]))
    opened.engine.set_mode(Mode.CONTEXT)
    full, pop = pairs[0]
    return Demonstration(
        model=str(files.path),
        boundary=boundary,
        n_layer=files.shape.n_layer,
        question=_text("question.md"),
        n_prompt=full.n_full,
        full=replace(full, ttft_s=median(run.ttft_s for run, _ in pairs)),
        pop=replace(pop, ttft_s=median(run.ttft_s for _, run in pairs)),
        n_pairs=n_pairs,
        speedup=spread(full.ttft_s / pop.ttft_s for full, pop in pairs),
        limit=speedup_limit(files.macs, full.n_full, boundary, pop.n_full),
    )


def _text(name: str) -> str:
    file = importlib.resources.files("pop_local") / "data" / name
    return file.read_text(encoding="utf-8").strip()


def _answer(opened: PopModel, mode: Mode, nth: str, watch: Watch) -> TimedAnswer:
    opened.engine.set_mode(mode)
    opened.engine.sequences[0].cache.clear()
    prompt = f"{_text('document.md')}\n\n{_text('question.md')}"
    what = "Full reading" if mode is Mode.OFF else "Fast reading"
    chunks = list(
        opened.ask(
            [Message("user", prompt)],
            temperature=0.0,
            max_tokens=MAX_TOKENS,
            on_prefill=watch.stage(f"{what}, {nth}"),
        )
    )
    stats = chunks[-1].stats
    assert stats is not None
    if (stats.n_pruned > 0) is (mode is Mode.OFF):
        raise PopError(f"the demonstration is invalid: {stats.n_pruned} tokens skipped layers")
    text = "".join(chunk.text for chunk in chunks).strip()
    return TimedAnswer(text, stats.ttft_s, stats.n_pruned, stats.n_full)

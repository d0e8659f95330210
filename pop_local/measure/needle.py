"""A fact hidden at several depths of a long document, asked for at the end, answered freely."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from converter.errors import PopError
from converter.progress import Progress, counting
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.plan import plan_prefill
from pop_local.engine.turn import Message, TurnStats
from pop_local.measure.heldout import shipped_part

N_TOKENS = 1024
MAX_ANSWER_TOKENS = 32
# What a template, the fact and the question add to the document.
_N_AROUND = 128

_PLACES = ("seed vault", "north lighthouse", "bell tower", "ferry office", "glass workshop")
_FACT = "The access code of the {place} is {code}."
_COMPLETION = "{document}\n\nThe access code of the {place} is"
_QUESTION = "{document}\n\nWhat is the access code of the {place}? Answer with the code only."


@dataclass(frozen=True)
class Needle:
    """How many of `n` answers contained the fact; the document has about `n_tokens`."""

    n: int
    n_tokens: int
    full_hits: int
    pruned_hits: int


@dataclass(frozen=True)
class _Hidden:
    document: str
    place: str
    code: str


def context_tokens() -> int:
    """Return the context in tokens that `measure_needle` needs at least."""
    return N_TOKENS + _N_AROUND + MAX_ANSWER_TOKENS


def measure_needle(
    model: PopModel,
    boundaries: Sequence[int],
    n_facts: int,
    seed: int,
    on_progress: Progress,
) -> tuple[Needle, ...]:
    """Ask for each fact, in full once and pruned at each boundary.

    At boundaries other than the file's the projections are the layers' own. A model without a chat
    template completes a sentence instead. `on_progress` gets (done_answers, total_answers). Mode
    and boundary are as before afterwards. Raises PopError when an answer's prompt was not pruned as
    planned.
    """
    mode, boundary = model.pop_mode, model.boundary
    hidden = _hide(model, n_facts, seed)
    ran = counting(n_facts * (1 + len(boundaries)), on_progress)

    def hits(mode: Mode) -> int:
        model.set_pop(mode)
        found = 0
        for fact in hidden:
            found += fact.code in _answer(model, fact)
            ran(1)
        return found

    try:
        full_hits = hits(Mode.OFF)
        results = []
        for depth in boundaries:
            model.set_boundary(depth)
            results.append(Needle(n_facts, N_TOKENS, full_hits, hits(Mode.CONTEXT)))
        return tuple(results)
    finally:
        model.set_boundary(boundary)
        model.set_pop(mode)


def _hide(model: PopModel, n_facts: int, seed: int) -> list[_Hidden]:
    """Put each fact into the middle of its share of the document's paragraphs."""
    rng = np.random.default_rng(seed)
    paragraphs = _document(model)
    hidden = []
    for i in range(n_facts):
        place, code = _PLACES[i % len(_PLACES)], str(rng.integers(1000, 10_000))
        at = round(len(paragraphs) * (i + 0.5) / n_facts)
        fact = _FACT.format(place=place, code=code)
        document = "\n\n".join([*paragraphs[:at], fact, *paragraphs[at:]])
        hidden.append(_Hidden(document, place, code))
    return hidden


def _document(model: PopModel) -> list[str]:
    """Return the beginning of the shipped prose, as many paragraphs as N_TOKENS hold."""
    paragraphs: list[str] = []
    n_tokens = 0
    for paragraph in shipped_part("prose").split("\n\n"):
        n_tokens += len(model.tokenize(paragraph.encode(), add_bos=False)) + 2
        if n_tokens > N_TOKENS:
            break
        paragraphs.append(paragraph.strip())
    return paragraphs


def _answer(model: PopModel, hidden: _Hidden) -> str:
    model.clear()
    if "tokenizer.chat_template" in model.metadata:
        text = _QUESTION.format(document=hidden.document, place=hidden.place)
        chunks = model.chat_turn(
            [Message("user", text)], temperature=0.0, max_tokens=MAX_ANSWER_TOKENS
        )
    else:
        text = _COMPLETION.format(document=hidden.document, place=hidden.place)
        chunks = model.continue_text(text, temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
    parts = []
    for chunk in chunks:
        parts.append(chunk.text)
        if chunk.stats is not None:
            _require(model, chunk.stats)
    return "".join(parts)


def _require(model: PopModel, stats: TurnStats) -> None:
    plan = plan_prefill(0, stats.n_prompt, model.rule, model.n_batch)
    expected = plan.n_pruned if model.pop_mode is Mode.CONTEXT else 0
    if stats.n_pruned != expected:
        raise PopError(
            f"the measurement does not hold: of {stats.n_prompt} prompt tokens {expected} should be"
            f" pruned; the backend counted {stats.n_pruned}"
        )

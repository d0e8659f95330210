"""The output of `compare`: a JSON object, or a report with a table, details, and a verdict."""

from __future__ import annotations

from dataclasses import asdict
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from pop_local.measure.verdict import comparison_in_words
from pop_local.ui.tables import Column, Fact, fields_of, print_facts, print_sentence, print_table
from pop_local.ui.views.eval import with_advice

if TYPE_CHECKING:
    from pop_local.measure.compare import Compared, Comparison

_N_SHOWN = 60
_N_SHARED = 15


def show_comparison(found: Comparison, *, as_markdown: bool = False) -> None:
    if found.different:
        print_table(_COLUMNS, found.different, as_markdown=as_markdown)
        print_sentence("")
    n = len(found.answers)
    facts: list[Fact] = [
        ("Prompts", f"{found.prompts.name}: {n} prompt{'s' * (n != 1)}, greedy decoding"),
        ("Same answer", f"{n - len(found.different)} of {n}"),
    ]
    if found.n_judged:
        n_all = found.n_judged
        right = f"full reading: {found.full_hits} of {n_all}, fast reading: {found.pruned_hits}"
        facts.append(("Correct answers", f"{right} of {n_all}"))
        only = f"correct only with full reading: {found.n_only_full}"
        facts.append(("", f"{only}, correct only with fast reading: {found.n_only_pruned}"))
        odds = "the probability that chance alone would produce a difference this large"
        facts.append(("", f"p = {found.p_value:.2g}, {odds} (McNemar's exact test)"))
    if found.n_unpruned < n:
        ratio = found.full_ttft_s / found.pruned_ttft_s
        fast = f"fast reading: {found.pruned_ttft_s:.2f} s ({ratio:.2f}x)"
        times = f"full reading: {found.full_ttft_s:.2f} s, {fast}. Each prompt was timed once."
        facts.append(("Time to first token", times))
    if found.n_unpruned:
        why = "Short or mostly cached prompts are always read in full."
        facts.append(("Read in full", f"{found.n_unpruned} of {n} prompts. {why}"))
    if found.n_unpruned == n:
        facts.append(("Speedup", "not measured, because no prompt used fast reading"))
    print_facts(facts)
    print_sentence(with_advice(comparison_in_words(found)))


def comparison_json(found: Comparison) -> dict[str, Any]:
    return {
        "prompts": {"name": found.prompts.name},
        "n": len(found.answers),
        "n_same": len(found.answers) - len(found.different),
        **fields_of(found, "n_judged", "full_hits", "pruned_hits", "n_only_full", "n_only_pruned"),
        "p_value": found.p_value,
        "verdict": with_advice(comparison_in_words(found)),
        **fields_of(found, "full_ttft_s", "pruned_ttft_s", "n_unpruned"),
        "answers": [asdict(each) for each in found.answers],
    }


def _shown(each: Compared, text: str) -> str:
    """Return an excerpt of `text` around the first difference between the answers."""
    pairs = zip(each.full.text, each.pruned.text, strict=False)
    n_alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    start = max(0, n_alike - _N_SHARED)
    end = start + _N_SHOWN
    return "…" * (start > 0) + " ".join(text[start:end].split()) + "…" * (end < len(text))


_VERDICTS = {True: "right", False: "wrong", None: "-"}
_COLUMNS = (
    Column("Line", lambda each: each.line, numeric=True),
    Column("Same", lambda each: each.first_difference, numeric=True),
    Column("Full", lambda each: _VERDICTS[each.is_full_right]),
    Column("Fast", lambda each: _VERDICTS[each.is_pruned_right]),
    Column("Full answer", lambda each: _shown(each, each.full.text)),
    Column("With fast reading", lambda each: _shown(each, each.pruned.text)),
)

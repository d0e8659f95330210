"""The output of `compare`: a JSON object, or a report with a table, details, and a verdict."""

from dataclasses import asdict
from itertools import takewhile
from typing import Any

from pop_local.measure.compare import Compared, Comparison
from pop_local.measure.verdict import comparison_in_words
from pop_local.ui.tables import Column, Fact, fields_of, print_facts, print_sentence, print_table
from pop_local.ui.views.eval import with_advice

_N_SHOWN = 60
_N_SHARED = 15


def show_comparison(comparison: Comparison) -> None:
    if comparison.different:
        print_table(_COLUMNS, comparison.different)
        print_sentence("")
    n = len(comparison.answers)
    facts: list[Fact] = [
        ("Prompts", f"{comparison.prompts.name}: {n} prompt{'s' * (n != 1)}, greedy decoding"),
        ("Same answer", f"{n - len(comparison.different)} of {n}"),
    ]
    if comparison.n_judged:
        n_all = comparison.n_judged
        hits = comparison.full_hits, comparison.pruned_hits
        right = f"full reading: {hits[0]} of {n_all}, fast reading: {hits[1]}"
        facts.append(("Correct answers", f"{right} of {n_all}"))
        only = f"correct only with full reading: {comparison.n_only_full}"
        facts.append(("", f"{only}, correct only with fast reading: {comparison.n_only_pruned}"))
        odds = "the probability that chance alone would produce a difference this large"
        facts.append(("", f"p = {comparison.p_value:.2g}, {odds} (McNemar's exact test)"))
    if comparison.n_unpruned < n:
        ratio = comparison.full_ttft_s / comparison.pruned_ttft_s
        fast = f"fast reading: {comparison.pruned_ttft_s:.2f} s ({ratio:.2f}x)"
        times = f"full reading: {comparison.full_ttft_s:.2f} s, {fast}. Each prompt was timed once."
        facts.append(("Time to first token", times))
    if comparison.n_unpruned:
        why = "Short or mostly cached prompts are always read in full."
        facts.append(("Read in full", f"{comparison.n_unpruned} of {n} prompts. {why}"))
    if comparison.n_unpruned == n:
        facts.append(("Speedup", "not measured, because no prompt used fast reading"))
    print_facts(facts)
    print_sentence(with_advice(comparison_in_words(comparison)))


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "prompts": {"name": comparison.prompts.name},
        "n": len(comparison.answers),
        "n_same": len(comparison.answers) - len(comparison.different),
        **fields_of(
            comparison, "n_judged", "full_hits", "pruned_hits", "n_only_full", "n_only_pruned"
        ),
        "p_value": comparison.p_value,
        "verdict": with_advice(comparison_in_words(comparison)),
        **fields_of(comparison, "full_ttft_s", "pruned_ttft_s", "n_unpruned"),
        "answers": [asdict(answer) for answer in comparison.answers],
    }


def _shown(answer: Compared, text: str) -> str:
    """Return an excerpt of `text` around the first difference between the answers."""
    pairs = zip(answer.full.text, answer.pruned.text, strict=False)
    n_alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    start = max(0, n_alike - _N_SHARED)
    end = start + _N_SHOWN
    return "…" * (start > 0) + " ".join(text[start:end].split()) + "…" * (end < len(text))


_VERDICTS = {True: "right", False: "wrong", None: "-"}
_COLUMNS = (
    Column("Line", lambda answer: answer.line, numeric=True),
    Column("Same", lambda answer: answer.first_difference, numeric=True),
    Column("Full", lambda answer: _VERDICTS[answer.is_full_right]),
    Column("Fast", lambda answer: _VERDICTS[answer.is_pruned_right]),
    Column("Full answer", lambda answer: _shown(answer, answer.full.text)),
    Column("With fast reading", lambda answer: _shown(answer, answer.pruned.text)),
)

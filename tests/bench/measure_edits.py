"""Measure what stale rows cost after an edit, and what they save. Not a test.

    python tests/bench/measure_edits.py MODEL.gguf [--tokens 2048] [--documents 4] [--questions 0]
        [--facts] [--edits NAME,...] [--text FILE] [--sidecar FILE] [--threads 1]

Reads a prompt pruned, then edits it in each of several ways. Compares three readings of the edited
prompt by 128 tokens that follow: in full, pruned in an empty cache, and pruned after the edit.
`--questions`: look-ups after a changed first line, instead of edits (`--head 1`: a changed date,
which moves no rows; 2: another line). `--facts`: an access code near the top is changed or removed,
and the log-probabilities of the new, the old and a random code are compared. Prints rows as JSON.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pop_local.engine.cache.saved_state import SavedState
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.engine.prompt.prompt import Prompt
from pop_local.measure.divergence import divergence, likelihood, predictions
from pop_local.measure.estimate import exp_mean, mean
from pop_local.measure.forced import Forced, forced
from pop_local.measure.heldout import shipped_text
from pop_local.measure.lookups import (
    Answers,
    LookupReference,
    LookupSettings,
    answer_questions,
    make_documents,
)

N_PASSAGES = 8
N_CONTINUATION = 128
N_CHAIN = 10
HEADS = (
    "You are a careful assistant. Current date: 2026-11-29 22:13:07. Session: 9f2c41aa.\n",
    "You are a careful assistant. Current date: 2026-11-30 08:41:52. Session: 03be77d1.\n",
    "You are a careful and friendly assistant. Answer in short sentences, and cite the text.\n",
)
ORDER = (3, 0, 5, 1, 7, 2, 6, 4)
FACT = "\nThe access code of the north gate is {}. Visitors must know it.\n"
QUESTION = (
    "\nQuestion: What is the access code of the north gate?"
    "\nAnswer: The access code of the north gate is"
)
Tokens = list[int]


@dataclass(frozen=True)
class Document:
    """A document in passages of equal length, a spare passage, and the text that follows."""

    passages: list[Tokens]
    spare: Tokens
    following: Tokens


def documents(tokens: Tokens, n_tokens: int, count: int) -> Iterator[Document]:
    size = n_tokens // N_PASSAGES
    n_each = size * (N_PASSAGES + 1) + N_CONTINUATION
    for index in range(count):
        start = index * max(1, (len(tokens) - n_each) // max(1, count - 1))
        part = tokens[start : start + n_each]
        passages = [part[at : at + size] for at in range(0, size * N_PASSAGES, size)]
        rest = part[size * N_PASSAGES :]
        yield Document(passages, rest[N_CONTINUATION:], rest[:N_CONTINUATION])


def edits(model: PopModel, document: Document) -> Iterator[tuple[str, list[Tokens]]]:
    """Yield each edit's name and its prompts, the first of which is read into an empty cache."""
    tokenize = model.engine.context.vocabulary.tokenize
    old, new, rewritten = (
        [*model.engine.context.vocabulary.bos, *tokenize(head)] for head in HEADS
    )
    ask = tokenize("\nContinue the text above.\n")
    passages = document.passages

    def flat(head: Tokens, parts: list[Tokens]) -> Tokens:
        return [*head, *(token for part in parts for token in part), *ask]

    start = flat(old, passages)
    yield "date line", [start, flat(new, passages)]
    yield "first line rewritten", [start, flat(rewritten, passages)]
    yield "passage removed", [start, flat(old, passages[:2] + passages[3:])]
    inserted = [*passages[:2], document.spare, *passages[2:]]
    yield "passage inserted", [start, flat(old, inserted)]
    yield "oldest quarter removed", [start, flat(old, passages[2:])]
    yield "passages permuted", [start, flat(old, [passages[at] for at in ORDER])]
    chain, parts = [start], list(passages)
    for step in range(N_CHAIN):
        at = step % N_PASSAGES
        parts[at] = [*parts[at][:10], *tokenize(f" (edit {step}) "), *parts[at][10:]]
        chain.append(flat(old, list(parts)))
    yield f"chain of {N_CHAIN} insertions", chain


class Reader:
    """Reads prompts three ways and compares the tokens that follow."""

    def __init__(self, model: PopModel, scores: Forced) -> None:
        self._model, self._scores = model, scores
        self.n_rows, self.seconds = 0, 0.0
        self._start: tuple[Tokens, SavedState] | None = None

    def read(self, prompts: list[Tokens], mode: Mode) -> None:
        """Read the prompts one after another into an empty cache.

        If the last call with several prompts read the same first prompt, its rows are restored.
        """
        engine = self._model.engine
        sequence = engine.sequences[0]
        sequence.cache.clear()
        engine.set_mode(mode)
        if len(prompts) > 1:
            if self._start is None or self._start[0] != prompts[0]:
                sequence.read(Prompt(prompts[0]))
                self._start = prompts[0], sequence.states.save()
            else:
                sequence.states.restore(self._start[1])
            prompts = prompts[1:]
        for prompt in prompts:
            started_s = time.perf_counter()
            found = sequence.read(Prompt(prompt))
            self.seconds = time.perf_counter() - started_s
            self.n_rows = found.counters.n_rows
        # The continuation follows the rows that `sequence` has read.
        self._scores._next, self._scores._state = engine.context.logits().copy(), None

    def measure(self, prompts: list[Tokens], following: Tokens) -> dict[str, list[float]]:
        """Return KL, the rise of the NLL, decoded rows and seconds by kind of reading."""
        targets = np.asarray(following)
        self.read(prompts[-1:], Mode.OFF)
        full = predictions(self._scores.predict(following))
        figures = {"full": [0.0, 0.0, self.n_rows, self.seconds]}
        for name, history in (("pruned", prompts[-1:]), ("edited", prompts)):
            self.read(history, Mode.CONTEXT)
            found = predictions(self._scores.predict(following))
            kl = divergence(full, found).kl.mean()
            rise = (likelihood(found, targets).nll - likelihood(full, targets).nll).mean()
            figures[name] = [float(kl), float(rise), self.n_rows, self.seconds]
        return figures


def text_tokens(model: PopModel, options: argparse.Namespace) -> Tokens:
    text = options.text.read_text(encoding="utf-8") if options.text else None
    parts = [text] if text else shipped_text().parts
    return [token for part in parts for token in model.engine.context.vocabulary.tokenize(part)]


def measure_edits(model: PopModel, options: argparse.Namespace) -> None:
    tokens = text_tokens(model, options)
    found: dict[str, list[dict[str, list[float]]]] = {}
    with forced(model) as scores:
        reader = Reader(model, scores)
        for document in documents(tokens, options.tokens, options.documents):
            for name, prompts in edits(model, document):
                if options.edits and name not in options.edits.split(","):
                    continue
                found.setdefault(name, []).append(reader.measure(prompts, document.following))
    for name, rows in found.items():
        row: dict[str, object] = {"edit": name, "documents": len(rows)}
        for kind in ("full", "pruned", "edited"):
            kl, rise, n_rows, seconds = np.array([each[kind] for each in rows]).T
            row[kind] = {
                "rows": round(float(n_rows.mean())),
                "seconds": round(float(np.median(seconds)), 3),
                "kl": vars(mean(kl)),
                "ppl_ratio": vars(exp_mean(rise)),
            }
        print(json.dumps(row), flush=True)


def measure_lookups(model: PopModel, options: argparse.Namespace) -> None:
    settings = LookupSettings.of_questions(options.questions)
    tokenize = model.engine.context.vocabulary.tokenize
    n_bos = len(model.engine.context.vocabulary.bos)
    old, new = (tokenize(HEADS[at]) for at in (0, options.head))
    asked = make_documents(model, settings)
    answers: dict[str, Answers] = {"full": [], "pruned": [], "edited": []}
    with forced(model) as scores:
        reader = Reader(model, scores)
        for document in asked:
            bos, rest = document.tokens[:n_bos], document.tokens[n_bos:]
            before, after = [*bos, *old, *rest], [*bos, *new, *rest]
            ways = {
                "full": ([after], Mode.OFF),
                "pruned": ([after], Mode.CONTEXT),
                "edited": ([before, after], Mode.CONTEXT),
            }
            for name, (prompts, mode) in ways.items():
                reader.read(prompts, mode)
                answers[name].append(answer_questions(scores, document.questions, lambda _: None))
    reference = LookupReference(settings, asked, answers["full"])
    for name in ("pruned", "edited"):
        found = reference.compare(answers[name])
        shown = {key: getattr(found, key) for key in ("n", "full", "pruned", "lost", "gained", "p")}
        shown["logprob_lost"] = vars(found.logprob_lost)
        print(json.dumps({"reading": name, **shown}), flush=True)


def measure_facts(model: PopModel, options: argparse.Namespace) -> None:
    tokenize, bos = model.engine.context.vocabulary.tokenize, model.engine.context.vocabulary.bos
    tokens = text_tokens(model, options)
    random = np.random.default_rng(0)
    with forced(model) as scores:
        reader = Reader(model, scores)
        for document in documents(tokens, options.tokens, options.documents):
            old, new, other = (f"{n:06d}" for n in random.integers(10**6, size=3).tolist())
            first, *rest = document.passages
            rest_tokens = [token for part in rest for token in part]
            start, changed, removed = (
                [*bos, *first, *tokenize(fact), *rest_tokens, *tokenize(QUESTION)]
                for fact in (FACT.format(old), FACT.format(new), "\n")
            )
            after = {"changed": changed, "removed": removed}
            for edit, edited in after.items():
                for name, history, mode in (
                    ("full", [edited], Mode.OFF),
                    ("pruned", [edited], Mode.CONTEXT),
                    ("edited", [start, edited], Mode.CONTEXT),
                ):
                    reader.read(history, mode)
                    row: dict[str, object] = {"edit": edit, "reading": name, "rows": reader.n_rows}
                    for kind, code in (("new", new), ("old", old), ("random", other)):
                        answer = tokenize(f" {code}")
                        found = predictions(scores.predict(answer))
                        row[kind] = -float(likelihood(found, np.asarray(answer)).nll.sum())
                    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--questions", type=int, default=0)
    parser.add_argument("--head", type=int, default=2, help="first line of look-ups: 1 or 2")
    parser.add_argument("--facts", action="store_true", help="changed and removed facts")
    parser.add_argument("--edits", help="names of the edits to measure, separated by commas")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--sidecar", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    n_ctx = options.tokens * 5 // 4 + 512
    with PopModel.open(
        options.model, sidecar=options.sidecar, n_ctx=n_ctx, n_threads=options.threads
    ) as model:
        engine = model.engine
        model.engine = replace(
            engine,
            sequences=tuple(
                replace(each, rule=replace(each.rule, min_prompt=0)) for each in engine.sequences
            ),
        )
        measure = measure_facts if options.facts else measure_edits
        (measure_lookups if options.questions else measure)(model, options)


if __name__ == "__main__":
    main()

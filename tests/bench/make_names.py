"""Make questions whose answers are names, about passages of a text. Not a test.

    python tests/bench/make_names.py MODEL.gguf encyclopaedia.held.txt > names.jsonl
    pop-local compare MODEL.gguf names.jsonl --max-tokens 16 --threads 1

The text is one of make_texts.py. The full model writes each question from one sentence of a
passage, at temperature 0. `compare` then shows it the whole passage. It counts right answers in
full and pruned, and prints McNemar's p. The same model and text always yield the same questions.
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from pop_local import PopModel
from pop_local.ui.watch import terminal_watch

N_PASSAGE, N_PER_PASSAGE, SEED = 700, 3, 3
_PARAGRAPH, _SENTENCE = 200, range(60, 300)  # characters
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-zé]+(?: (?:of |the |de )?[A-Z][a-zé]+){0,2}")
# Months and peoples: too easy to guess.
_COMMON = re.compile(
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December"
    r"|English|French|German|American|British|European|Greek|Latin|Roman)\b"
)
_ASKING = (
    'Sentence: "{sentence}"\nWrite one short question about this sentence whose answer is "{name}".'
    ' The question must not contain "{name}". Write the question only.'
)


def passages(text: str, count: Callable[[str], int]) -> Iterator[str]:
    """Yield the text's long paragraphs, joined to passages of about N_PASSAGE tokens."""
    passage = ""
    for paragraph in text.split("\n"):
        if len(paragraph) > _PARAGRAPH:
            passage += f"{paragraph}\n"
        if count(passage) > N_PASSAGE:
            yield passage
            passage = ""


def named_sentences(passage: str) -> list[tuple[str, str]]:
    """Return sentences and a name in each, in random order. A name occurs up to twice."""
    found = []
    for sentence in re.split(r"(?<=[.!?]) ", passage.replace("\n", " ")):
        if len(sentence) in _SENTENCE:
            names = [match[0] for match in _NAME.finditer(sentence)]
            found += [
                (sentence, name)
                for name in names
                if len(name) > 4 and passage.count(name) <= 2 and not _COMMON.match(name)
            ]
    random.Random(SEED).shuffle(found)
    return found


def is_usable(question: str, name: str) -> bool:
    """Return whether a question stands for itself and does not contain its answer."""
    lower = question.lower()
    return question.endswith("?") and name.lower() not in lower and "sentence" not in lower


def questions(passage: str, write: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """Yield up to N_PER_PASSAGE questions and their answers, each about another sentence."""
    by_sentence = dict(named_sentences(passage))
    n_found = 0
    for sentence, name in by_sentence.items():
        question = write(_ASKING.format(sentence=sentence, name=name)).strip().split("\n")[0]
        if is_usable(question, name):
            yield question, name
            n_found += 1
        if n_found == N_PER_PASSAGE:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--count", type=int, default=120)
    options = parser.parse_args()
    n_made = 0
    with (
        PopModel.open(options.model, n_threads=1, n_ctx=1024) as model,
        terminal_watch() as watch,
    ):
        model.pruning = False
        advance = watch.stage("Writing questions")

        def write(asked: str) -> str:
            return model.chat(asked, temperature=0.0, max_tokens=50).text

        text = options.text.read_text(encoding="utf-8")
        for passage in passages(
            text, lambda part: len(model.engine.context.vocabulary.tokenize(part))
        ):
            for question, name in questions(passage, write):
                line = {
                    "prompt": f"{question} Answer with the name only.",
                    "documents": [passage],
                    "answer": {"regex": f"(?i){re.escape(name)}"},
                }
                print(json.dumps(line, ensure_ascii=False), flush=True)
                n_made += 1
                advance(n_made, options.count)
                if n_made == options.count:
                    return


if __name__ == "__main__":
    main()

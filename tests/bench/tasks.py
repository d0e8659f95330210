"""Convert task benchmarks to files for `pop-local compare`. Not a test.

    python tests/bench/tasks.py gsm8k test.jsonl --shots 4 [--limit 100] > gsm8k.jsonl
    pop-local compare MODEL.pop.gguf gsm8k.jsonl --answers gsm8k.answers.jsonl --json
    python tests/bench/tasks.py score HumanEval.jsonl --shots 4 humaneval.answers.jsonl

FILE has its published form: gsm8k, humaneval, ruler and musique are JSONL, mmlu is CSV without a
header. `compare` judges all but humaneval, whose answers are programs: `score` runs them, so use a
model that you trust. The first --shots tasks of the file precede each question with their answers;
their common prefix is read once.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

TIMEOUT_S = 10
_CODE = re.compile(r"```(?:python)?\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Task:
    """A task; `expected`: a regex for the answer, "" for a program; `shown`: a right answer."""

    question: str
    expected: str = ""
    shown: str = ""
    documents: tuple[str, ...] = ()


def gsm8k(entry: dict[str, Any]) -> Task:
    number = entry["answer"].rpartition("####")[2].strip().replace(",", "")
    digits = ",?".join(number)
    return Task(
        f"{entry['question']}\nThink step by step, and end with #### and the number alone.",
        rf"####\s*\$?\s*{digits}(?:\.0+)?(?![\d,]*\d|\.\d)",
        re.sub("<<.*?>>", "", entry["answer"]),
    )


def humaneval(entry: dict[str, Any]) -> Task:
    question = f"Write this Python function in whole.\n\n```python\n{entry['prompt']}```"
    whole = f"```python\n{entry['prompt']}{entry['canonical_solution']}```"
    return Task(question, shown=whole)


def mmlu(row: list[str]) -> Task:
    question, *choices, right = row
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", choices, strict=True))
    asked = f"{question}\n{listed}\nAnswer with the letter alone."
    return Task(asked, rf"^\W*(?:[Tt]he answer is\W*)?{right}\b", right)


def ruler(entry: dict[str, Any]) -> Task:
    return Task(entry["input"], _all_of(entry["outputs"]), ", ".join(entry["outputs"]))


def musique(entry: dict[str, Any]) -> Task:
    names = "|".join(map(re.escape, [entry["answer"], *entry.get("answer_aliases", ())]))
    paragraphs = tuple(f"{p['title']}\n{p['paragraph_text']}" for p in entry["paragraphs"])
    question = f"{entry['question']} Answer with a name or a few words."
    return Task(question, f"(?i)(?<!\\w)(?:{names})(?!\\w)", entry["answer"], paragraphs)


def _all_of(texts: Iterable[str]) -> str:
    return "(?is)\\A" + "".join(f"(?=.*{re.escape(text)})" for text in texts)


TASKS: dict[str, Callable[[Any], Task]] = {
    "gsm8k": gsm8k,
    "humaneval": humaneval,
    "mmlu": mmlu,
    "ruler": ruler,
    "musique": musique,
}


def entries(path: Path, name: str) -> Iterator[Any]:
    with path.open(encoding="utf-8", newline="") as file:
        if name == "mmlu":
            yield from csv.reader(file)
        else:
            yield from (json.loads(line) for line in file if line.strip())


def prompts(tasks: Iterable[Task], n_shots: int) -> Iterator[dict[str, Any]]:
    """Yield the file's lines, in the order of the tasks."""
    rest = iter(tasks)
    shots = [
        message
        for task in islice(rest, n_shots)
        for message in (
            {"role": "user", "content": _asked(task)},
            {"role": "assistant", "content": task.shown},
        )
    ]
    for task in rest:
        line: dict[str, Any] = {
            "messages": [*shots, {"role": "user", "content": _asked(task)}],
        }
        if task.expected:
            line["answer"] = {"regex": task.expected}
        yield line


def _asked(task: Task) -> str:
    return "\n\n".join([*task.documents, task.question])


def score(path: Path, n_shots: int, answers: Path) -> dict[str, Any]:
    """Run the programs of both modes; the answers' lines match the tasks.

    Unfinished answers count if both modes have the line.
    """
    asked = list(entries(path, "humaneval"))[n_shots:]
    _, *kept = map(json.loads, answers.read_text("utf-8").rpartition("\n")[0].splitlines())
    texts = {(answer["line"], answer["mode"]): answer["text"] for answer in kept}
    lines = [line for line, mode in texts if mode == "pruned" and (line, "full") in texts]
    both = [
        [passes(asked[line - 1], texts[line, mode]) for mode in ("full", "pruned")]
        for line in lines
    ]
    return {
        "n": len(both),
        "full_hits": sum(full for full, _ in both),
        "pruned_hits": sum(pruned for _, pruned in both),
        "n_only_full": sum(full and not pruned for full, pruned in both),
        "n_only_pruned": sum(pruned and not full for full, pruned in both),
    }


def passes(entry: dict[str, Any], answer: str) -> bool:
    """Return True if the answer's code passes the task's tests, in a separate process."""
    code = _CODE.search(answer)
    # The task's imports stay; a complete function replaces its stub.
    program = f"{entry['prompt']}    pass\n\n{code[1] if code else answer}\n\n{entry['test']}\n"
    program += f"\ncheck({entry['entry_point']})\n"
    try:
        ran = subprocess.run(
            [sys.executable, "-I", "-c", program],
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return ran.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=[*TASKS, "score"])
    parser.add_argument("file", type=Path)
    parser.add_argument("answers", type=Path, nargs="?", help="for score")
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--limit", type=int, help="tasks to ask, the shots not counted")
    options = parser.parse_intermixed_args()
    if (options.task == "score") != (options.answers is not None):
        parser.error("score takes answers, nothing else does")
    if options.answers is not None:
        print(json.dumps(score(options.file, options.shots, options.answers)))
        return
    tasks = map(TASKS[options.task], entries(options.file, options.task))
    for line in islice(prompts(tasks, options.shots), options.limit):
        print(json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    main()

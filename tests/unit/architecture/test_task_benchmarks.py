"""Test the conversion of task benchmarks to prompts with answers (tests/bench/tasks.py)."""

import json
import re
import sys
from pathlib import Path

import pytest

from pop_local.measure.compare import read_prompts
from support.paths import TESTS

sys.path.append(str(TESTS / "bench"))
import tasks

HUMANEVAL = {
    "prompt": "import math\n\n\ndef area(r):\n    '''Of a circle.'''\n",
    "canonical_solution": "    return math.pi * r**2\n",
    "test": "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-3\n",
    "entry_point": "area",
}


@pytest.mark.parametrize(
    ("task", "right", "wrong"),
    [
        (tasks.gsm8k({"question": "?", "answer": "So <<1=1>>.\n#### 1,234"}), "#### 1234", "1234"),
        (tasks.gsm8k({"question": "?", "answer": "#### 18"}), "so\n#### $18.00", "#### 180"),
        (tasks.gsm8k({"question": "?", "answer": "#### 18"}), "#### 18.", "#### 18.5"),
        (tasks.mmlu(["?", "a", "b", "c", "d", "C"]), "C. c", "B, not C"),
        (tasks.ruler({"input": "?", "outputs": ["12", "Ab"]}), "ab and\n12", "12"),
        (
            tasks.musique({"question": "?", "paragraphs": [], "answer": "Rome"}),
            "It is Rome.",
            "Jerome",
        ),
    ],
)
def test_right_answers_match_and_wrong_ones_do_not(task, right, wrong):
    assert re.search(task.expected, right)
    assert not re.search(task.expected, wrong)


def test_shots_precede_each_question_and_are_not_scored(tmp_path: Path):
    given = [
        {
            "question": f"Who {number}?",
            "paragraphs": [{"title": "One", "paragraph_text": f"It is {number}."}],
            "answer": str(number),
        }
        for number in range(3)
    ]
    made = list(tasks.prompts(map(tasks.musique, given), 1))
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, made)))
    first, second = read_prompts(path).prompts
    assert [message.content.split("\n")[1] for message in first.messages[::2]] == [
        "It is 0.",
        "It is 1.",
    ]
    assert first.messages[1].content == "0"
    assert first.messages[:2] == second.messages[:2]
    assert second.is_right("2")


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("```python\ndef area(r):\n    return math.pi * r * r\n```\nThat is it.", True),
        ("```python\ndef area(r):\n    return 3 * r * r\n```", False),
        ("I cannot.", False),
    ],
)
def test_programs_run_with_the_tasks_imports(answer, is_right):
    assert tasks.passes(HUMANEVAL, answer) is is_right

"""The user's prompts: their file, and the comparison of two answers."""

import json
from pathlib import Path

import pytest

from pop_base.errors import PopError
from pop_local.measure.compare import mcnemar, read_prompts


def written(folder: Path, *entries: object) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n\n".join(map(json.dumps, entries)))
    return path


def test_documents_precede_the_prompt(tmp_path):
    (tmp_path / "report.txt").write_text("What was decided.")
    entry = {"prompt": "What?", "documents": ["A text.", {"file": "report.txt"}]}
    [prompt] = read_prompts(written(tmp_path, entry)).prompts
    [message] = prompt.messages
    assert (message.role, message.content) == ("user", "A text.\n\nWhat was decided.\n\nWhat?")
    assert prompt.is_right("whatever") is None


def test_conversations_stay_unchanged_and_lines_count_from_one(tmp_path):
    conversation = [
        {"role": role, "content": role} for role in ("system", "user", "assistant", "user")
    ]
    first, second = read_prompts(
        written(tmp_path, {"prompt": "a"}, {"messages": conversation})
    ).prompts
    assert (first.line, second.line) == (1, 3)
    assert [message.role for message in second.messages] == [
        message["role"] for message in conversation
    ]


@pytest.mark.parametrize(
    ("expected", "answer", "is_right"),
    [
        ("1.5", "It is 1.5 m.", True),
        ("1.5", "It is 125 m.", False),
        ({"regex": r"^\s*[Yy]es\b"}, " yes.", True),
        ({"regex": r"^\s*[Yy]es\b"}, "Oh yes.", False),
    ],
)
def test_right_answer_contains_a_text_or_matches_a_regex(expected, answer, is_right, tmp_path):
    [prompt] = read_prompts(written(tmp_path, {"prompt": "?", "answer": expected})).prompts
    assert prompt.is_right(answer) is is_right


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ([], "not a JSON object"),
        ({}, "either prompt or messages"),
        ({"prompt": "a", "messages": []}, "either prompt or messages"),
        ({"prompt": "a", "anwser": "b"}, "key 'anwser' is unknown"),
        ({"prompt": 5}, "wrong type"),
        ({"messages": []}, "wrong type"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "wrong type"),
        ({"messages": [{"role": "user", "content": "a"}], "documents": ["b"]}, "are allowed only"),
        ({"prompt": "a", "documents": [{"path": "b"}]}, "wrong type"),
        ({"prompt": "a", "documents": [{"file": "nowhere"}]}, "cannot read"),
        ({"prompt": "a", "answer": {"regex": "("}}, "the regular expression is invalid"),
        (
            {"prompt": "a", "answer": {"regex": f"a{{{10**20}}}"}},
            "the regular expression is invalid",
        ),
        (
            {"prompt": "a", "answer": {"regex": "(" * 5000 + ")" * 5000}},
            "the regular expression is invalid",
        ),
        ({"prompt": "a", "answer": 5}, "wrong type"),
    ],
)
def test_errors_name_the_line(entry, what, tmp_path):
    with pytest.raises(PopError, match=r"mine\.jsonl, line 3: .*" + what) as failure:
        read_prompts(written(tmp_path, {"prompt": "right"}, entry))
    assert '{"prompt": TEXT}' in failure.value.hint


def test_unicode_line_separators_do_not_end_a_line(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes('{"prompt": "a\u2028b\x85"}\r\n{"prompt": "c"}'.encode())
    first, second = read_prompts(path).prompts
    assert (first.messages[0].content, second.line) == ("a\u2028b\x85", 2)


@pytest.mark.parametrize("line", ["{'prompt': 'a'}", "[" * 100_000])
def test_line_must_be_json(line, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(line)
    with pytest.raises(PopError, match="line 1: the line is not valid JSON"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("n_first", "n_second", "p"),
    [
        (0, 0, 1),
        (1, 0, 1),
        (1, 1, 1),
        (5, 0, 0.0625),
        (0, 6, 0.03125),
        (8, 2, 0.109375),
        (1100, 0, 0),
    ],
)
def test_mcnemar_is_the_binomial_test_of_discordant_pairs(n_first, n_second, p):
    assert mcnemar(n_first, n_second) == pytest.approx(p)

"""Full rows and chunks of prompts, and decoding bytes to text."""

import pytest

from pop_local.engine.decode.text import TextStream
from pop_local.engine.prefill.plan import RowRule, plan_prefill

RULE = RowRule(sink_tokens=1, tail_tokens=16)


def rows_by_position(n_past: int, n_tokens: int, rule: RowRule) -> list[bool]:
    """Return for each row whether it is full, by the backend's rule."""
    end = n_past + n_tokens
    short = n_tokens < rule.min_prompt
    return [
        short or p < rule.sink_tokens or p >= end - rule.tail_tokens or p == end - 1
        for p in range(n_past, end)
    ]


@pytest.mark.parametrize("n_past", [0, 1, 5, 300])
@pytest.mark.parametrize("n_tokens", [1, 2, 16, 17, 18, 100, 513])
@pytest.mark.parametrize("rule", [RULE, RowRule(0, 0), RowRule(4, 1), RowRule(1, 16, 64)])
def test_pruned_rows_follow_the_rule(n_past, n_tokens, rule):
    plan = plan_prefill(n_past, n_tokens, rule, n_batch=64)
    full = rows_by_position(n_past, n_tokens, rule)
    assert plan.n_pruned == full.count(False)


@pytest.mark.parametrize("n_tokens", [*range(1, 40), 64, 65, 79, 80, 81, 128, 129, 200])
@pytest.mark.parametrize("tail_tokens", [0, 1, 16, 64, 100])
def test_chunks_cover_the_prompt_and_keep_the_tail_together(n_tokens, tail_tokens):
    plan = plan_prefill(7, n_tokens, RowRule(1, tail_tokens), n_batch=64)
    covered = [i for start, end in plan.chunks for i in range(start, end)]
    assert covered == list(range(n_tokens))
    assert all(0 < end - start <= 64 for start, end in plan.chunks)
    assert len(plan.chunks) == -(-n_tokens // 64)
    if 0 < tail_tokens <= 64:
        start, _ = plan.chunks[-1]
        assert start <= plan.full_from - 7


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        ([b"5 ", b"\xe2", b"\x82", b"\xac", b"!"], (), (["5 ", "", "", "€", "!"], "", "")),
        ([b"a", b"\xe2\x82"], (), (["a", ""], "", "")),
        ([b"fine\nUs", b"er", b": no"], ("\nUser:",), (["fine", "", ""], "", "\nUser:")),
        ([b"fine\nUs", b"ual"], ("\nUser:",), (["fine", "\nUsual"], "", "")),
        ([b"fine\nUs"], ("\nUser:",), (["fine"], "\nUs", "")),
        ([b"one two three"], ("three", "two"), (["one "], "", "two")),
    ],
    ids=["split", "half at the end", "stop string", "its prefix", "at the end", "earliest"],
)
def test_text_stream_holds_back_characters_and_stop_strings(pieces, stops, expected):
    stream = TextStream(stops)
    texts = [stream.push(piece) for piece in pieces]
    assert (texts, stream.flush(), stream.stop) == expected

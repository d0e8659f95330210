"""Sampling as the file recommends it, and what full reading would have cost."""

import pytest

from pop_converter.architecture.work import speedup_limit
from pop_local.engine.decode.recommended import recommended
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.engine.model import PopModel
from pop_local.engine.turn import Message
from pop_local.measure.full_cost import FullCosts
from support.converted import tiny
from support.scripted import figures


def test_the_keys_of_newer_files_become_options():
    assert recommended(
        {
            "general.sampling.temp": "0.700000",
            "general.sampling.top_k": "20",
            "general.sampling.penalty_repeat": "1.05",
            "general.sampling.mirostat": "2",
        }
    ) == {"temperature": 0.7, "top_k": 20, "repeat_penalty": 1.05}


@pytest.mark.parametrize("value", ["nan", "-1", "inf", "warm", ""])
def test_what_is_no_sensible_number_is_left_out(value):
    assert recommended({"general.sampling.temp": value}) == {}


def test_the_model_answers_as_its_file_recommends(tmp_path):
    model = PopModel(tiny(tmp_path, chat_template="{{ messages[0]['content'] }}"), n_threads=1)
    question = [Message("user", "a b c d")]

    def answer(**options: float) -> str:
        return "".join(chunk.text for chunk in model.chat_turn(question, max_tokens=8, **options))

    greedy = answer(temperature=0.0)
    assert answer(seed=1) != greedy
    model.recommended = {"temperature": 0.0}
    assert answer(seed=1) == greedy
    assert answer(seed=1, temperature=5.0) != greedy


def test_without_a_measurement_the_cost_comes_from_the_limit(tmp_path):
    macs = GraphMacs(tiny(tmp_path, boundary=5))
    costs = FullCosts(macs, 5)
    whole = figures(n_prompt=1000, n_cached=0, n_pruned=983, n_full=17, prefill_s=2.0)
    cost = costs.of(whole)
    assert not cost.is_measured
    assert cost.seconds == pytest.approx(2.0 * speedup_limit(macs, 1000, 5, 17))
    # What was cached need not be read in full either.
    rest = costs.of(figures(n_prompt=1000, n_cached=500, n_pruned=483, n_full=17, prefill_s=1.0))
    assert 1.0 < rest.seconds < cost.seconds

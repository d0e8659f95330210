"""Recommended sampling options."""

import math

import pytest

from pop_converter.gguf.header import read_header
from pop_local.engine.chat_messages import Message
from pop_local.engine.decode.sampler import recommended
from support.calls import opened
from support.converted import tiny
from support.pop_files import Keys, add_to
from support.synthetic import make_gguf


def test_sampling_keys_become_options(tmp_path):
    keys = {"temp": 0.5, "top_k": 20, "penalty_repeat": 1.25, "mirostat": 2}
    file_keys: Keys = {f"general.sampling.{name}": value for name, value in keys.items()}
    plain = make_gguf(tmp_path / "plain.gguf", "llama")
    path = add_to(plain, tmp_path / "keyed.gguf", file_keys)
    options = recommended(read_header(path))
    assert options == {"temperature": 0.5, "top_k": 20, "repeat_penalty": 1.25}


@pytest.mark.parametrize("value", [math.nan, -1.0, 10.5, math.inf, "warm"])
def test_invalid_number_is_ignored(tmp_path, value):
    plain = make_gguf(tmp_path / "plain.gguf", "llama")
    path = add_to(plain, tmp_path / "keyed.gguf", {"general.sampling.temp": value})
    assert recommended(read_header(path)) == {}


def test_model_answers_as_its_file_recommends(tmp_path):
    model = opened(tiny(tmp_path, chat_template="{{ messages[0]['content'] }}"))
    question = [Message("user", "a b c d")]

    def answer(**options: float) -> str:
        return "".join(chunk.text for chunk in model.ask(question, max_tokens=8, **options))

    greedy = answer(temperature=0.0)
    assert answer(seed=1, temperature=0.001) == greedy
    assert answer(seed=1) != greedy
    vars(model.engine)["recommended"] = {"temperature": 0.0}
    assert answer(seed=1) == greedy
    assert answer(seed=1, temperature=5.0) != greedy

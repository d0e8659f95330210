"""Compare log probabilities of sampled tokens with the logits."""

import numpy as np
import pytest

from pop_local.engine.chat_messages import Message
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.turn_options import TurnOptions
from support.calls import log_softmax, opened, prompt, read
from support.converted import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return opened(tiny(tmp_path_factory.mktemp("logprobs")))


@pytest.fixture(scope="module")
def chatty(smollm2_pop):
    return PopModel(EngineOptions.of(smollm2_pop, n_ctx=256, n_threads=1))


def test_logprobs_of_a_sampled_token_equal_the_logits(model):
    tokens = prompt(40)
    expected = log_softmax(read(model, tokens))
    options = TurnOptions(temperature=0.0, max_tokens=1, n_top_logprobs=3)
    (chunk,) = model.engine.answer(Prompt(tokens), options)
    (token,) = chunk.logprobs
    best = np.sort(expected)[::-1]
    assert token.logprob == pytest.approx(best[0], abs=1e-3)
    assert [likely.logprob for likely in token.top] == pytest.approx(best[:3], abs=1e-3)
    assert token.top[0].text == token.text


def test_logprobs_are_absent_by_default(model):
    chunks = list(model.engine.answer(Prompt(prompt(8)), TurnOptions(max_tokens=3)))
    assert not any(chunk.logprobs for chunk in chunks)


def test_logprobs_match_the_text_without_a_stop_string(chatty):
    def parts(**options):
        messages = [Message("user", "Count from one to ten in words.")]
        fixed = {"temperature": 0.0, "max_tokens": 24, "n_top_logprobs": 0}
        return list(chatty.ask(messages, **fixed | options))

    whole = parts()
    text = "".join(chunk.text for chunk in whole)
    tokens = [token.text for chunk in whole for token in chunk.logprobs]
    assert b"".join(tokens).decode() == text
    assert len(tokens) == whole[-1].stats.n_decoded
    stop = text[len(text) // 2 :][:6]
    cut = parts(stops=(stop,))
    kept = b"".join(token.text for chunk in cut for token in chunk.logprobs).decode()
    words = "".join(chunk.text for chunk in cut)
    assert words == text[: text.index(stop)]
    assert kept.startswith(words) and stop not in kept

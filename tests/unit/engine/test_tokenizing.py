"""Tokenization: linear time, little stack, and interruptible."""

import os
import signal
import subprocess
import sys
import threading
import time

import gguf
import pytest

from pop_base.errors import StoppedError
from pop_local.engine.llama.interrupt import stopped_by
from support.calls import opened, text_of
from support.synthetic import make_gguf

# CPU seconds: ten times the usual time, but less than half of the quadratic algorithm's.
PATIENCE_S = 3.0
UNKNOWN = "\U00012345"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a SentencePiece model with 4,000 control tokens."""
    path = tmp_path_factory.mktemp("tokenizing") / "llama.gguf"
    control = [f"<c{number}>" for number in range(4000)]
    make_gguf(path, "llama", n_layer=1, n_vocab=4400, control=control)
    with opened(path) as model:
        yield model


@pytest.mark.parametrize(
    ("piece", "n_each"),
    [(UNKNOWN * 2, 8), ("<c7>", 1), ("<", 1)],
    ids=["bytes", "control tokens", "almost control tokens"],
)
def test_tokenization_takes_linear_time(model, piece, n_each):
    began_s = time.process_time()
    tokens = model.engine.context.vocabulary.tokenize(piece * 100_000, special=True)
    assert time.process_time() - began_s < PATIENCE_S
    assert tokens[-100_000 * n_each :] == tokens[-n_each:] * 100_000
    assert len(tokens) <= 100_000 * n_each + 1  # the leading space


def test_long_texts_keep_control_tokens(model):
    piece = "a <c1><c12> b<c1<c3>>."
    two, three, many = (
        model.engine.context.vocabulary.tokenize(piece * n, special=True) for n in (2, 3, 500)
    )
    assert {"<c1>", "<c3>", "<c12>"} <= {text_of(model, [token]) for token in two}
    assert many == two + three[len(two) :] * 498


BPE = """
import sys
from pop_local.engine.llama import backend
from pop_local.engine.llama.vocabulary import Vocabulary
backend.require_patched()
api = backend.bindings()
params = api.llama_model_default_params()
params.vocab_only = True
model = api.llama_model_load_from_file(sys.argv[1].encode(), params)
vocabulary = Vocabulary(api.llama_model_get_vocab(model))
print(*(len(vocabulary.tokenize(letter * 200_000)) for letter in "a! "))
"""


def test_long_run_of_letters_does_not_overflow_the_stack(tmp_path):
    """llama.cpp runs the regular expressions of Mistral's tokenizer with std::regex."""
    path = tmp_path / "bpe.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    writer.add_token_list(["a", "!", "\u0120", "aa"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 4)
    writer.add_token_merges(["a a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    done = subprocess.run([sys.executable, "-c", BPE, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "100000 200000 200000\n"), done.stderr


def test_tokenization_can_be_stopped(model):
    began_s = time.process_time()
    with stopped_by(lambda: True), pytest.raises(StoppedError):
        model.engine.context.vocabulary.tokenize(UNKNOWN * 2_000_000)
    assert time.process_time() - began_s < PATIENCE_S
    with stopped_by(lambda: False):
        assert len(model.engine.context.vocabulary.tokenize(UNKNOWN * 1000)) == 4001


def test_short_texts_are_never_stopped(model):
    with stopped_by(lambda: True):
        for _ in range(5000):
            assert model.engine.context.vocabulary.tokenize("a short text")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_stops_tokenization(model):
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        model.engine.context.vocabulary.tokenize(UNKNOWN * 2_000_000)
    assert time.monotonic() - began_s < PATIENCE_S

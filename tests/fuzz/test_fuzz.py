"""Damaged files are refused by a PopError, or harmless: random ones, FUZZ_SECONDS for each reader.

`make fuzz SECONDS=3600` goes on for an hour; FUZZ_SEED begins elsewhere.
"""

import json
import os
import random
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest

from converter.errors import PopError
from converter.format import read_pop_meta
from converter.header import read_header
from converter.shape import read_shape, trained_ctx
from converter.sidecar import read_sidecar, sidecar_beside, sidecar_meta
from converter.source import read_source
from pop_local.engine.llama.backend import Mode
from pop_local.engine.sessions.conversation import Conversation, Document, Turn
from pop_local.engine.sessions.schema import (
    Fingerprint,
    Session,
    decoded_array,
    encoded,
    encoded_array,
)
from pop_local.engine.sessions.session_file import Sessions
from pop_local.workflows.events import Watch
from pop_local.workflows.inspect import inspect
from support.converted import paired, tiny
from support.mutants import mutated_bytes, mutated_json
from support.synthetic import make_gguf

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("FUZZ_SECONDS", "5"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
# Of one file; a reader that never ends is to be ended from outside.
PATIENCE_S = 5.0
SMALL = {"n_layer": 2, "n_embd": 64, "n_ff": 64}

# Makes a damaged file from a source of chance, and reads it.
Attempt = Callable[[random.Random], None]


def campaign(attempt: Attempt) -> None:
    """Raises what is no PopError, naming the seed that gives it again."""
    deadline_s = time.monotonic() + SECONDS
    n_attempts = n_refused = 0
    while time.monotonic() < deadline_s:
        seed = SEED + n_attempts
        began_s = time.monotonic()
        try:
            attempt(random.Random(seed))
        except PopError:
            n_refused += 1
        except Exception as error:
            raise AssertionError(f"FUZZ_SEED={seed} escapes") from error
        assert time.monotonic() - began_s < PATIENCE_S, f"FUZZ_SEED={seed} takes too long"
        n_attempts += 1
    print(f"{n_attempts:,} files, {n_refused:,} refused")
    assert 0 < n_refused < n_attempts


def test_headers_and_pop_keys(tmp_path):
    models = [
        make_gguf(tmp_path / f"{arch}.gguf", arch, head_arrays=True, **SMALL)
        for arch in ("llama", "gemma3", "qwen3moe")
    ]
    models.append(tiny(tmp_path, boundary=5))
    contents = [(model.read_bytes(), read_header(model).tensors_end) for model in models]
    target = tmp_path / "bad.gguf"

    def attempt(rng: random.Random) -> None:
        content, end = rng.choice(contents)
        target.write_bytes(mutated_bytes(rng, content[: end + 64], 0, end))
        with target.open("r+b") as file:
            file.truncate(len(content) if rng.random() < 0.95 else rng.randrange(len(content)))
        header = read_header(target)
        for read in (read_shape, read_pop_meta):
            with suppress(PopError):
                read(target)
        trained_ctx(header)
        inspect(str(target), None, with_hash=False, watch=Watch())

    campaign(attempt)


def test_sidecars(tmp_path):
    base = make_gguf(tmp_path / "llama.gguf", "llama")
    made = paired(base, tmp_path, "fitted", boundary=5)
    source, content = read_source(base), made.sidecar.read_bytes()
    end = read_header(made.sidecar).tensors_end
    target = tmp_path / "llama.pop-sidecar.gguf"

    def attempt(rng: random.Random) -> None:
        target.write_bytes(mutated_bytes(rng, content, 0, end))
        assert sidecar_beside(source) == target
        sidecar_meta(read_header(target))
        inspect(str(target), None, with_hash=False, watch=Watch())
        read_sidecar(target, source)

    campaign(attempt)


def test_sessions(tmp_path):
    sessions, path = Sessions(tmp_path), tmp_path / "talk.popsession"
    said = Conversation("Be brief.", (Turn("what?", (Document("a.txt", "text"),), "this"),) * 2)
    mark = Fingerprint(10**9, "0" * 64, "backend")
    session = json.loads(encoded(Session("talk", "a.gguf", 10, Mode.CONTEXT, "key", mark, said)))
    array = encoded_array(np.arange(10, dtype=np.int32))

    def attempt(rng: random.Random) -> None:
        with suppress(ValueError):
            decoded_array(mutated_bytes(rng, array, 0, 128), np.int32, 10)
        text = json.dumps(mutated_json(rng, session)).encode()
        if rng.random() < 0.2:
            text = mutated_bytes(rng, text, 0, len(text))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("session.json", text)
        if rng.random() < 0.5:
            content = path.read_bytes()
            path.write_bytes(mutated_bytes(rng, content, 0, len(content)))
        (stored,) = sessions.listed()
        if stored.session is None:
            raise PopError("refused")

    campaign(attempt)

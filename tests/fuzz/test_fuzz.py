"""Randomly damaged files: each reader raises PopError, or the damage is harmless."""

import json
import random
import zipfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pop_base.errors import PopError
from pop_converter.architecture.arch_keys import trained_ctx
from pop_converter.architecture.skipping import skipping_of
from pop_converter.gguf.header import read_header
from pop_converter.gguf.source import read_source
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.sidecar import existing_sidecar, read_sidecar, sidecar_meta
from pop_converter.projection import Projection
from pop_local.engine.cache.saved_state import decoded_array, encoded_array
from pop_local.engine.sessions.session_file import FORMAT, read_session
from pop_local.measure.budget import boundaries
from pop_local.workflows.conversion.conversion_plan import LEAST_DIVISOR
from pop_local.workflows.inspect import inspect
from support import recipes
from support.architectures import MORE_KEYS
from support.campaign import CHILD_PATIENCE_S, campaign
from support.converted import paired, tiny
from support.mutants import IN_PLACE, mutated_bytes, mutated_json
from support.native import Loader
from support.shapes import read_pop_meta, read_shape
from support.shared_kv import make_shared
from support.synthetic import make_gguf

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "n_ff": 64}

# llama.cpp's recipes: experts, compressed K/V, recurrent states, shared K/V, and combinations.
OTHERS = (
    *("deepseek2+experts", "falcon-h1", "gemma3n", "gemma4", "glm4", "gpt-oss+experts"),
    *("granitehybrid", "kimi-linear+experts", "lfm2", "mamba2", "minimax-01+experts"),
    *("mistral3", "nemotron_h", "olmo2", "qwen35", "qwen35moe+experts", "rwkv7", "smollm3"),
)


def others(folder: Path) -> list[Path]:
    """Models of other architectures, from llama.cpp's recipes if these are built."""
    chosen_names = [name for name in recipes.names() if str(name) in OTHERS]
    return [
        recipes.make(name, folder / f"{name}.gguf", MORE_KEYS.get(name.arch, ()))
        for name in chosen_names
    ]


def test_damaged_headers_are_refused_or_read(tmp_path):
    models = [
        make_gguf(tmp_path / f"{arch}.gguf", arch, head_arrays=True, **SMALL)
        for arch in ("llama", "gemma3", "qwen3moe")
    ]
    models += [tiny(tmp_path, boundary=1, **SMALL), make_shared(tmp_path / "g.gguf", "gemma4")]
    models += others(tmp_path)
    headers = [(model, read_header(model).tensors_end) for model in models]
    contents = [
        (model.read_bytes()[: end + 64], end, model.stat().st_size) for model, end in headers
    ]
    target = tmp_path / "bad.gguf"

    def attempt(rng: random.Random) -> None:
        content, end, size = rng.choice(contents)
        target.write_bytes(mutated_bytes(rng, content, 0, end))
        with target.open("r+b") as file:
            file.truncate(size if rng.random() < 0.95 else rng.randrange(size))
        header = read_header(target)
        with suppress(PopError):
            read_pop_meta(target)
        trained_ctx(header)
        with suppress(PopError):
            shape = read_shape(target)
            skipping_of(shape)
            for boundary in boundaries(shape, LEAST_DIVISOR):
                make_plan(shape, boundary=boundary, projection=Projection.WIDE)
        inspect(str(target))

    campaign(attempt)


def test_damaged_sidecars_are_refused_or_read(tmp_path):
    base = make_gguf(tmp_path / "llama.gguf", "llama")
    pair = paired(base, tmp_path, "fitted-wide", boundary=5)
    source, content = read_source(base), pair.sidecar.read_bytes()
    end = read_header(pair.sidecar).tensors_end
    target = tmp_path / "llama.pop-sidecar.gguf"

    def attempt(rng: random.Random) -> None:
        target.write_bytes(mutated_bytes(rng, content, 0, end))
        assert existing_sidecar(source) == target
        sidecar_meta(read_header(target))
        inspect(str(base), sidecar=target)
        read_sidecar(target, source)

    campaign(attempt)


def test_damaged_sessions_are_refused_or_read(tmp_path):
    path = tmp_path / "talk.popsession"
    turn: dict[str, Any] = {"question": "what?", "answer": "this", "pictures": []}
    turn["documents"] = [{"name": "a.txt", "text": "text"}]
    said = {"system": "Be brief.", "turns": [turn, turn]}
    session: dict[str, Any] = {"format": FORMAT, "model": "a.gguf", "mode": "CONTEXT", **said}
    old = {**session, "format": 3, "conversation": said}
    array = encoded_array(np.arange(10, dtype=np.int32))

    def attempt(rng: random.Random) -> None:
        with suppress(ValueError):
            decoded_array(mutated_bytes(rng, array, 0, 128), np.int32, 10)
        is_old = rng.random() < 0.3
        content = json.dumps(mutated_json(rng, old if is_old else session)).encode()
        if rng.random() < 0.2:
            content = mutated_bytes(rng, content, 0, len(content))
        path.write_bytes(content)
        if is_old:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("session.json", content)
            if rng.random() < 0.5:
                content = path.read_bytes()
                path.write_bytes(mutated_bytes(rng, content, 0, len(content)))
        read_session(path)

    campaign(attempt)


def test_llama_cpp_refuses_damaged_files(tmp_path):
    """Check that llama.cpp reports a reason before it ends the process."""
    alone = tiny(tmp_path, boundary=1, **SMALL)
    base = make_gguf(tmp_path / "qwen3moe.gguf", "qwen3moe", **SMALL | {"n_layer": 3})
    pair = paired(base, tmp_path, "fitted-wide", boundary=1)
    loader, said = Loader(CHILD_PATIENCE_S), Counter[str]()
    bad, sidecar = tmp_path / "bad.gguf", tmp_path / "bad-sidecar.gguf"
    paths = (alone, pair.single, pair.sidecar, *others(tmp_path))
    whole = {path: path.read_bytes() for path in paths}
    headers = {path: read_header(path) for path in whole}

    def attempt(rng: random.Random) -> None:
        path = rng.choice(list(whole))
        header, is_sidecar = headers[path], path == pair.sidecar
        keys = [(key.start, key.end) for key in header.keys.values()]
        key, table = rng.choice(keys), (header.keys_end, header.tensors_end)
        span = rng.choice([key, key, table, (0, header.tensors_end), (header.data_start, 1 << 62)])
        target = sidecar if is_sidecar else bad
        target.write_bytes(mutated_bytes(rng, whole[path], *span, kinds=IN_PLACE))
        read_header(target)
        try:
            words = loader.read(base if is_sidecar else bad, sidecar if is_sidecar else None)
        except PopError as error:
            raise AssertionError(error.message) from error
        said["gave up" if words.startswith("llama.cpp aborted") else words and "refused"] += 1

    try:
        campaign(attempt)
    finally:
        loader.close()
        print(f"{said.total():,} opened: {dict(said)}, {len(loader.children)} children")
    assert said[""] and said["refused"]

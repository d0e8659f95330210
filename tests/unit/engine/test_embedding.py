"""Embeddings equal the full model's from an unpatched llama.cpp context."""

from typing import Any

import gguf
import numpy as np
import pytest

from pop_base.errors import PopError
from pop_local.engine.embedding import embedding
from support.calls import first_of, greedy, opened, prompt
from support.converted import tiny
from support.synthetic import add_keys, make_gguf

TOKENS = prompt(700)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_gguf(tmp_path_factory.mktemp("plain") / "model.gguf", "llama")


def own(path: Any, pooling: int) -> np.ndarray:
    """Return the embedding that llama_cpp computes."""
    import llama_cpp

    sizes: Any = {"n_ctx": 1024, "n_batch": 1024, "n_ubatch": 1024}
    llama = llama_cpp.Llama(str(path), embedding=True, pooling_type=pooling, verbose=False, **sizes)
    llama._batch.set_batch(batch=TOKENS, n_past=0, logits_all=True)
    llama._ctx.decode(llama._batch)
    pooled = llama_cpp.llama_get_embeddings_seq(llama.ctx, 0)
    vector = np.ctypeslib.as_array(pooled, (128,)).copy()
    llama.close()
    return vector / np.linalg.norm(vector)


def test_embeddings_are_pooled_by_the_files_type(path, tmp_path):
    last = add_keys(path, tmp_path / "last.gguf", llama__pooling_type=gguf.PoolingType.LAST)
    for file, pooling in ((path, gguf.PoolingType.MEAN), (last, gguf.PoolingType.LAST)):
        with opened(file, n_ctx=1024) as model:
            vector = embedding(first_of(model).cache, TOKENS)
        assert vector.dtype == np.float32
        assert np.allclose(vector, own(file, pooling), atol=5e-3)


def test_pruned_model_embeds_in_full_and_answers_afterwards(path, tmp_path):
    converted = tiny(tmp_path)
    with opened(converted, n_ctx=1024) as model, opened(path, n_ctx=1024) as full:
        model.pruning = False
        before = greedy(model, TOKENS)
        assert np.array_equal(
            embedding(first_of(model).cache, TOKENS), embedding(first_of(full).cache, TOKENS)
        )
        assert first_of(model).cache.n_tokens == 0
        assert greedy(model, TOKENS) == before


def test_other_pooling_types_are_refused(path, tmp_path):
    ranks = add_keys(path, tmp_path / "rank.gguf", llama__pooling_type=gguf.PoolingType.RANK)
    with opened(ranks) as model, pytest.raises(PopError, match="pooling type"):
        embedding(first_of(model).cache, TOKENS)

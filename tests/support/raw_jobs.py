"""Scripts of llama.cpp calls, which support.raw runs."""

import os
from dataclasses import dataclass, field

# Layers on the local GPUs, in all tests that use this; bit equality is not to be had then.
GPU_LAYERS = int(os.environ.get("POP_TEST_GPU_LAYERS", "0"))


@dataclass(frozen=True)
class Step:
    """One call. `op`: decode, embeddings, embed, causal, save, load, remove, shift, mode, boundary,
    full_from, sink, counters, exact, image, hidden, keep, run_deep, deep, question, scores, copy,
    logits, model.

    decode: `tokens` from `pos` on in `seq`, and in each of `coupled`; `logits` "last", "all" or
    "none"; `more`: further (seq, pos, tokens) in the same batch, with the logits of their last
    token. embeddings: as decode, giving the state after the output norm; embed: asks for it from
    now on. causal: whether rows see only earlier ones. save, load: the state of `seq` to or from
    `path`. shift: positions from `pos` on move by `value`, the tokens before them are removed.
    image: `value` rows of random embeddings from `pos` on, or `rows` (from, to) of them, in one
    batch, without logits unless it has a name: then of the last one. `grid`: that many columns of
    an image whose rows have several positions; otherwise `causal` says whether they see earlier
    rows only. hidden: as decode, giving the state of all tokens
    behind the last layer, as drafting heads read it (by a C++ function: not on Windows). exact: the
    rows that left exactly, deep: those of deep passes, which `counters` would forget. keep: states
    at the boundary from now on, or no longer. run_deep: a deep pass over the positions `tokens` of
    `seq`, whose logits "last" asks for; `value`: what it returns, if not 0. question: rows of `seq`
    from `pos` on. scores: of the first `value` positions. copy: `seq` becomes sequence `value`,
    too. logits: those of the last output, once more. model: the first layer that rows without
    logits need not enter (0: none), and whether the memory is recurrent, in part at least.
    """

    op: str
    name: str = ""
    tokens: tuple[int, ...] = ()
    more: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    pos: int = 0
    seq: int = 0
    coupled: tuple[int, ...] = ()
    logits: str = "last"
    path: str = ""
    value: int = 0
    rows: tuple[int, ...] = ()
    grid: int = 0
    causal: bool = False


@dataclass(frozen=True)
class Job:
    """`lib`: folder of an unpatched library; None: the installed one, which is patched.

    `further`: files after the model, as llama_model_load_from_splits takes them. `servers`: RPC
    servers that are its devices instead of local GPUs.
    """

    model: str
    steps: tuple[Step, ...]
    lib: str | None = None
    n_ctx: int = 2048
    n_batch: int = 2048
    n_ubatch: int = 512
    n_seq_max: int = 1
    swa_full: bool = True
    flash_attn: bool = False
    type_k: int = 1  # GGML_TYPE_F16
    type_v: int = 1
    kv_unified: bool = False
    lora: str = ""
    further: tuple[str, ...] = ()
    mmap: bool = True
    repacked: bool = True  # weights laid out anew for this processor's kernels
    cvec: tuple[float, ...] = field(default=())
    watched: bool = False  # by an evaluation callback
    n_gpu_layers: int = GPU_LAYERS
    servers: tuple[str, ...] = ()

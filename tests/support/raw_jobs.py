"""Describe scripts of llama.cpp calls for support.raw."""

import os
from dataclasses import dataclass, field

# Layers on the local GPUs in tests that use this. Results are then no longer equal bit for bit.
GPU_LAYERS = int(os.environ.get("POP_TEST_GPU_LAYERS", "0"))


@dataclass(frozen=True)
class Step:
    """A call, named by `op`. A step returns the logits of its outputs unless stated otherwise.

    - decode: `tokens` at positions from `pos` in `seq` and in each of `coupled`. `logits`: "last",
      "all" or "none". `more`: further (seq, pos, tokens) of the same batch.
    - embeddings: decode, and return the states after the output norm. embed: enable embeddings.
    - hidden: decode, and return all tokens' states after the last layer, which draft heads read.
      This calls a C++ function, so it does not work on Windows.
    - causal: set the causal mask for the following batches.
    - save, load: write the state of `seq` to `path`, or restore it.
    - remove: remove the cells from `pos`. copy: copy `seq` to sequence `value`.
    - shift: move the positions from `pos` by `value` and remove the tokens before them.
    - image: decode `value` rows of random embeddings from `pos`, or their slice `rows`, in one
      batch. A named step returns the last row's logits. `grid`: the image's columns, if rows have
      multiple positions; without it, `causal` sets whether rows see only earlier ones.
    - mode, boundary, full_from, deep_rows, sink: the patches' setters.
    - counters: return the counts of (context, full) rows, then reset all counts.
    - exact, deep, marked: return the count of rows that skipped layers exactly, ran in deep passes
      or were marked deep.
    - keep: store snapshots if `value` is 1. run_deep: run a deep pass over the positions
      `tokens`; `logits`: "last" or "none"; `value`: the expected status.
    - move: replace the rows from `pos` on by rows with the `tokens` and the K/V at the positions
      `rows` (-1: none yet); `value`: the expected status. overwrite: decode rows in place if
      `value` is 1.
    - logits: return the last output's logits again.
    - peak: return the child's peak resident memory in bytes since the last `peak` (Linux).
    - model: return the first layer that rows without logits may skip (0: none), and whether the
      model is recurrent or hybrid.
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
    """A script and its context. `lib`: folder of an unpatched library (None: the patched one).

    `further`: files after the model for llama_model_load_from_splits.
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
    repacked: bool = True  # weights repacked for this processor's kernels
    cvec: tuple[float, ...] = field(default=())
    watched: bool = False  # by an evaluation callback
    n_gpu_layers: int = GPU_LAYERS

"""A script of llama.cpp calls, run in a child process with the patched or the unpatched library.

`run(Job(...))` gives back, by name, the logits of each decode step that has a name. What is shared
between jobs (states of a sequence) goes through files. This module imports no code of pop_local.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Step:
    """One call. `op`: decode, embeddings, embed, causal, save, load, remove, shift, mode, boundary,
    full_from, sink, counters.

    decode: `tokens` from `pos` on in `seq`, and in each of `coupled`; `logits` "last", "all" or
    "none"; `more`: further (seq, pos, tokens) in the same batch, with the logits of their last
    token. embeddings: as decode, giving the state after the output norm; embed: asks for it from
    now on. causal: whether rows see only earlier ones. save, load: the state of `seq` to or from
    `path`. shift: positions from `pos` on move by `value`, the tokens before them are removed.
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


@dataclass(frozen=True)
class Job:
    """`lib`: folder of an unpatched library; None: the installed one, which is patched.

    `further`: files after the model, as llama_model_load_from_splits takes them.
    """

    model: str
    steps: tuple[Step, ...]
    lib: str | None = None
    n_ctx: int = 2048
    n_batch: int = 2048
    n_ubatch: int = 512
    n_seq_max: int = 1
    flash_attn: bool = False
    type_k: int = 1  # GGML_TYPE_F16
    type_v: int = 1
    kv_unified: bool = False
    lora: str = ""
    further: tuple[str, ...] = ()
    mmap: bool = True
    cvec: tuple[float, ...] = field(default=())


def run(job: Job) -> dict[str, np.ndarray]:
    """Run a job in a child process.

    Returns, by the step's name, the logits as float32 [n_outputs, n_vocab], for embeddings
    [n_tokens, n_embd], and for counters int64 [2] (context, full). Raises RuntimeError with the
    library's log when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        spec, out = Path(folder) / "job.json", Path(folder) / "out.npz"
        spec.write_text(json.dumps(asdict(job)))
        env = {key: value for key, value in os.environ.items() if key != "LLAMA_CPP_LIB_PATH"}
        if job.lib:
            env["LLAMA_CPP_LIB_PATH"] = job.lib
        child = subprocess.run(
            [sys.executable, __file__, str(spec), str(out)], env=env, capture_output=True, text=True
        )
        if child.returncode != 0:
            raise RuntimeError(child.stderr)
        with np.load(out) as arrays:
            return {name: arrays[name] for name in arrays.files}


class Session:
    """A model and a context of the library that this process loaded."""

    def __init__(self, job: Job) -> None:
        import llama_cpp.llama_cpp as lib

        self.lib = lib
        self.capi = lib._lib
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        if not job.mmap:
            params.load_mode = lib.LLAMA_LOAD_MODE_NONE
        self.model = self._load_model(job, params)
        if not self.model:
            raise RuntimeError("the model does not load")
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.n_vocab = lib.llama_vocab_n_tokens(self.vocab)
        self.ctx = lib.llama_init_from_model(self.model, self._context_params(job))
        if not self.ctx:
            raise RuntimeError("no context")
        if job.lora:
            self._set_lora(job.lora)
        if job.cvec:
            self._set_cvec(job.cvec)

    def _load_model(self, job: Job, params: object) -> object:
        if not job.further:
            return self.lib.llama_model_load_from_file(job.model.encode(), params)
        files = [path.encode() for path in (job.model, *job.further)]
        paths = (ctypes.c_char_p * len(files))(*files)
        return self.lib.llama_model_load_from_splits(paths, len(files), params)

    def _context_params(self, job: Job) -> object:
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = job.n_ctx, job.n_batch, job.n_ubatch
        params.n_seq_max, params.kv_unified = job.n_seq_max, job.kv_unified
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = int(job.flash_attn)
        params.type_k, params.type_v = job.type_k, job.type_v
        return params

    def _set_lora(self, path: str) -> None:
        adapter = self.lib.llama_adapter_lora_init(self.model, path.encode())
        adapters = (self.lib.llama_adapter_lora_p_ctypes * 1)(adapter)
        if self.lib.llama_set_adapters_lora(self.ctx, adapters, 1, (ctypes.c_float * 1)(1.0)):
            raise RuntimeError("the LoRA adapter does not apply")

    def _set_cvec(self, cvec: tuple[float, ...]) -> None:
        data = (ctypes.c_float * len(cvec))(*cvec)
        n_embd, n_layer = (
            self.lib.llama_model_n_embd(self.model),
            self.lib.llama_model_n_layer(self.model),
        )
        if self.lib.llama_set_adapter_cvec(self.ctx, data, len(cvec), n_embd, 1, n_layer):
            raise RuntimeError("the control vector does not apply")

    def step(self, step: Step) -> np.ndarray | None:
        return getattr(self, f"_{step.op}")(step)

    def _decode(self, step: Step) -> np.ndarray:
        return self._outputs(step, self.lib.llama_get_logits_ith, self.n_vocab)

    def _embeddings(self, step: Step) -> np.ndarray:
        self._embed(step)
        n_embd = self.lib.llama_model_n_embd(self.model)
        return self._outputs(step, self.lib.llama_get_embeddings_ith, n_embd)

    def _embed(self, step: Step) -> None:
        self.lib.llama_set_embeddings(self.ctx, True)

    def _causal(self, step: Step) -> None:
        self.lib.llama_set_causal_attn(self.ctx, bool(step.value))

    def _outputs(self, step: Step, get: Callable[..., Any], n_values: int) -> np.ndarray:
        parts = [(step.seq, step.pos, step.tokens), *step.more]
        n_tokens = sum(len(tokens) for _, _, tokens in parts)
        batch = self.lib.llama_batch_init(n_tokens, 0, 1 + len(step.coupled))
        outputs, row = [], 0
        for seq, pos, tokens in parts:
            for offset, token in enumerate(tokens):
                is_output = step.logits == "all" or (
                    step.logits == "last" and offset == len(tokens) - 1
                )
                batch.token[row], batch.pos[row] = token, pos + offset
                seqs = (seq, *step.coupled)
                batch.n_seq_id[row] = len(seqs)
                for number, each in enumerate(seqs):
                    batch.seq_id[row][number] = each
                batch.logits[row] = is_output
                outputs += [row] if is_output else []
                row += 1
        batch.n_tokens = n_tokens
        status = self.lib.llama_decode(self.ctx, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        rows = [np.ctypeslib.as_array(get(self.ctx, row), (n_values,)).copy() for row in outputs]
        self.lib.llama_batch_free(batch)
        return np.stack(rows) if rows else np.zeros((0, n_values), np.float32)

    def _save(self, step: Step) -> None:
        size = self.lib.llama_state_seq_get_size(self.ctx, step.seq)
        data = (ctypes.c_uint8 * size)()
        self.lib.llama_state_seq_get_data(self.ctx, data, size, step.seq)
        Path(step.path).write_bytes(bytes(data))

    def _load(self, step: Step) -> None:
        raw = Path(step.path).read_bytes()
        data = (ctypes.c_uint8 * len(raw)).from_buffer_copy(raw)
        if self.lib.llama_state_seq_set_data(self.ctx, data, len(raw), step.seq) == 0:
            raise RuntimeError("the state does not load")

    def _remove(self, step: Step) -> None:
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.ctx), step.seq, step.pos, -1)

    def _shift(self, step: Step) -> None:
        memory = self.lib.llama_get_memory(self.ctx)
        self.lib.llama_memory_seq_rm(memory, step.seq, step.pos + step.value, step.pos)
        self.lib.llama_memory_seq_add(memory, step.seq, step.pos, -1, step.value)

    def _mode(self, step: Step) -> None:
        self._pop("llama_pop_set_mode", step.value)

    def _boundary(self, step: Step) -> None:
        self._pop("llama_pop_set_boundary", step.value)

    def _full_from(self, step: Step) -> None:
        self._pop("llama_pop_set_full_from", step.seq, step.value)

    def _sink(self, step: Step) -> None:
        self._pop("llama_pop_set_sink", step.value)

    def _counters(self, step: Step) -> np.ndarray:
        counters = (ctypes.c_int64 * 2)()
        self.capi.llama_pop_get_counters(ctypes.c_void_p(self.ctx), counters)
        self.capi.llama_pop_reset_counters(ctypes.c_void_p(self.ctx))
        return np.array(list(counters), np.int64)

    def _pop(self, function: str, *args: int) -> None:
        if getattr(self.capi, function)(ctypes.c_void_p(self.ctx), *args) != 0:
            raise RuntimeError(f"{function}{args} was refused")


def main() -> None:
    spec, out = sys.argv[1:]
    raw = json.loads(Path(spec).read_text())
    steps = tuple(Step(**step) for step in raw.pop("steps"))
    session = Session(Job(steps=steps, **raw))
    results = {step.name: session.step(step) for step in steps}
    named: dict[str, Any] = {name: array for name, array in results.items() if name}
    np.savez(out, **named)


if __name__ == "__main__":
    main()

"""Run scripts of llama.cpp calls in child processes with the patched or unpatched library.

`run(Job(...))` returns the logits of each named decode step. Jobs share sequence states through
files. Each library has one child for all jobs. A child keeps the most recent models open; each job
has its own context. This module imports no code of pop_local.
"""

import ctypes
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from support.raw_jobs import Job, Step

# Models open in a child: a Trio's three and one more.
N_MODELS = 4
# Setters of a context, by operation.
SETTERS = {
    "mode": "llama_pop_set_mode",
    "boundary": "llama_pop_set_boundary",
    "overwrite": "llama_pop_set_overwrite",
    "sink": "llama_pop_set_sink",
    "keep": "llama_pop_set_snapshots",
}


class DiedError(Exception):
    """Raised with the child's stderr if the library ended its process."""


def run(job: Job) -> dict[str, np.ndarray]:
    """Run a job in its library's child process.

    Returns arrays by step name: logits as float32 [n_outputs, n_vocab], embeddings
    [n_tokens, n_embd], counters int64 [2] (context, full), exact int64 [1]. Raises RuntimeError
    with the library's log if a call fails. Raises DiedError if the child crashed; the next job
    starts another child.
    """
    child = _children.get(job.lib) or _Child(job.lib)
    _children[job.lib] = child
    try:
        return child.run(job)
    except DiedError:
        del _children[job.lib]
        raise


class _Child:
    """A process with one library; jobs and results are pickled.

    Its stderr is a file; a job's log starts at the file's length before the job.
    """

    def __init__(self, lib: str | None) -> None:
        # Our kernels round differently from those of an unpatched library.
        tests = str(Path(__file__).parents[1])
        env = (
            os.environ
            | {"GGML_POP_KERNELS": "0", "PYTHONPATH": tests}
            | ({"LLAMA_CPP_LIB_PATH": lib} if lib else {})
        )
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the child)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.raw"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def run(self, job: Job) -> dict[str, np.ndarray]:
        assert self._process.stdin and self._process.stdout
        start = self._log.seek(0, os.SEEK_END)
        try:
            pickle.dump(job, self._process.stdin)
            self._process.stdin.flush()
            results: dict[str, np.ndarray] | None = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            status = self._process.wait()
            raise DiedError(f"{self._written(start)}\nexit status {status}") from None
        if results is None:
            raise RuntimeError(self._written(start))
        return results

    def _written(self, start: int) -> str:
        self._log.seek(start)
        return self._log.read().decode(errors="replace")


_children: dict[str | None, _Child] = {}


class Models:
    """The most recently used models, by their files' names, sizes and times."""

    def __init__(self) -> None:
        import llama_cpp.llama_cpp as lib

        self._lib = lib
        self._opened: dict[object, object] = {}
        lib.llama_backend_init()

    def get(self, job: Job) -> object:
        files = (job.model, *job.further)
        stats = [Path(path).stat() for path in files]
        key = (
            files,
            *(job.mmap, job.repacked, job.n_gpu_layers),
            *((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats),
        )
        model = self._opened.pop(key, None) or self._load(job)
        if not model:
            raise RuntimeError("the model does not load")
        self._opened[key] = model
        if len(self._opened) > N_MODELS:
            self._lib.llama_model_free(self._opened.pop(next(iter(self._opened))))
        return model

    def _load(self, job: Job) -> object:
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = job.n_gpu_layers
        params.use_extra_bufts = job.repacked
        if not job.mmap:
            params.load_mode = self._lib.LLAMA_LOAD_MODE_NONE
        if not job.further:
            return self._lib.llama_model_load_from_file(job.model.encode(), params)
        files = [path.encode() for path in (job.model, *job.further)]
        paths = (ctypes.c_char_p * len(files))(*files)
        return self._lib.llama_model_load_from_splits(paths, len(files), params)


class Session:
    """A context of a model in the library of this process."""

    def __init__(self, job: Job, model: object) -> None:
        import llama_cpp.llama_cpp as lib

        self.lib = lib
        self.capi = lib._lib
        self.model = model
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.n_vocab = lib.llama_vocab_n_tokens(self.vocab)
        self.ctx = lib.llama_init_from_model(self.model, self._context_params(job))
        if not self.ctx:
            raise RuntimeError("no context")
        self._adapter: Any = None
        if job.lora:
            self._set_lora(job.lora)
        if job.cvec:
            self._set_cvec(job.cvec)

    def close(self) -> None:
        self.lib.llama_free(self.ctx)
        if self._adapter:
            self.lib.llama_adapter_lora_free(self._adapter)

    def _context_params(self, job: Job) -> object:
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = job.n_ctx, job.n_batch, job.n_ubatch
        params.n_seq_max, params.kv_unified = job.n_seq_max, job.kv_unified
        params.n_threads = params.n_threads_batch = 1
        params.swa_full = job.swa_full
        params.flash_attn_type = int(job.flash_attn)
        params.type_k, params.type_v = job.type_k, job.type_v
        # Otherwise a GPU would compute large products of layers that are on the CPU.
        params.op_offload = job.n_gpu_layers > 0
        if job.watched:
            self._watcher = self.lib.ggml_backend_sched_eval_callback(lambda *_: False)
            params.cb_eval = self._watcher
        return params

    def _set_lora(self, path: str) -> None:
        self._adapter = self.lib.llama_adapter_lora_init(self.model, path.encode())
        adapters = (self.lib.llama_adapter_lora_p_ctypes * 1)(self._adapter)
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
        if step.op in SETTERS:
            self._pop(SETTERS[step.op], step.value)
            return None
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

    def _hidden(self, step: Step) -> np.ndarray:
        ctx = ctypes.c_void_p(self.ctx)
        self.capi._Z26llama_set_embeddings_nextnP13llama_contextbb(ctx, True, False)
        self._decode(step)
        get = self.capi._Z26llama_get_embeddings_nextnP13llama_context
        get.restype = ctypes.POINTER(ctypes.c_float)
        shape = len(step.tokens), self.lib.llama_model_n_embd(self.model)
        states: np.ndarray = np.ctypeslib.as_array(get(ctx), shape).copy()
        self.capi._Z26llama_set_embeddings_nextnP13llama_contextbb(ctx, False, False)
        return states

    def _image(self, step: Step) -> np.ndarray:
        n_embd = self.lib.llama_model_n_embd_inp(self.model)
        states = np.random.default_rng(step.pos).standard_normal((step.value, n_embd), np.float32)
        first, end = step.rows or (0, step.value)
        return self._embedded(
            states[first:end],
            image_positions(step)[:, first:end],
            causal=step.causal or step.grid > 0,
            with_logits=bool(step.name),
            seq=step.seq,
        )

    def _embedded(
        self, states: np.ndarray, positions: np.ndarray, causal: bool, with_logits: bool, seq: int
    ) -> np.ndarray:
        """Decode rows, float32 [n, n_embd_inp], at positions int32 [n_pos, n]."""
        n, n_embd = states.shape
        states, positions = np.ascontiguousarray(states), np.ascontiguousarray(positions)
        batch = self.lib.llama_batch_init(positions.size, n_embd, 1)  # room for all positions
        ctypes.memmove(batch.embd, states.ctypes.data, states.nbytes)
        ctypes.memmove(batch.pos, positions.ctypes.data, positions.nbytes)
        for row in range(n):
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, seq
            batch.logits[row] = with_logits and row == n - 1
        batch.n_tokens = n
        self.lib.llama_set_causal_attn(self.ctx, causal)
        if (status := self.lib.llama_decode(self.ctx, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self.lib.llama_set_causal_attn(self.ctx, True)
        self.lib.llama_batch_free(batch)
        if not with_logits:
            return np.zeros((0, self.n_vocab), np.float32)
        logits = self.lib.llama_get_logits_ith(self.ctx, n - 1)
        return np.ctypeslib.as_array(logits, (1, self.n_vocab)).copy()

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

    def _full_from(self, step: Step) -> None:
        self._pop("llama_pop_set_full_from", step.seq, step.value)

    def _deep_rows(self, step: Step) -> None:
        n = len(step.tokens)
        self._pop("llama_pop_set_deep_rows", step.seq, (ctypes.c_int32 * n)(*step.tokens), n)

    def _move(self, step: Step) -> None:
        n = len(step.tokens)
        rows, tokens = (ctypes.c_int32 * n)(*step.rows), (ctypes.c_int32 * n)(*step.tokens)
        ctx = ctypes.c_void_p(self.ctx)
        status = self.capi.llama_pop_move_rows(ctx, step.seq, step.pos, rows, tokens, n)
        if status != step.value:
            raise RuntimeError(f"llama_pop_move_rows returned {status}")

    def _counters(self, step: Step) -> np.ndarray:
        rows = self._rows()[:2]
        self.capi.llama_pop_reset_counters(ctypes.c_void_p(self.ctx))
        return rows

    def _peak(self, step: Step) -> np.ndarray:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        return np.array([int(status.partition("VmHWM:")[2].split()[0]) << 10])

    def _exact(self, step: Step) -> np.ndarray:
        return self._rows()[2:3]

    def _model(self, step: Step) -> np.ndarray:
        model = self.lib.llama_get_model(self.ctx)
        exact = self.capi.llama_pop_model_exact(ctypes.c_void_p(model))
        recurs = self.lib.llama_model_is_recurrent(model) or self.lib.llama_model_is_hybrid(model)
        return np.array([exact, recurs], np.int64)

    def _deep(self, step: Step) -> np.ndarray:
        return self._rows()[3:4]

    def _marked(self, step: Step) -> np.ndarray:
        return self._rows()[4:]

    def _run_deep(self, step: Step) -> np.ndarray:
        n = len(step.tokens)
        positions = (ctypes.c_int32 * n)(*step.tokens)
        with_logits = step.logits == "last"
        ctx = ctypes.c_void_p(self.ctx)
        status = self.capi.llama_pop_run_deep(ctx, step.seq, positions, n, with_logits)
        if status != step.value:
            raise RuntimeError(f"llama_pop_run_deep returned {status}")
        if not with_logits or status != 0:
            return np.zeros((0, self.n_vocab), np.float32)
        return self._logits(step)

    def _logits(self, step: Step) -> np.ndarray:
        logits = self.lib.llama_get_logits_ith(self.ctx, -1)
        return np.ctypeslib.as_array(logits, (1, self.n_vocab)).copy()

    def _copy(self, step: Step) -> None:
        self.lib.llama_memory_seq_cp(
            self.lib.llama_get_memory(self.ctx), step.seq, step.value, -1, -1
        )

    def _rows(self) -> np.ndarray:
        counters = (ctypes.c_int64 * 5)()
        self.capi.llama_pop_get_counters(ctypes.c_void_p(self.ctx), counters)
        return np.array(list(counters), np.int64)

    def _pop(self, function: str, *args: Any) -> None:
        if getattr(self.capi, function)(ctypes.c_void_p(self.ctx), *args) != 0:
            raise RuntimeError(f"{function}{args} was refused")


def image_positions(step: Step) -> np.ndarray:
    """Return image positions, int32 [1 or 4, n]: time, height, width, unused."""
    rows = np.arange(step.value, dtype=np.int32)
    if not step.grid:
        return step.pos + rows[None]
    height, width = np.divmod(rows, step.grid)
    return np.stack([0 * rows + step.pos, step.pos + height, step.pos + width, 0 * rows])


def results(job: Job, models: Models) -> dict[str, np.ndarray | None]:
    session = Session(job, models.get(job))
    try:
        outputs = [(step.name, session.step(step)) for step in job.steps]
    finally:
        session.close()
    return {name: array for name, array in outputs if name}


def serve(jobs: IO[bytes], answers: IO[bytes]) -> None:
    """Answer each job with its results, or with None if it failed (the log has the reason)."""
    models = Models()
    while True:
        try:
            job: Job = pickle.load(jobs)
        except EOFError:
            return
        try:
            answer = results(job, models)
        except Exception:
            traceback.print_exc()
            answer = None
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    # The log receives all output of the library; a crash prints a backtrace.
    kept = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, kept)

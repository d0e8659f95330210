"""What calibrating costs: time against plain passes, memory against the plan. Not a test.

    python tests/bench/measure_calibration.py MODEL.gguf --text FILE [--tokens 16384] [--rounds 3]
    python tests/bench/measure_calibration.py --synthetic FOLDER [--text FILE] [--tokens 16384]

The first form compares, in rounds on one loaded model: the fit on FILE with a plain forward pass
over the same windows; sampling half as many tokens with llama_decode alone on as many sequences.
Then it converts the model in a child process, default text, and compares its peak memory with what
the plan says. The second form only does this last, on a random model shaped like Llama-3.2-1B,
which it writes to FOLDER and removes again. On a busy machine take `--threads 1 --clock cpu`.

Prints one JSON object. Linux only: memory comes from /proc.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from converter.plan import make_plan, parse_skip
from converter.shape import read_shape
from converter.source import read_source
from measure_convert import anonymous_bytes
from pop_local.calibration.job import Follow, calibrate
from pop_local.calibration.loaded import LoadedModel
from pop_local.calibration.options import FitOptions
from pop_local.calibration.samples import MAX_SEQUENCES, sample_windows
from pop_local.calibration.texts import N_WINDOW, given_text
from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.batch import Outputs, TokenBatch
from shared import DEFAULTS, add_header

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SILENT = Follow(lambda done, total: None, lambda done, total: None, lambda: False)
MAX_FIT_RATIO, MAX_SAMPLING_RATIO = 4.0, 3.0
LLAMA_1B = replace(
    DEFAULTS["llama"],
    n_layer=16,
    n_embd=2048,
    n_head=32,
    n_head_kv=8,
    head_dim=64,
    n_ff=8192,
    n_vocab=128_256,
    type=gguf.GGMLQuantizationType.Q8_0,
    tied_output=True,
)


# --- time


def times(options: argparse.Namespace) -> dict[str, Any]:
    """Medians of rounds, in each of which everything runs once."""
    shape, source = read_shape(options.model), read_source(options.model)
    plan = make_plan(shape, skip=parse_skip(options.skip), projection="fitted")
    settings = FitOptions(options.tokens, options.text, memory_bytes=1 << 30)
    n_windows = options.tokens // N_WINDOW
    n_sampled = max(1, n_windows // 2)
    with LoadedModel(options.model, n_threads=options.threads) as model:
        windows = given_text(model, options.text, n_windows, shape.n_embd).windows
        runs: dict[str, Callable[[], object]] = {
            "forward_s": lambda: forward(model, windows),
            "fit_s": lambda: calibrate((plan,), model, source, settings, SILENT),
            "decode_s": lambda: decode(model, n_sampled),
            "sampling_s": lambda: sample(model, n_sampled),
        }
        rounds = [
            {name: timed(work, CLOCKS[options.clock]) for name, work in runs.items()}
            for _ in range(options.rounds)
        ]
    found = {name: statistics.median(each[name] for each in rounds) for name in runs}
    fit = statistics.median(each["fit_s"] / each["forward_s"] for each in rounds)
    sampling = statistics.median(each["sampling_s"] / each["decode_s"] for each in rounds)
    return found | {
        "n_tokens": windows.size,
        "n_sampled": n_sampled * N_WINDOW,
        "n_sequences": min(n_sampled, MAX_SEQUENCES),
        "fit_ratio": fit,
        "sampling_ratio": sampling,
        "is_within": fit < MAX_FIT_RATIO and sampling < MAX_SAMPLING_RATIO,
        "rounds": rounds,
    }


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    started_s = clock()
    work()
    return clock() - started_s


def forward(model: LoadedModel, windows: np.ndarray) -> None:
    """Each window through the whole model, no logits wanted, as in the fit but unobserved."""
    api, batch = bindings(), TokenBatch(N_WINDOW)
    with model.context(n_ctx=N_WINDOW, n_batch=N_WINDOW, n_ubatch=N_WINDOW) as ctx:
        for window in windows.tolist():
            api.llama_memory_clear(api.llama_get_memory(ctx), False)
            if batch.decode(ctx, window, 0, Outputs.NONE) != 0:
                raise SystemExit("llama_decode failed")
            api.llama_synchronize(ctx)
    batch.close()


def decode(model: LoadedModel, n_windows: int) -> None:
    """As many tokens on as many sequences as `sample`, by llama_decode alone."""
    api = bindings()
    for start in range(0, n_windows, MAX_SEQUENCES):
        n = min(MAX_SEQUENCES, n_windows - start)
        batch = TokenBatch(n, is_step=True)
        tokens = np.random.default_rng(start).integers(0, model.n_vocab, (N_WINDOW, n), np.int32)
        with model.context(n_ctx=n * N_WINDOW, n_batch=n, n_ubatch=n, n_seq_max=n) as ctx:
            for pos, row in enumerate(tokens[1:]):
                if batch.decode(ctx, row, pos, Outputs.ALL) != 0:
                    raise SystemExit("llama_decode failed")
                api.llama_synchronize(ctx)
        batch.close()


def sample(model: LoadedModel, n_windows: int) -> None:
    starts = [[model.first_token]] * n_windows
    sample_windows(model, starts, N_WINDOW, seed=0, on_progress=lambda done, total: None)


# --- memory


def memory(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Of a whole `pop-local convert`; `peak_rss_bytes` counts the model's mapped pages, too."""
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        command = [sys.executable, "-m", "pop_local", "convert", str(model)]
        command += [str(Path(folder, "out.gguf")), "--sidecar", "--json", "--force"]
        command += ["--skip", options.skip, "--tokens", str(options.tokens)]
        command += [] if options.threads is None else ["--threads", str(options.threads)]
        command += ["--text", str(options.text)] if options.synthetic and options.text else []
        started_s = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peak_anon_bytes = 0
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            peak_anon_bytes = max(peak_anon_bytes, anonymous_bytes(process.pid))
            time.sleep(0.02)
        assert process.stdout is not None
        report = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            raise SystemExit(f"{' '.join(command)} failed")
    planned: int = json.loads(report)["memory_bytes"]
    peak_bytes = usage.ru_maxrss * 1024
    return {
        "model_bytes": model.stat().st_size,
        "planned_bytes": planned,
        "peak_rss_bytes": peak_bytes,
        "peak_rss_anon_bytes": peak_anon_bytes,
        "convert_s": time.perf_counter() - started_s,
        "is_within": peak_bytes <= planned,
    }


def make_llama_1b(path: Path) -> None:
    """Random Q8_0 weights of unit gain, written tensor by tensor."""
    recipe, rng = LLAMA_1B, np.random.default_rng(0)
    n_kv = recipe.n_head_kv * recipe.head_dim
    layer = {
        "attn_q": (recipe.n_embd, recipe.n_embd),
        "attn_k": (n_kv, recipe.n_embd),
        "attn_v": (n_kv, recipe.n_embd),
        "attn_output": (recipe.n_embd, recipe.n_embd),
        "ffn_gate": (recipe.n_ff, recipe.n_embd),
        "ffn_up": (recipe.n_ff, recipe.n_embd),
        "ffn_down": (recipe.n_embd, recipe.n_ff),
        "attn_norm": (recipe.n_embd,),
        "ffn_norm": (recipe.n_embd,),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (recipe.n_vocab, recipe.n_embd)}
    shapes["output_norm.weight"] = (recipe.n_embd,)
    for number in range(recipe.n_layer):
        shapes |= {f"blk.{number}.{name}.weight": shape for name, shape in layer.items()}
    writer = gguf.GGUFWriter(path, "llama")
    add_header(writer, recipe)
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            stored = (shape[0], shape[1] // 32 * 34)
            n_bytes = stored[0] * stored[1]
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), n_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        for shape in shapes.values():
            file.write(bytes(-file.tell() % 32))
            file.write(weights(shape, rng))
        file.write(bytes(-file.tell() % 32))


def weights(shape: tuple[int, ...], rng: np.random.Generator) -> bytes:
    if len(shape) == 1:
        return np.ones(shape, np.float32).tobytes()
    blocks = np.empty(shape[0] * shape[1] // 32, [("scale", "<f2"), ("values", "i1", 32)])
    blocks["values"] = rng.integers(-127, 128, (len(blocks), 32), np.int8)
    # Uniform whole numbers up to 127 have a standard deviation of 73.6.
    blocks["scale"] = shape[1] ** -0.5 / 73.6
    return blocks.tobytes()


def synthetic(options: argparse.Namespace) -> dict[str, Any]:
    path = options.synthetic / "llama-1b-random.gguf"
    try:
        make_llama_1b(path)
        return {"model": path.stem} | memory(path, options)
    finally:
        path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--synthetic", type=Path, metavar="FOLDER")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--skip", default="1/3")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    if options.synthetic:
        print(json.dumps(synthetic(options)))
        return
    if options.model is None or options.text is None:
        parser.error("give a model and --text, or --synthetic")
    found = {"model": str(options.model), "clock": options.clock, "threads": options.threads}
    print(json.dumps(found | times(options) | {"memory": memory(options.model, options)}))


if __name__ == "__main__":
    main()

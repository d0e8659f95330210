"""How exact the kernels for prompts are: KL from the same weights computed in F32. Not a test.

    python tests/bench/measure_exactness.py MODEL.gguf [--text FILE] [--chunks 8] [--tokens 512]
        [--parts] [--threads 1] [--json]

The truth is an F32 copy of the model in a temporary folder (TMPDIR), with K/V in F32, read by
llama.cpp's own kernels. The model itself is read by these and by each of ours that this machine
has, in a process each. Only the fastest of ours finds weights repacked: these may be in buffers
for AMX, which kernels of fewer instructions leave to llama.cpp.

Each chunk of held-out text is one prompt, read in full. All rows are compared but the last one.
Errors are standard errors by chunk, differences are paired by chunk. KL is in 0.001 nats. `--parts`
tells products from attention: without flash attention ours compute products only, with F32 weights
attention only. Prints Markdown, or one JSON object. The folder takes 4 bytes a weight and a logit.
"""

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

from measure_speed import machine, show
from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.batch import Outputs, TokenBatch
from pop_local.engine.llama.devices import prompt_kernels
from pop_local.engine.model import PopModel
from pop_local.measure.divergence import Floats, Logits, divergence, likelihood, predictions
from pop_local.measure.estimate import Estimate, exp_mean, mean, quantile
from pop_local.measure.heldout import given_text, shipped_text, spread_windows, tokenize
from pop_local.measure.probes import bos

KERNELS = ("amx", "avx512vnni", "avxvnni", "avx2")
F32 = {"type_k": 0, "type_v": 0}  # GGML_TYPE_F32


@dataclass(frozen=True)
class Setting:
    """`kernels`: GGML_POP_KERNELS. `flash_attn`, `repack`: PopModel's. `is_f32`: the copy."""

    name: str
    kernels: str = "0"
    flash_attn: bool = False
    repack: bool = True
    is_f32: bool = False


TRUTH = Setting("truth", is_f32=True)
UPSTREAM = (Setting("llama.cpp, fa off"), Setting("llama.cpp, fa on", flash_attn=True))


@dataclass(frozen=True)
class Scores:
    """Of each row [n_chunks, n_tokens - 1], in nats."""

    kl: Floats
    nll: Floats


def settings(with_parts: bool) -> Iterator[Setting]:
    """What is compared, the kernels that this machine lacks among it."""
    yield from (TRUTH, *UPSTREAM, Setting("llama.cpp, fa off, not repacked", repack=False))
    if with_parts:
        yield Setting("llama.cpp, fa off, F32 weights", is_f32=True)
        yield Setting("llama.cpp, fa on, F32 weights", flash_attn=True, is_f32=True)
    for name in KERNELS:
        repack = name == prompt_kernels()
        yield Setting(name, name, True, repack)
        if with_parts:
            yield Setting(f"{name}, fa off", name, False, repack)
            yield Setting(f"{name}, F32 weights", name, True, is_f32=True)


def write_f32(source: Path, target: Path) -> None:
    """Write a copy with the same keys, all of its tensors in F32."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    writer.data_alignment = reader.alignment
    for name, field in reader.fields.items():
        if name != "general.architecture" and not name.startswith("GGUF."):
            item = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], item)
    for tensor in reader.tensors:
        dims, size_bytes = tensor.shape[::-1].tolist(), 4 * int(tensor.n_elements)
        writer.add_tensor_info(tensor.name, dims, np.dtype(np.float32), size_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(dequantize(tensor.data, tensor.tensor_type))
    writer.close()


def score(setting: Setting, folder: Path, options: argparse.Namespace) -> Scores | None:
    """Read all chunks; the truth leaves its logits in the folder. None: no such kernels here."""
    os.environ["GGML_POP_KERNELS"] = setting.kernels  # which is read once in a process
    if setting.kernels not in ("0", prompt_kernels()):
        return None
    n, is_truth = options.tokens, setting == TRUTH
    how: dict[str, Any] = {"n_ctx": n, "n_batch": n, "n_ubatch": n, "n_threads": options.threads}
    how |= {"flash_attn": setting.flash_attn, "repack": setting.repack} | (F32 if is_truth else {})
    scores = []
    with PopModel(folder / "f32" if setting.is_f32 else options.model, n_gpu_layers=0, **how) as m:
        start, text = bos(m), given_text(options.text) if options.text else shipped_text()
        windows = spread_windows(tokenize(m, text), options.chunks, n - len(start))
        for number, chunk in enumerate([*start, *window] for window in windows):
            read, path = predictions(logits(m, chunk)[:-1]), folder / f"{number}.npy"
            if is_truth:
                np.save(path, read.logits)
            kl = divergence(predictions(np.load(path, mmap_mode="r")), read).kl
            scores.append((kl, likelihood(read, np.asarray(chunk[1:])).nll))
    return Scores(*map(np.stack, zip(*scores, strict=True)))


def logits(model: PopModel, tokens: list[int]) -> Logits:
    """Return those of all rows of a prompt read in full [n, n_vocab]; the next overwrites them."""
    model.pruning = False
    model.clear()
    backend.set_reading(model.ctx, True)
    with closing(TokenBatch(len(tokens))) as rows:
        if code := rows.decode(model.ctx, tokens, 0, Outputs.ALL):
            raise logs.not_decoded(code)
    buffer = backend.bindings().llama_get_logits(model.ctx)
    return np.ctypeslib.as_array(buffer, (len(tokens), model.n_vocab()))


def measure(options: argparse.Namespace) -> dict[str, Scores]:
    """Return the scores of all settings by name."""
    found = {}
    with TemporaryDirectory() as folder:
        write_f32(options.model, Path(folder) / "f32")
        for setting in settings(options.parts):
            show(setting.name)
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                found[setting.name] = pool.submit(score, setting, Path(folder), options).result()
    return {name: scores for name, scores in found.items() if scores}


def figures(scores: Scores, found: dict[str, Scores]) -> dict[str, Estimate]:
    kl, nll = 1000 * scores.kl, scores.nll
    less = {f"less {u.name}": mean(kl - 1000 * found[u.name].kl) for u in UPSTREAM}
    ppl_ratio = exp_mean(nll - found[TRUTH.name].nll)
    whole = {"KL": mean(kl), "99.9 %": quantile(kl, 0.999)} | less
    return whole | {"PPL": exp_mean(nll), "PPL ratio to truth": ppl_ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="instead of the held-out text of pop-local")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a chunk, BOS included")
    parser.add_argument("--parts", action="store_true", help="products and attention apart, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options)
    rows = {name: figures(scores, found) for name, scores in found.items()}
    about = f"{options.model}: {options.chunks} chunks of {options.tokens} tokens, {machine()}"
    if options.json:
        shown = {n: {k: asdict(v) for k, v in row.items()} for n, row in rows.items()}
        print(json.dumps({"about": about, "rows": shown}))
        return
    print(f"{about}\n\n| setting |", *(f" {name} |" for name in rows[TRUTH.name]))
    print("|---|" + "---:|" * len(rows[TRUTH.name]))
    for name, row in rows.items():
        values = (f"{v.value:.5g}" + (f" ± {v.se:.2g}" if v.se else "") for v in row.values())
        print(f"| {name} |", *(f"{value} |" for value in values))


if __name__ == "__main__":
    main()

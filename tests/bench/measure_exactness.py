"""Measure the prompt kernels' KL from the same weights computed in F32. Not a test.

    python tests/bench/measure_exactness.py MODEL.gguf [--text FILE] [--chunks 8] [--tokens 512]
        [--skip 0] [--parts] [--json]

The reference is an F32 copy of the model in a temporary folder (TMPDIR, 4 bytes per weight and per
logit), with K/V in F32, computed by llama.cpp's own kernels. Then these kernels, and each of ours
that this machine supports, read the original model on one thread.

Each chunk of held-out text is one prompt, read in full. All rows but the last are compared.
`--skip` leaves out the first rows: without BOS they may differ by nats and dominate the mean.
Errors are standard errors by chunk, differences are paired. `--parts` separates products from
attention: without flash attention our kernels compute only products, with F32 weights only
attention. Prints Markdown.
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

from measure_speed import machine, show
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama import backend, logs
from pop_local.engine.llama.batch import Outputs, TokenBatch
from pop_local.engine.llama.devices import cpu_kernels
from pop_local.engine.model import PopModel
from pop_local.measure.divergence import Floats, Logits, divergence, likelihood, predictions
from pop_local.measure.estimate import Estimate, exp_mean, mean, quantile
from pop_local.measure.heldout import given_text, shipped_text, spread_windows, tokenize
from shared import write_f32
from support.calls import first_of


@dataclass(frozen=True)
class Setting:
    """`kernels`: GGML_POP_KERNELS. `flash_attn`, `repack`: PopModel's. `is_f32`: the copy."""

    name: str
    kernels: str = "0"
    flash_attn: bool = False
    repack: bool | None = None
    is_f32: bool = False


TRUTH = Setting("truth", is_f32=True)
UPSTREAM = (Setting("llama.cpp, fa off"), Setting("llama.cpp, fa on", flash_attn=True))


def settings(with_parts: bool) -> Iterator[Setting]:
    """Return the settings to compare, including kernels that this machine lacks."""
    yield from (TRUTH, *UPSTREAM, Setting("llama.cpp, fa off, not repacked", repack=False))
    if with_parts:
        yield Setting("llama.cpp, fa off, F32 weights", is_f32=True)
        yield Setting("llama.cpp, fa on, F32 weights", flash_attn=True, is_f32=True)
    for name in ("amx", "avx512vnni", "avxvnni", "avx2"):
        yield Setting(name, name, True)
        if with_parts:
            yield Setting(f"{name}, fa off", name)
            yield Setting(f"{name}, F32 weights", name, True, is_f32=True)


def score(setting: Setting, folder: Path, options: argparse.Namespace) -> Floats | None:
    """Return KL and NLL of the rows [2, n_chunks, n_rows] in nats; None: no such kernels here."""
    os.environ["GGML_POP_KERNELS"] = setting.kernels  # which is read once in a process
    if setting.kernels not in ("0", cpu_kernels()):
        return None
    n, is_truth, scores = options.tokens, setting == TRUTH, []
    how: dict[str, Any] = {"type_k": 0, "type_v": 0} if is_truth else {}  # GGML_TYPE_F32
    how |= {"flash_attn": setting.flash_attn, "repack": setting.repack, "n_threads": 1}
    how |= {"n_ctx": n, "n_batch": n, "n_ubatch": n}
    with PopModel(
        EngineOptions.of(folder / "f32" if setting.is_f32 else options.model, n_gpu_layers=0, **how)
    ) as m:
        start, text = (
            m.engine.context.vocabulary.bos,
            given_text(options.text) if options.text else shipped_text(),
        )
        windows = spread_windows(tokenize(m, text), options.chunks, n - len(start))
        for number, chunk in enumerate([*start, *window] for window in windows):
            path = folder / f"{number}.npy"
            read = predictions(logits(m, chunk)[options.skip : -1])
            if is_truth:  # for the others
                np.save(path, read.logits)
            kl = divergence(predictions(np.load(path, mmap_mode="r")), read).kl
            scores.append((kl, likelihood(read, np.asarray(chunk[options.skip + 1 :])).nll))
    return np.array(scores).swapaxes(0, 1)


def logits(model: PopModel, tokens: list[int]) -> Logits:
    """Return all rows' logits of a prompt read in full [n, n_vocab], until the next call."""
    model.pruning = False
    first_of(model).cache.clear()
    backend.set_reading(model.engine.context.ctx, backend.Reading.SOME)
    with closing(TokenBatch(len(tokens))) as rows:
        if code := rows.decode(model.engine.context.ctx, tokens, 0, Outputs.ALL):
            raise logs.not_decoded(code)
    buffer = backend.bindings().llama_get_logits(model.engine.context.ctx)
    return np.ctypeslib.as_array(buffer, (len(tokens), model.engine.context.vocabulary.n_tokens))


def measure(options: argparse.Namespace) -> dict[str, dict[str, Estimate]]:
    """Return the figures of all settings by name."""
    found: dict[str, Floats] = {}
    with TemporaryDirectory() as folder:
        write_f32(options.model, Path(folder) / "f32")
        for setting in settings(options.parts):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                scores = pool.submit(score, setting, Path(folder), options).result()
            if scores is not None:
                found[setting.name] = scores
                show(f"{setting.name}: KL x 1000 {1000 * scores[0].mean():.4g}")
    return {name: figures(scores, found) for name, scores in found.items()}


def figures(scores: Floats, found: dict[str, Floats]) -> dict[str, Estimate]:
    kl, nll = 1000 * scores[0], scores[1]
    less = {f"less {u.name}": mean(kl - 1000 * found[u.name][0]) for u in UPSTREAM}
    ppl = {"PPL": exp_mean(nll), "PPL ratio to truth": exp_mean(nll - found[TRUTH.name][1])}
    return {"KL x 1000": mean(kl), "99.9 %": quantile(kl, 0.999)} | less | ppl


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="instead of the held-out text of pop-local")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a chunk, BOS included")
    parser.add_argument("--skip", type=int, default=0, help="first rows that are not compared")
    parser.add_argument("--parts", action="store_true", help="products and attention apart, too")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options)
    about = f"{options.model}: {options.chunks} chunks of {options.tokens} tokens, {machine()}"
    if options.json:
        print(json.dumps({"about": about, "rows": rows}, default=asdict))
        return
    print(f"{about}\n\n| setting |", *(f" {name} |" for name in rows[TRUTH.name]))
    print("|---|" + "---:|" * len(rows[TRUTH.name]))
    for name, row in rows.items():
        values = (f"{v.value:.5g}" + (f" ± {v.se:.2g}" if v.se else "") for v in row.values())
        print(f"| {name} |", *(f"{value} |" for value in values))


if __name__ == "__main__":
    main()

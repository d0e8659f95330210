"""Measure seconds and bytes of a pruned and a full prompt on local RPC servers. Not a test.

With network limits, in a separate network namespace (Linux, root):
    unshare -n python tests/bench/measure_rpc.py MODEL.pop.gguf --servers 2 --rates 1gbit,100mbit
Bytes are counted on the loopback device, so only a namespace excludes other programs' bytes. Each
figure is a median of --repeat pairs. All servers share this machine's cores, so differences between
rates show the network's part.
"""

import argparse
import statistics
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.turn_options import TurnOptions
from shared import rpc_server


def sent_bytes() -> int:
    (lo,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if " lo:" in line)
    return int(lo.split()[9])


def limit(rate: str) -> None:
    if rate != "none":
        shaped = f"tc qdisc replace dev lo root tbf rate {rate} burst 1mb latency 100ms"
        subprocess.run(shaped.split(), check=True)


def measured(model: PopModel, tokens: list[int], n_decode: int) -> tuple[float, float, int]:
    """Return the time to first token, the decode time per token, and the prompt's bytes sent."""
    model.engine.cache.clear()
    before, start = sent_bytes(), time.perf_counter()
    model.read(Prompt(tokens))
    sampled = model.engine.sampled(TurnOptions(temperature=0.0))
    next(sampled)
    ttft_s, n_bytes = time.perf_counter() - start, sent_bytes() - before
    start = time.perf_counter()
    for _ in range(n_decode):
        next(sampled)
    return ttft_s, (time.perf_counter() - start) / n_decode, n_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--rates", default="none")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=False)
    with ExitStack() as stack:
        servers = [stack.enter_context(rpc_server()).name for _ in range(options.servers)]
        model = PopModel(
            EngineOptions.of(options.model, n_ctx=options.prompt + 64, n_threads=1, rpc=servers)
        )
        stack.enter_context(model)
        rng = np.random.default_rng(0)
        tokens: list[int] = rng.integers(3, model.engine.context.n_vocab, options.prompt).tolist()
        print("rate      mode     TTFT (s)  decode (ms)  sent for the prompt (MB)")
        for rate in options.rates.split(","):
            limit(rate)
            for mode in (Mode.OFF, Mode.CONTEXT):
                model.engine.set_mode(mode)
                runs = [measured(model, tokens, 16) for _ in range(options.repeat)]
                ttft_s, decode_s, n_bytes = (
                    statistics.median(of) for of in zip(*runs, strict=True)
                )
                name = "pruned" if mode else "full"
                figures = f"{ttft_s:9.2f} {decode_s * 1e3:12.1f} {n_bytes / 1e6:12.1f}"
                print(f"{rate:9} {name:7}{figures}", flush=True)


if __name__ == "__main__":
    main()

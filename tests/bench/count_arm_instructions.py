"""Count the instructions of matrix products on ARM64: our kernels and llama.cpp's, in qemu.

    python tests/bench/count_arm_instructions.py FOLDER

FOLDER contains the libraries that `make test-arm` builds. A count is not a time: it ignores caches,
latencies, and how many instructions a processor starts per cycle. qemu logs each executed block to
a file of about 300 MB. The table shows instructions per 1,000 multiply-accumulates, for prefill (64
rows of activations) and decode (one row). llama.cpp computes with weights in file order, and with
repacked weights if it can repack the type.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "converter")]

from support import arm  # noqa: E402
from support.ggml import Graph  # noqa: E402
from support.ggml_ops import Rows  # noqa: E402
from support.kernels import QUANTISED, mul_mat  # noqa: E402

# Types that llama.cpp repacks for NEON (ggml_repack_get_optimal_repack_type in repack.cpp).
REPACKED_TYPES = (Type.Q4_0, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.MXFP4)
N_IN = 1024
# By number of activation rows: weight rows of the smaller of two products. The larger one has 2N.
# The difference leaves out the graph's overhead and the packing of the activations.
N_OUT = {64: 64, 1: 512}
PROCESSORS = {"i8mm": "max", "dotprod": "neoverse-n1"}
# Functions of the CPU library that are the start and the end of a product in the log.
START, END = "ggml_graph_compute", "ggml_cpu_has_neon"
REPACKED = "_Z35ggml_backend_cpu_repack_buffer_typev"


def types(repacked: bool) -> list[Type]:
    return [each for each in QUANTISED if not repacked or each in REPACKED_TYPES]


def compute_all(rows: Rows, repacked: bool) -> None:
    """Compute two products of each type and number of rows. Each has a separate graph."""
    server = arm.server()
    kind = server.call(server.find(REPACKED)) if repacked else None
    for type_ in types(repacked):
        for n_rows, n_out in N_OUT.items():
            for size in (n_out, 2 * n_out):
                op = mul_mat(np.random.default_rng(0), type_, n_rows, size, N_IN)
                graph = Graph(weights_kind=kind)
                result = graph.build(op, rows)
                graph.compute([result], [result], 1, False)
                server.call(server.find(END))
                graph.close()


def child() -> None:
    """Compute all products, and print the addresses of the two marks."""
    compute_all(Rows(int(sys.argv[2])), sys.argv[3] == "repacked")
    server = arm.server()
    print(json.dumps([server.find(START), server.find(END)]))


def counts(log: Path, start: int, end: int) -> list[int]:
    """Return the number of instructions from each execution of `start` to the next one of `end`."""
    sizes: dict[int, int] = {}  # instructions by block
    found: list[int] = []
    block: int | None = None
    is_counting = False
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("Trace"):
                at = int(line.split("/")[1], 16)
                if at == start:
                    found.append(0)
                is_counting = at == start or (is_counting and at != end)
                if is_counting:
                    found[-1] += sizes[at]
            elif line.startswith("IN:"):
                block = None
            elif line.startswith("0x"):
                at = int(line.split(":")[0], 16)
                if block is None:
                    block, sizes[at] = at, 0
                sizes[block] += 1
    return found


def measure(
    folder: Path, processor: str, kernels: str, repacked: bool = False
) -> dict[tuple[Type, int], float]:
    """Return instructions per 1,000 multiply-accumulates by type and number of rows."""
    env = {arm.FOLDER_VARIABLE: str(folder), "QEMU_CPU": processor, "GGML_POP_KERNELS": kernels}
    rows = Rows.FAST if kernels != "off" else Rows.NONE
    words = [str(int(rows)), "repacked" if repacked else "plain"]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "log")
        env |= {"QEMU_LOG": "exec,nochain,in_asm", "QEMU_LOG_FILENAME": str(log)}
        done = subprocess.run(
            [sys.executable, __file__, "--child", *words],
            env=os.environ | env,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = counts(log, *json.loads(done.stdout))
    products = [(type_, n_rows) for type_ in types(repacked) for n_rows in N_OUT]
    return {
        product: 1000 * (larger - smaller) / (product[1] * N_OUT[product[1]] * N_IN)
        for product, smaller, larger in zip(products, found[::2], found[1::2], strict=True)
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child()
        return
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    folder = Path(sys.argv[1]).resolve()
    for kernels, processor in PROCESSORS.items():
        found = [measure(folder, processor, each) for each in (kernels, "off")]
        found.append(measure(folder, processor, "off", repacked=True))
        titles = [f"{who}, {n_rows}" for n_rows in N_OUT for who in ("ours", "file", "repacked")]
        print(f"\n| {kernels} | {' | '.join(titles)} |")
        for type_ in QUANTISED:
            row = [each.get((type_, n_rows)) for n_rows in N_OUT for each in found]
            cells = ["" if each is None else f"{each:.0f}" for each in row]
            print(f"| {type_.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

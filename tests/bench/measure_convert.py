"""What converting a big model costs, beside `cp` and `sha256sum` of it.

    python tests/bench/measure_convert.py FOLDER [GIGABYTES]

The model is synthetic (random bytes, a vocabulary of 128k); FOLDER needs three times its size.
Prints one JSON object: medians of several rounds, since the page cache and other programs disturb
each. Linux only: memory comes from /proc.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np

N_VOCAB = 128_256
N_EMBD = 2048
N_LAYER = 24
BLOCK_BYTES = 64 << 20
N_ROUNDS = 5


def make_big(path: Path, size_bytes: int) -> None:
    """A llama whose keys and shapes are right, filled with one random block again and again."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(N_LAYER)
    writer.add_embedding_length(N_EMBD)
    writer.add_head_count(16)
    writer.add_head_count_kv(4)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{number}" for number in range(N_VOCAB)])
    writer.add_token_types([1] * N_VOCAB)
    writer.add_token_merges([f"a{number} b{number}" for number in range(N_VOCAB)])
    rows = {"attn_q": N_EMBD, "attn_k": 512, "attn_v": 512, "attn_output": N_EMBD}
    n_rows = size_bytes // (2 * N_EMBD) - N_VOCAB
    n_ff = (n_rows // N_LAYER - sum(rows.values())) // 3
    rows |= {"ffn_gate": n_ff, "ffn_up": n_ff, "ffn_down": n_ff}
    n_bytes = 0
    shapes = [("token_embd.weight", N_VOCAB)]
    shapes += [(f"blk.{i}.{name}.weight", n) for i in range(N_LAYER) for name, n in rows.items()]
    for name, n_rows in shapes:
        size = n_rows * N_EMBD * 2
        writer.add_tensor_info(name, (n_rows, N_EMBD), np.dtype(np.float16), size)
        n_bytes += size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    block = np.random.default_rng(0).bytes(BLOCK_BYTES)
    with path.open("ab") as file:
        file.write(bytes(-file.tell() % 32))
        for _ in range(n_bytes // BLOCK_BYTES):
            file.write(block)
        file.write(block[: n_bytes % BLOCK_BYTES])


def timed(*command: str | Path) -> tuple[float, int]:
    """Seconds that a command takes, and the peak of its anonymous memory in bytes."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(list(command), stdout=subprocess.DEVNULL)
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, anonymous_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed")
    return time.perf_counter() - start, peak_bytes


def anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0][1]) * 1024 if lines else 0


def main(folder: Path, gigabytes: float) -> None:
    src, dst = folder / "big.gguf", folder / "big.pop.gguf"
    pop_local = [sys.executable, "-m", "pop_local"]
    make_big(src, int(gigabytes * 1e9))
    sha256 = subprocess.check_output(["sha256sum", src]).split()[0]
    rounds = []
    peak_bytes = 0
    try:
        for _ in range(N_ROUNDS):
            copy_s, _ = timed("cp", src, dst)
            hash_s, _ = timed("sha256sum", src)
            dst.unlink()
            convert_s, n_bytes = timed(
                *pop_local, "convert", "--projection", "own", "--skip", "1/3", src, dst
            )
            back = folder / "back.gguf"
            strip_s, more_bytes = timed(*pop_local, "strip", dst, back)
            if subprocess.check_output(["sha256sum", back]).split()[0] != sha256:
                raise SystemExit("stripping did not restore the model")
            back.unlink()
            dst.unlink()
            peak_bytes = max(peak_bytes, n_bytes, more_bytes)
            rounds.append((copy_s, hash_s, convert_s, strip_s, convert_s / (copy_s + hash_s)))
        names = ("cp_s", "sha256sum_s", "convert_s", "strip_s", "convert_ratio")
        figures = {"model_bytes": src.stat().st_size, "peak_rss_anon_bytes": peak_bytes}
        spread = {
            name: {
                "median": round(statistics.median(values), 2),
                "min": round(min(values), 2),
                "max": round(max(values), 2),
            }
            for name, values in zip(names, zip(*rounds, strict=True), strict=True)
        }
        print(json.dumps(figures | spread, indent=2))
    finally:
        for path in (src, dst, folder / "back.gguf"):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("gigabytes", type=float, nargs="?", default=4.0)
    options = parser.parse_args()
    main(options.folder, options.gigabytes)

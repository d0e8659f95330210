"""Writes random models of thirteen architectures, to measure the speed of. Not a test.

    make unpatched recipes && python tests/bench/make_architectures.py FOLDER [NAME...]

Each is built by llama.cpp's own recipe, in the reduced shape of a published model: its kinds of
layers, heads and experts, fewer and narrower. The vocabulary has 4,096 tokens, the matrices are in
Q4_0. The files have 40 to 100 MB.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from shared import Name, make, talkable

N_VOCAB, N_CTX = 4096, 8192


@dataclass(frozen=True)
class Shape:
    """Layers, and keys in the place of the recipe's."""

    layers: int
    keys: str
    is_moe: bool = False


def heads(n: int, n_kv: int | str, dim: int) -> str:
    """The keys of an attention whose heads have `dim` dimensions."""
    lengths = " ".join(f"attention.{name}_length={dim}" for name in ("key", "value"))
    n_rot = f"rope.dimension_count={dim}"
    return f"attention.head_count={n} attention.head_count_kv={n_kv} {lengths} {n_rot}"


def experts(n: int, n_used: int, n_ff: int) -> str:
    """The keys of a mixture of experts."""
    sizes = f"expert_feed_forward_length={n_ff} expert_shared_feed_forward_length={n_ff}"
    return f"expert_count={n} expert_used_count={n_used} {sizes}"


def every(period: int, one: object, others: object, n: int) -> str:
    """A value for each of `n` layers: `one` in the last layer of each period."""
    return ",".join(str(others if (layer + 1) % period else one) for layer in range(n))


DENSE = f"embedding_length=1024 feed_forward_length=3072 {heads(8, 2, 128)}"
NO_WINDOW = "attention.sliding_window=0"
MAMBA2 = "ssm.state_size=128 ssm.inner_size=2048 ssm.time_step_rank=32"
DELTA_NET = (
    "ssm.state_size=128 ssm.inner_size=2048 ssm.time_step_rank=16 ssm.group_count=16"
    f" full_attention_interval=4 {heads(8, 2, 256)}"
    " rope.dimension_count=64 rope.dimension_sections=11,11,10,0"
)
# Nemotron-Nano's: an attention, an FFN or a Mamba2 makes a layer.
NEMOTRON = "M-M-M-M*-M-M-M-M*-M-"
SHAPES = {
    "gpt-oss": Shape(
        12,
        f"embedding_length=512 {heads(16, 2, 64)} {experts(16, 4, 512)}"
        " attention.sliding_window=128",
        is_moe=True,
    ),
    # gemma-4-26B-A4B: experts beside a dense FFN, wide heads in each sixth layer, no shared K/V.
    "gemma4": Shape(
        12,
        f"embedding_length=704 feed_forward_length=512 {heads(4, every(6, 1, 2, 12), 256)}"
        f" attention.key_length_swa=128 attention.value_length_swa=128 {experts(16, 4, 192)}"
        " rope.dimension_count_swa=128 attention.sliding_window=256"
        f" attention.sliding_window_pattern={every(6, 'false', 'true', 12)}"
        " embedding_length_per_layer_input=0",
        is_moe=True,
    ),
    "mistral3": Shape(12, DENSE),
    "glm4": Shape(12, f"{DENSE} rope.dimension_count=64 rope.dimension_sections=0,0,0,0"),
    "granite": Shape(12, f"{DENSE} residual_scale=0.22 logit_scale=8.0 embedding_scale=12.0"),
    "smollm3": Shape(12, DENSE),
    "olmo2": Shape(12, f"{DENSE} {heads(8, 8, 128)} {NO_WINDOW}"),
    "deepseek2": Shape(
        12,
        "embedding_length=768 feed_forward_length=2048 attention.head_count=8"
        f" attention.q_lora_rank=384 {experts(16, 4, 256)}",
        is_moe=True,
    ),
    "qwen35": Shape(12, f"embedding_length=1024 feed_forward_length=3072 {DELTA_NET}"),
    "qwen35moe": Shape(12, f"embedding_length=768 {DELTA_NET} {experts(16, 4, 256)}", is_moe=True),
    "lfm2": Shape(
        12,
        f"embedding_length=1024 feed_forward_length=3072 {heads(16, every(3, 8, 0, 12), 64)}"
        f" {NO_WINDOW}",
    ),
    "granitehybrid": Shape(
        12,
        f"embedding_length=1024 feed_forward_length=3072 {heads(16, every(6, 4, 0, 12), 64)}"
        f" {MAMBA2} ssm.group_count=1 residual_scale=0.22 logit_scale=8.0 embedding_scale=12.0",
    ),
    "nemotron_h": Shape(
        len(NEMOTRON),
        f"embedding_length=1024 {MAMBA2} ssm.group_count=8 "
        + heads(16, ",".join("4" if kind == "*" else "0" for kind in NEMOTRON), 64)
        + " feed_forward_length="
        + ",".join("4096" if kind == "-" else "0" for kind in NEMOTRON),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", choices=[[], *SHAPES], default=[])
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    for name in options.names or SHAPES:
        path, shape = options.folder / f"{name}.gguf", SHAPES[name]
        raw = path.with_suffix(".f32")
        more = f"{shape.keys} block_count={shape.layers} context_length={N_CTX}".split()
        make(Name(name, shape.is_moe), raw, more)
        talkable(raw, path, N_VOCAB)
        raw.unlink()
        print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

"""Writes a random model shaped like Gemma 4 E2B, to measure the speed of. Not a test.

    python tests/bench/make_gemma4_e2b.py MODEL.gguf [--type q8_0]

All layers, heads, windows and widths are those of the published model; the vocabulary has 16,384
tokens. The file has 2.1 GB with Q8_0, 1.1 GB with Q4_0.
"""

import argparse
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as Type

from shared import GEMMA4_E2B, add_keys, shapes

TYPES = {"q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
# Standard deviation of evenly drawn whole numbers: -127 to 127, and -8 to 7.
DEVIATIONS = {Type.Q8_0: 73.6, Type.Q4_0: 4.61}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--type", choices=TYPES, default="q8_0")
    options = parser.parse_args()
    kind, rng = TYPES[options.type], np.random.default_rng(0)
    writer = GGUFWriter(options.model, GEMMA4_E2B.base.arch, use_temp_file=True)
    add_keys(writer, GEMMA4_E2B)
    for name, dims in shapes(GEMMA4_E2B):
        if len(dims) == 1:
            writer.add_tensor(name, np.ones(dims, np.float32))
        else:
            writer.add_tensor(name, blocks(rng, dims, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks(rng: np.random.Generator, dims: tuple[int, ...], kind: Type) -> np.ndarray:
    """Rows of unit gain in quantised blocks, uint8 [.., bytes of a row]: a scale, then values."""
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    n_blocks = dims[-1] // block_size
    data = rng.integers(0, 256, (*dims[:-1], n_blocks, block_bytes), np.uint8)
    scale = np.array([dims[-1] ** -0.5 / DEVIATIONS[kind]], "<f2")
    data[..., :2] = scale.view(np.uint8)
    return data.reshape(*dims[:-1], -1)


if __name__ == "__main__":
    main()

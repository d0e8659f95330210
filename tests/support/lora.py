"""Build random LoRA adapters."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

# The tiny llama's K and V projections.
OF_KV = {f"blk.{layer}.attn_{part}.weight": (64, 128) for layer in range(8) for part in "kv"}


def make_lora(path: Path, arch: str, dims: Mapping[str, tuple[int, ...]]) -> Path:
    """Write an adapter of rank 4 for the named matrices [n_out, n_in]."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for name, (n_out, n_in) in dims.items():
        for part, size in (("lora_a", (4, n_in)), ("lora_b", (n_out, 4))):
            values = rng.standard_normal(size, dtype=np.float32) * np.float32(0.1)
            writer.add_tensor(f"{name}.{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

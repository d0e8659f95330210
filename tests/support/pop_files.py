"""Write POP files that the converter would refuse to write, and fitted ones."""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType

Keys = dict[str, int | str | float]
Tensors = dict[str, tuple[np.ndarray, Type]]

OWN: Keys = {
    "pop.version": 1,
    "pop.schedule": "FFFFFSSS",
    "pop.projection": "own",
    "pop.sink_tokens": 0,
}


def add_to(
    src: Path, dst: Path, keys: Keys, tensors: Tensors | None = None, *, kept: str = ""
) -> Path:
    """Copy a model with arbitrary further keys and tensors.

    If `kept` is given, of the source's POP keys only those that start with `kept` are copied.
    """
    reader = gguf.GGUFReader(src)
    writer = gguf.GGUFWriter(dst, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        is_left_out = kept and field.name.startswith("pop.") and not field.name.startswith(kept)
        is_written = field.name.startswith("GGUF.") or field.name == "general.architecture"
        if not is_written and not is_left_out:
            kind, *inner = field.types
            sub_type = inner[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
    for name, value in keys.items():
        kinds = {int: GGUFValueType.UINT32, str: GGUFValueType.STRING, float: GGUFValueType.FLOAT32}
        writer.add_key_value(name, value, kinds[type(value)])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, (data, dtype) in (tensors or {}).items():
        writer.add_tensor(name, data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dst


def own_as_fitted(src: Path, boundary: int, n_layer: int) -> Tensors:
    """Return fitted tensors that equal the layers' own projections, so pruning is unchanged."""
    by_name = {tensor.name: tensor for tensor in gguf.GGUFReader(src).tensors}
    tensors: Tensors = {}
    for layer in range(boundary + 1, n_layer):
        for part in ("k", "v"):
            weight = by_name[f"blk.{layer}.attn_{part}.weight"]
            bias = by_name.get(f"blk.{layer}.attn_{part}.bias")
            values = np.zeros(weight.shape[1], np.float32) if bias is None else np.array(bias.data)
            name = f"blk.{layer}.pop_attn_{part}"
            tensors[f"{name}.weight"] = (np.array(weight.data), weight.tensor_type)
            tensors[f"{name}.bias"] = (values, Type.F32)
    return tensors

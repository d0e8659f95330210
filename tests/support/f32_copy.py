"""Copy a model's weights as F32, so that no kernel for quantised weights runs."""

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize


def write_f32(source: Path, target: Path) -> None:
    """Write a copy of a single-file model with the same keys and all tensors in F32.

    Up to one tensor is in memory.
    """
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

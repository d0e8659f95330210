"""Turn models of llama.cpp's recipes into chat models; their vocabulary is only numbers."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter
from gguf.quants import quantize

from support.synthetic import TEMPLATE, Recipe, add_tokenizer

# Standard deviation of all weights of a recipe.
RECIPES_DEVIATION = 0.1
# llama.cpp's quantisation also leaves these unchanged.
PRECISE = ("ffn_gate_inp.", "conv1d.", "shortconv.conv.")


def make_chat_model(raw: Path, path: Path, n_vocab: int = 384) -> Path:
    """Copy a recipe's model in Q4_0, with words and a chat template; return its path."""
    reader, rng = GGUFReader(raw), np.random.default_rng(0)
    arch = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(path, arch, use_temp_file=True)
    for key, field in reader.fields.items():
        if key.startswith(f"{arch}.") and key != f"{arch}.vocab_size":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    writer.add_name(f"random {arch}")
    writer.add_chat_template(TEMPLATE)
    add_tokenizer(writer, Recipe(n_vocab=n_vocab))
    for tensor in reader.tensors:
        values = tensor.data.astype(np.float32)
        if tensor.name in ("token_embd.weight", "output.weight"):
            shape = (n_vocab, values.shape[1])
            values = rng.standard_normal(shape, np.float32) * np.float32(RECIPES_DEVIATION)
        kind, is_weight = Type.F32, tensor.name.endswith(".weight")
        if is_weight and (values.ndim == 1 or "norm" in tensor.name):
            values += 1
        elif values.ndim > 1:
            # Scale rows to about unit gain.
            values *= values.shape[-1] ** -0.5 / RECIPES_DEVIATION
            if is_weight and not any(part in tensor.name for part in PRECISE):
                kind = Type.Q4_0
        writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

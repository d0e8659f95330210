"""Build keys for cached rows from the model, mode, boundary, and conversion."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pop_converter.gguf.header import Header, read_header
from pop_converter.gguf.source import SAMPLED_BYTES, Source
from pop_converter.popfile.format import PopMeta, encode_keys
from pop_converter.projection import TENSOR_MARK, Projection
from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.context import Context

# Fields of llama_context_params that affect K/V. Flash attention determines V's layout.
_FIELDS = (
    *("flash_attn_type", "rope_freq_base", "rope_freq_scale", "rope_scaling_type"),
    *("type_k", "type_v"),
    *("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx"),
)


def model_key(context: Context) -> str:
    """Return a key for a model and its options. A model and its conversion share a key.

    The key distinguishes models of the same shape.
    """
    tensors = _tensors_hash(context.files.source.parts, are_fitted=False)
    return f"model {tensors}{opened_with(context)}"


def conversion(meta: PopMeta | None, base: Source, sidecar: Path | None) -> str:
    """Return a model's projection type and, for a converted model, the conversion's fingerprint.

    The fingerprint covers each fitted tensor's name, shape, and first bytes, and the keys that
    affect pruned K/V. A sidecar and a converted file with the same fit share a fingerprint.
    """
    if meta is None:
        return f"{Projection.OWN} projections"
    # K/V do not depend on the source file, the tool, the measured quality, or the budget.
    keys = replace(meta, source_name="", tool="")
    keys = replace(keys, measured=None, budget=None)
    headers = base.parts if sidecar is None else (read_header(sidecar),)
    digest = _tensors_hash(headers, are_fitted=True, start=b"".join(encode_keys(keys)))
    return f"{meta.projection} projections {digest}"


def opened_with(context: Context) -> str:
    """Return a string listing the non-default options that affect saved K/V."""
    defaults = bindings().llama_context_default_params()
    defaults.flash_attn_type = 0
    fields = {name: getattr(context.settings, name) for name in _FIELDS}
    options = [f"{k} {value:g}" for k, value in fields.items() if value != getattr(defaults, k)]
    if context.options.n_sequences > 1:
        options.append("a state for each sequence")
    return "".join(f", {option}" for option in options)


def _tensors_hash(headers: Iterable[Header], *, are_fitted: bool, start: bytes = b"") -> str:
    """Hash `start` and the selected tensors' names, shapes, types, and first bytes."""
    digest = hashlib.sha256(start)
    for header in headers:
        with header.path.open("rb") as file:
            for tensor in header.tensors:
                if (TENSOR_MARK in tensor.name) is are_fitted:
                    digest.update(f"{tensor.name} {tensor.dims} {tensor.type}".encode())
                    file.seek(header.data_start + tensor.offset)
                    digest.update(file.read(min(tensor.size_bytes, SAMPLED_BYTES)))
    return digest.hexdigest()[:16]

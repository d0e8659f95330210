"""Copy any model so that the layers from the boundary preserve the state.

Their K/V and recurrent states then depend only on the boundary state, which is what pruning
stores. All architectures add to the residual stream through a few tensors with common names.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type

from pop_converter.gguf.header import Header, TensorInfo, read_header

# A layer adds nothing if these tensors are zero.
OUTPUTS = (
    *("attn_output", "attn_output_b", "ssm_out", "shortconv.out_proj"),
    *("time_mix_output", "channel_mix_value"),
    *("ffn_down", "ffn_down_exps", "ffn_down_shexp", "ffn_down_chexps"),
    *("vis_attn_output", "vis_down"),
)
# Further tensors by which an architecture adds to the state or scales it. In layers without an FFN,
# as in some recipes, the output of the preceding norm is added.
MORE: Mapping[str, Mapping[str, float]] = {
    "ernie4_5-moe": {"ffn_norm": 0.0},
    "refact": {"ffn_norm": 0.0},
    "gemma4": {"proj": 0.0, "layer_output_scale": 1.0},
    "talkie": {"layer_output_scale": 0.0},
}
# Architectures without such a copy, and the reason.
IMPOSSIBLE: Mapping[str, str] = {
    "gemma3n": "each layer averages two branches, of which one alone can be zero",
    "hrm_text": "layers before and behind the boundary share their weights",
    "minimax-01": "each layer passes its normalised input on, not the state",
    "rwkv6": "the second state of a layer is of what its first half gives",
    "rwkv7": "the second state of a layer is of what its first half gives",
}


def setting(header: Header, name: str) -> int:
    """Return an integer key of the architecture; 0 where it is missing."""
    value = header.of_arch(name)
    return value if isinstance(value, int) else 0


def identity_copy(src: Path, dst: Path, boundary: int) -> Path:
    """Write `src`, whose weights are F32, to `dst` with identity layers from `boundary` on."""
    shutil.copyfile(src, dst)
    header = read_header(dst)
    data = np.memmap(dst, np.uint8, "r+", offset=header.data_start)
    for tensor in header.tensors:
        prefix, number, name = ([*tensor.name.split(".", 2), "", ""])[:3]
        if prefix == "blk" and int(number) >= boundary:
            _neutralize(header, name, _values(data, tensor))
    data.flush()
    return dst


def _values(data: np.ndarray, tensor: TensorInfo) -> np.ndarray:
    assert tensor.type in (Type.F32, Type.F16)
    kind = np.float32 if tensor.type == Type.F32 else np.float16
    return data[tensor.offset : tensor.offset + tensor.size_bytes].view(kind)


def _neutralize(header: Header, name: str, values: np.ndarray) -> None:
    """Change the values of a layer's tensor if the tensor adds to the state."""
    more = MORE.get(str(header.get("general.architecture")), {})
    if any(f"{name}.".startswith(f"{output}.") for output in OUTPUTS):
        values[:] = 0
    for part, value in more.items():
        if f"{name}.".startswith(f"{part}."):
            values[:] = value
    # Hyper-connections mix streams by a matrix, which the last values of this tensor define.
    if setting(header, "hyper_connection.sinkhorn_iterations"):
        n = setting(header, "hyper_connection.count")
        if name in ("hc_attn_scale.weight", "hc_ffn_scale.weight"):
            values[2] = 0
        if name in ("hc_attn_base.weight", "hc_ffn_base.weight"):
            values[2 * n :] = np.where(np.eye(n), 1e4, -1e4).ravel()

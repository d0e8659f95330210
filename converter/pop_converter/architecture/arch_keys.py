"""Read a GGUF file's architecture keys and check them against llama.cpp's requirements."""

from pop_base.errors import FormatError, UnsupportedArchitectureError
from pop_converter.architecture.arch_names import (
    DOUBLE_INNER,
    HEADS_OF_STATES,
    LOOPS_KEY,
    PERIODS,
    SAME_WIDTHS,
    SEVERAL_POSITIONS,
    TURNS_ALL,
    WINDOWS,
    refusal,
)
from pop_converter.gguf.header import Header

# llama.cpp stores dimensions and counts in 32 bits.
_MAX_NUMBER = 2**31 - 1
# llama_cpp allocates a buffer as long as the context for every tokenization.
_MAX_CTX = 1 << 27
MAX_LAYERS, _MAX_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS
# llama.cpp treats models of these architectures as dense if they have at most one expert.
_DENSE_BY_COUNT = ("hunyuan-dense", "hunyuan_vl")
_EPSILONS = tuple(
    f"attention.{kind}_epsilon" for kind in ("layer_norm", "layer_norm_rms", "group_norm")
)


def trained_ctx(header: Header) -> int | None:
    """Return the training context length in tokens, or None if unknown. Raises FormatError."""
    value = header.of_arch("context_length")
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= _MAX_CTX:
        raise FormatError(
            f"{header.path} has an invalid context length: {value}", "download the file again"
        )
    return value


def require_loadable(header: Header) -> None:
    """Raise FormatError if a key's value would make llama.cpp abort the process."""

    def numbers(name: str) -> list[float]:
        value = header.of_arch(name)
        items = value if isinstance(value, tuple) else (value,)
        return [item for item in items if isinstance(item, int | float)]

    def most(name: str) -> float:
        return max(numbers(name), default=0)

    n_layer, n_expert, n_group = map(most, ("block_count", "expert_count", "expert_group_count"))
    n_used, n_group_used = most("expert_used_count"), most("expert_group_used_count")
    usual = most("embedding_length") // (most("attention.head_count") or 1)
    width, width_v = (most(f"attention.{kind}_length") or usual for kind in ("key", "value"))
    n_rot, n_inner = most("rope.dimension_count"), most("ssm.inner_size")
    arch = str(header.get("general.architecture"))
    is_dense = n_expert <= 1 and arch in _DENSE_BY_COUNT
    turns_all = bool(TURNS_ALL.fullmatch(arch))
    has_one_width = turns_all or SAME_WIDTHS.fullmatch(arch)
    # Some graphs divide by the number of heads, but recurrent models have no heads.
    is_recurrent = any(name.startswith((f"{arch}.ssm.", f"{arch}.wkv.")) for name in header.keys)
    is_mla = most("attention.key_length_mla") and most("attention.value_length_mla")
    wrong = {
        "block_count": n_layer > MAX_LAYERS or numbers("block_count") == [0],
        "attention.head_count": not is_recurrent and most("attention.head_count") < 1,
        "nextn_predict_layers": most("nextn_predict_layers") > n_layer,
        "expert_count": n_expert > _MAX_EXPERTS,
        "expert_used_count": not is_dense and not (n_expert > 0) <= n_used <= n_expert,
        "expert_group_count": n_group >= max(n_expert, 1)
        or (n_group > 1 and n_expert % n_group > 0),
        "expert_group_used_count": n_group > 1 and not 0 < n_group_used < n_group,
        "attention.key_length": (has_one_width and width != width_v)
        or (is_mla and width != most("attention.kv_lora_rank") + n_rot),
        "rope.dimension_sections": arch in SEVERAL_POSITIONS
        and sum(numbers("rope.dimension_sections")) > width,
        "rope.dimension_count": turns_all and numbers("rope.dimension_count") not in ([], [width]),
        "ssm.inner_size": (arch in DOUBLE_INNER and n_inner != 2 * most("embedding_length"))
        or (
            arch in HEADS_OF_STATES
            and n_inner != most("ssm.time_step_rank") * most("ssm.state_size")
        ),
    }
    wrong |= {name: not all(eps >= 0 for eps in numbers(name)) for name in _EPSILONS}
    for name in filter(wrong.__getitem__, wrong):
        key, items = f"{arch}.{name}", ", ".join(map(str, numbers(name))) or "empty"
        raise FormatError(
            f"{header.path} cannot be opened: the key {key} has an invalid value ({items})",
            "download the file again",
        )


class ArchKeys:
    """Reader for a model's architecture keys, such as `llama.block_count`."""

    def __init__(self, header: Header) -> None:
        """Raise FormatError or UnsupportedArchitectureError if the model cannot be pruned."""
        self.header = header
        if header.get("general.type") == "adapter":
            raise FormatError(
                f"{header.path} is a LoRA adapter, not a model", "pass the base model"
            )
        if "general.architecture" not in header.keys:
            raise FormatError(
                f"{header.path} is missing the key general.architecture", "pass a language model"
            )
        self.arch = str(header.get("general.architecture"))
        if reason := refusal(self.arch, self.number(LOOPS_KEY, 1)):
            raise UnsupportedArchitectureError(
                f"{header.path} ({self.arch}) cannot be pruned: {reason}",
                "use a decoder-only model, such as Llama, Qwen, or Gemma",
            )

    def wrong(self, problem: str) -> FormatError:
        return FormatError(f"{self.header.path}: {problem}", "download the file again")

    def number(self, name: str, default: int | None = None) -> int:
        """Return a key's value (if an array, its first item) as an integer. Raises FormatError."""
        value = self.header.of_arch(name)
        if isinstance(value, tuple):
            value = value[0] if value else None
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or not 0 <= value <= _MAX_NUMBER:
            key = f"{self.arch}.{name}"
            raise self.wrong(f"the key {key} has an invalid value: {value}")
        return int(value)

    @property
    def is_mrope(self) -> bool:
        """True if each token has multiple positions (M-RoPE)."""
        if self.arch not in SEVERAL_POSITIONS:
            return False
        sections = self.header.of_arch("rope.dimension_sections")
        items = sections[:2] if isinstance(sections, tuple) else ()
        return len(items) == 2 and all(isinstance(item, int) and item > 0 for item in items)

    def windows(self, n_layer: int) -> tuple[int, ...]:
        """Return each layer's attention window in tokens, or 0 for a layer without a window."""
        tokens = self.number("attention.sliding_window", WINDOWS.get(self.arch, 0))
        name = "attention.sliding_window_pattern"
        pattern = self.header.of_arch(name)
        if isinstance(pattern, tuple):
            flags = pattern[:n_layer]
            if len(flags) < n_layer:
                raise self.wrong(f"the key {name} has fewer entries than the model has layers")
            return tuple(tokens if flag else 0 for flag in flags)
        period = self.number(name, PERIODS.get(self.arch, 0))
        return tuple(
            tokens if period == 0 or layer % period < period - 1 else 0 for layer in range(n_layer)
        )

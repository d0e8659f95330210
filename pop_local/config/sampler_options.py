"""The list of sampling options.

The sampler chain, command line, settings, request bodies, and the chat's parameters are derived
from this list.
"""

from dataclasses import dataclass, field, fields
from typing import Any, get_args

from pop_local.config.limits import MOST, MOST_SEED


@dataclass(frozen=True)
class SamplerOption:
    """A field of SamplerOptions and its properties. `least` and `most` are inclusive limits."""

    name: str
    kind: type[int] | type[float]
    help: str
    least: float
    most: float
    # Key of the recommended value in GGUF files (llama.cpp's src/llama-arch.cpp).
    gguf_key: str = ""
    # Other names in requests.
    aliases: tuple[str, ...] = ()
    # Value of requests that turns the option off, as 0 does.
    off: float | None = None
    # The sampler is llama_sampler_init_NAME(value, *arguments). A string names another option.
    sampler: str = ""
    arguments: tuple[int | str, ...] = ()
    is_expert: bool = True
    is_setting: bool = False


def _option(default: float | None, words: str, least: float, most: float, **more: Any) -> Any:
    return field(default=default, metadata={"help": words, "least": least, "most": most, **more})


@dataclass(frozen=True)
class SamplerOptions:
    """Sampling options. The fields with a `sampler` are in the order of llama.cpp's chain.

    `logit_bias`: (token, bias) pairs. Each bias is added to the token's logit.
    """

    temperature: float = _option(
        0.8, "Temperature (0: greedy).", 0, 10, gguf_key="temp", is_expert=False, is_setting=True
    )
    top_n_sigma: float = _option(
        0.0,
        "Sample from tokens within N standard deviations of the largest logit (0: all).",
        0,
        10,
        off=-1,
        sampler="top_n_sigma",
    )
    top_k: int = _option(
        40,
        "Sample from the K most likely tokens (0: all).",
        0,
        MOST,
        gguf_key="top_k",
        off=-1,
        sampler="top_k",
    )
    typical_p: float = _option(
        1.0,
        "Locally typical sampling threshold (1: all tokens).",
        0,
        1,
        sampler="typical",
        arguments=(1,),
    )
    top_p: float = _option(
        0.95,
        "Nucleus sampling threshold (1: all tokens).",
        0,
        1,
        gguf_key="top_p",
        sampler="top_p",
        arguments=(1,),
        is_expert=False,
        is_setting=True,
    )
    min_p: float = _option(
        0.05,
        "Minimum probability relative to the most likely token (0: all tokens).",
        0,
        1,
        gguf_key="min_p",
        sampler="min_p",
        arguments=(1,),
    )
    repeat_penalty: float = _option(
        1.0,
        "Penalty for the last 64 tokens, which divides their positive logits (1: none).",
        0.01,
        10,
        gguf_key="penalty_repeat",
        aliases=("repetition_penalty",),
    )
    frequency_penalty: float = _option(
        0.0, "Penalty for each occurrence of a token in the last 64 (0: none).", -2, 2
    )
    presence_penalty: float = _option(
        0.0, "Penalty for each token that occurs in the last 64 (0: none).", -2, 2
    )
    seed: int | None = _option(
        None, "Random seed (default: random).", 0, MOST_SEED, is_expert=False
    )
    logit_bias: tuple[tuple[int, float], ...] = ()


def _kind(annotation: Any) -> type[int] | type[float]:
    return int if int in (annotation, *get_args(annotation)) else float


SAMPLER_OPTIONS = {
    entry.name: SamplerOption(entry.name, _kind(entry.type), **entry.metadata)
    for entry in fields(SamplerOptions)
    if entry.metadata
}

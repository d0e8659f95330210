"""Facts that follow from an architecture's name and from no key or tensor.

All other facts are read from the model's file (pop_converter.architecture.shape). Names are from
llama.cpp's src/llama-arch.cpp. An architecture that is not listed counts as an ordinary decoder.
"""

import re

_ENCODER = "an encoder, which writes no text"
_DIFFUSION = "a diffusion model, which reads its whole text in every step"
_DRAFT = "a draft for another model"
_LOOPED = "a model that runs its layers several times"

# Architectures that do not read a prompt token by token, or that no schedule describes.
REFUSED = {
    "bert": _ENCODER,
    "modern-bert": _ENCODER,
    "nomic-bert": _ENCODER,
    "nomic-bert-moe": _ENCODER,
    "neo-bert": _ENCODER,
    "jina-bert-v2": _ENCODER,
    "jina-bert-v3": _ENCODER,
    "eurobert": _ENCODER,
    "gemma-embedding": _ENCODER,
    "llama-embed": _ENCODER,
    "t5": "an encoder with a decoder",
    "t5encoder": _ENCODER,
    "clip": "the part of a model that sees pictures",
    "wavtokenizer-dec": "a decoder of sound",
    "dream": _DIFFUSION,
    "llada": _DIFFUSION,
    "llada-moe": _DIFFUSION,
    "rnd1": _DIFFUSION,
    "eagle3": _DRAFT,
    "dflash": _DRAFT,
    "gemma4-assistant": _DRAFT,
    "chameleon": "a model whose prompts llama.cpp does not read without logits",
}
LOOPS_KEY = "num_loops"
# Architectures whose later layers run with earlier layers' tensors.
REPEATED = ("hrm_text",)

_LAYER_NORM = "its norm is not an RMS norm"
_OWN_QKV = "its graph computes K and V in an unusual way"
# Architectures whose K and V cannot be fitted, although their tensors look so (no build_qkv).
UNFITTED = {
    "cogvlm": _OWN_QKV,
    "gemma4": _OWN_QKV,
    "graniteswitch": _OWN_QKV,
    "mimo2": _OWN_QKV,
    "openelm": _OWN_QKV,
    "plamo2": _OWN_QKV,
    "plamo3": _OWN_QKV,
    "cohere2": _LAYER_NORM,
    "cohere2moe": _LAYER_NORM,
    "command-r": _LAYER_NORM,
    "dbrx": _LAYER_NORM,
    "gemma3n": "its state has several streams",
}

# Architectures with several positions per row (M-RoPE), if their file has sections for them.
SEVERAL_POSITIONS = (
    "bailingmoe3",
    "glm4",
    "glm4moe",
    "hunyuan_vl",
    "paddleocr",
    "qwen2vl",
    "qwen35",
    "qwen35moe",
    "qwen3tts",
    "qwen3vl",
    "qwen3vlmoe",
    "qwen4exp",
)
# llama.cpp asserts for these that RoPE covers the whole head.
TURNS_ALL = re.compile(
    "apertus|arcee|arctic|baichuan|codeshell|cogvlm|cohere2moe|dbrx|deepseek|dots1|ernie4_5"
    "|ernie4_5-moe|exaone|exaone4|exaone-moe|granite|granitemoe|granite_swa|grok|grovemoe"
    "|hunyuan-dense|hunyuan-moe|hunyuan_vl|hy_v3|internlm2|jais2|llama4|maincoder|mellum|minicpm"
    "|mistral3|olmo|olmo2|olmoe|orion|paddleocr|pangu-embedded|plamo|pockettts|qwen2|qwen2moe"
    "|qwen2vl|qwen3|qwen3moe|qwen3tts|qwen3vl|qwen3vlmoe|seed_oss|smallthinker|smollm3|starcoder2"
    "|talkie|xverse"
)
# Further architectures with K and V heads of the same width; all of the above have it too.
SAME_WIDTHS = re.compile(
    "bailingmoe|bitnet|bloom|cohere2|command-r|deepseek2-ocr|deepseek4|falcon|gpt2|gpt-oss|gptneox"
    "|jais|jamba|lfm2|lfm2moe|maple|mpt|nemotron|openelm|phi2|phimoe|qwen|starcoder"
)
# The recurrent layers are twice as wide as the model, or have heads as wide as a state.
DOUBLE_INNER = ("granitehybrid", "jamba")
HEADS_OF_STATES = ("qwen35", "qwen35moe", "qwen3next", "qwen4exp")
# Architectures whose gated FFN uses GELU instead of SiLU.
GELU = ("gemma", "gemma2", "gemma3", "grok", "spark2_5")

# Layers per period if the file has no such key; a period's last layer attends to all positions.
PERIODS = {"gemma2": 2, "gemma3": 6, "llama": 1, "phi3": 1, "qwen2": 1, "qwen3": 1}
# Attention window in tokens if the file has no such key.
WINDOWS = {"gemma2": 4096}

# Gemma 3n files have no key for the number of layers that compute K/V.
GEMMA3N_KV_LAYERS = 20

# Architectures measured on real models; all other architectures were tested on random weights.
MEASURED = ("llama", "qwen2", "gemma3")


def refusal(arch: str, n_loops: int) -> str:
    """Return a description of a model that cannot be pruned, "" for any other model."""
    return REFUSED.get(arch, _LOOPED if n_loops > 1 else "")

"""Facts that the name of an architecture alone tells: neither keys nor tensors do.

Everything else comes from a model's file (pop_converter.architecture.shape). Names are those of
llama.cpp's src/llama-arch.cpp; one that is missing here is taken for a decoder like any other.
"""

import re

_ENCODER = "an encoder, which writes no text"
_DIFFUSION = "a diffusion model, which reads its whole text in every step"
_DRAFT = "a draft for another model"
_LOOPED = "a model that runs its layers several times"

# Architectures that read no prompt token by token, or whose schedule no file can name.
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
# Architectures whose later layers run with the tensors of earlier ones.
REPEATED = ("hrm_text",)

_LAYER_NORM = "its norm is not an RMS norm"
_OWN_QKV = "its graph makes K and V in a way of its own"
# Architectures whose tensors look as if K and V could be fitted (llama.cpp: no build_qkv).
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

# Architectures whose rows have several positions each (M-RoPE), if their file has sections for it.
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
# Those that turn all of a head by its position; llama.cpp asserts it.
TURNS_ALL = re.compile(
    "apertus|arcee|arctic|baichuan|codeshell|cogvlm|cohere2moe|dbrx|deepseek|dots1|ernie4_5"
    "|ernie4_5-moe|exaone|exaone4|exaone-moe|granite|granitemoe|granite_swa|grok|grovemoe"
    "|hunyuan-dense|hunyuan-moe|hunyuan_vl|hy_v3|internlm2|jais2|llama4|maincoder|mellum|minicpm"
    "|mistral3|olmo|olmo2|olmoe|orion|paddleocr|pangu-embedded|plamo|pockettts|qwen2|qwen2moe"
    "|qwen2vl|qwen3|qwen3moe|qwen3tts|qwen3vl|qwen3vlmoe|seed_oss|smallthinker|smollm3|starcoder2"
    "|talkie|xverse"
)
# More of those whose heads have K and V of one width, as all of the above have.
SAME_WIDTHS = re.compile(
    "bailingmoe|bitnet|bloom|cohere2|command-r|deepseek2-ocr|deepseek4|falcon|gpt2|gpt-oss|gptneox"
    "|jais|jamba|lfm2|lfm2moe|maple|mpt|nemotron|openelm|phi2|phimoe|qwen|starcoder"
)
# Those whose recurrent layers are twice as wide as the model, or have heads as wide as a state.
DOUBLE_INNER = ("granitehybrid", "jamba")
HEADS_OF_STATES = ("qwen35", "qwen35moe", "qwen3next", "qwen4exp")
# Architectures whose gated FFN has GELU in the place of SiLU.
GELU = ("gemma", "gemma2", "gemma3", "grok", "spark2_5")

# Layers of a period, the last of which attends to all positions, where the file names neither.
PERIODS = {"gemma2": 2, "gemma3": 6, "llama": 1, "phi3": 1, "qwen2": 1, "qwen3": 1}
# The window in tokens where the file names none.
WINDOWS = {"gemma2": 4096}

# Gemma 3n names nowhere how many of its layers have K/V of their own.
GEMMA3N_KV_LAYERS = 20

# Architectures that were measured on real models; all others on random ones.
MEASURED = ("llama", "qwen2", "gemma3")


def refusal(arch: str, n_loops: int) -> str:
    """Return what a model is that cannot be pruned, "" for any other."""
    return REFUSED.get(arch, _LOOPED if n_loops > 1 else "")

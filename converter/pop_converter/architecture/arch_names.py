"""Architecture properties that GGUF files do not record.

The names are defined in llama.cpp's src/llama-arch.cpp. Architectures that are not listed here are
treated as decoders.
"""

import re


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


# Architectures that do not read prompts token by token, or whose layers cannot be skipped.
REFUSED = {
    **dict.fromkeys(
        _names(
            "bert|modern-bert|nomic-bert|nomic-bert-moe|neo-bert|jina-bert-v2|jina-bert-v3|eurobert"
            "|gemma-embedding|llama-embed|t5encoder"
        ),
        "the model is an encoder, which does not generate text",
    ),
    **dict.fromkeys(
        _names("dream|llada|llada-moe|rnd1"),
        "the model is a diffusion model, which reads the whole text at every step",
    ),
    **dict.fromkeys(
        _names("eagle3|dflash|gemma4-assistant"), "the model is a draft model for another model"
    ),
    "t5": "the model has an encoder and a decoder",
    "clip": "the model is an image encoder",
    "wavtokenizer-dec": "the model is an audio decoder",
    "chameleon": "with this model, llama.cpp cannot read prompts without computing logits",
}
LOOPS_KEY = "num_loops"
# Architectures whose later layers reuse the tensors of earlier layers.
REPEATED = ("hrm_text",)

# Architectures whose K and V cannot be fitted even though their tensors have the usual names.
UNFITTED = {
    **dict.fromkeys(
        _names("cogvlm|gemma4|graniteswitch|mimo2|openelm|plamo2|plamo3"),
        "the model computes K and V in an unusual way",
    ),
    **dict.fromkeys(
        _names("cohere2|cohere2moe|command-r|dbrx"), "the model uses layer norm instead of RMS norm"
    ),
    "gemma3n": "the hidden state has multiple streams",
}

# Architectures with multiple positions per token (M-RoPE) if the file has RoPE sections.
SEVERAL_POSITIONS = _names(
    "bailingmoe3|glm4|glm4moe|hunyuan_vl|paddleocr|qwen2vl|qwen35|qwen35moe|qwen3tts|qwen3vl"
    "|qwen3vlmoe|qwen4exp"
)
# Architectures for which llama.cpp asserts that RoPE covers the whole head.
TURNS_ALL = re.compile(
    "apertus|arcee|arctic|baichuan|codeshell|cogvlm|cohere2moe|dbrx|deepseek|dots1|ernie4_5"
    "|ernie4_5-moe|exaone|exaone4|exaone-moe|granite|granitemoe|granite_swa|grok|grovemoe"
    "|hunyuan-dense|hunyuan-moe|hunyuan_vl|hy_v3|internlm2|jais2|llama4|maincoder|mellum|minicpm"
    "|mistral3|olmo|olmo2|olmoe|orion|paddleocr|pangu-embedded|plamo|pockettts|qwen2|qwen2moe"
    "|qwen2vl|qwen3|qwen3moe|qwen3tts|qwen3vl|qwen3vlmoe|seed_oss|smallthinker|smollm3|starcoder2"
    "|talkie|xverse"
)
# Other architectures for which llama.cpp asserts that K and V heads have the same width.
SAME_WIDTHS = re.compile(
    "bailingmoe|bitnet|bloom|cohere2|command-r|deepseek2-ocr|deepseek4|falcon|gpt2|gpt-oss|gptneox"
    "|jais|jamba|lfm2|lfm2moe|maple|mpt|nemotron|openelm|phi2|phimoe|qwen|starcoder"
)
# Architectures whose recurrent layers are twice as wide as the model, and architectures whose
# recurrent heads are as wide as the state.
DOUBLE_INNER = ("granitehybrid", "jamba")
HEADS_OF_STATES = ("qwen35", "qwen35moe", "qwen3next", "qwen4exp")
# Architectures whose gated FFN uses GELU instead of SiLU.
GELU = ("gemma", "gemma2", "gemma3", "grok", "spark2_5")

# Number of layers per attention period if the file has no key for it. The last layer of each period
# attends to all positions.
PERIODS = {"gemma2": 2, "gemma3": 6, "llama": 1, "phi3": 1, "qwen2": 1, "qwen3": 1}
# Attention window in tokens if the file has no key for it.
WINDOWS = {"gemma2": 4096}

# Gemma 3n files do not record how many layers compute K/V.
GEMMA3N_KV_LAYERS = 20

# Architectures measured with real models. All others were tested only with random weights.
MEASURED = ("llama", "qwen2", "gemma3")


def refusal(arch: str, n_loops: int) -> str:
    """Return the reason an architecture cannot be pruned, or "" if it can."""
    return REFUSED.get(arch, "the model runs its layers multiple times" if n_loops > 1 else "")

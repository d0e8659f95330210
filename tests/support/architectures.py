"""Architectures of llama.cpp that need special treatment or have no recipe.

Names are llama.cpp's. tests/oracle/test_all_architectures.py fails for a name that is neither
listed here nor tested, so a new architecture in a llama.cpp update is noticed.
"""

from collections.abc import Mapping

# llama.cpp's own test has no recipe that builds a model of these.
NO_RECIPE: Mapping[str, str] = {
    "clip": "it is no language model: llama.cpp opens it beside one",
    "dflash": "its recipe lacks the layers of the other model",
    "eagle3": "its recipe lacks the layers of the other model",
    "gemma4-assistant": "its recipe lacks the shapes of the other model",
    "gptj": "llama.cpp has its name, and no code for it",
    "graniteswitch": "its recipe lacks the adapters",
}

# llama.cpp crashes while it reads a prompt with these.
CRASHES: Mapping[str, str] = {
    "chameleon": "where no row of a ubatch has logits",
    "rwkv6qwen2": "with the model that its recipe makes",
}

# Recipes that build a model only with experts, although upstream's list does not say so.
WITH_EXPERTS = ("deepseek2-ocr", "nomic-bert-moe")

# llama.cpp crashes with flash attention on these recipes' models.
NO_FLASH_ATTENTION = ("plm",)

SEVERAL_POSITIONS = "its rows have multiple positions each, by the recipe at least"
OWN_CACHE = "its cache is of another kind than keys and values alone"

# Architectures without recurrent layers that still have no deep pass.
NO_DEEP_PASS: Mapping[str, str] = {
    "deepseek32": OWN_CACHE,
    "dots3note": OWN_CACHE,
    "gemma3n": "its state is of multiple streams",
    "glm-dsa": OWN_CACHE,
    "glm4": SEVERAL_POSITIONS,
    "glm4moe": SEVERAL_POSITIONS,
    "hunyuan_vl": SEVERAL_POSITIONS,
    "hy_v4": OWN_CACHE,
    "minimax-m3": OWN_CACHE,
    "paddleocr": SEVERAL_POSITIONS,
    "qwen2vl": SEVERAL_POSITIONS,
    "qwen3tts": SEVERAL_POSITIONS,
    "qwen3vl": SEVERAL_POSITIONS,
    "qwen3vlmoe": SEVERAL_POSITIONS,
}

# Keys that a recipe needs to build a model, or one that differs from the full model.
MORE_KEYS: Mapping[str, tuple[str, ...]] = {
    "arwkv7": (
        "attention.decay_lora_rank=32",
        "attention.iclr_lora_rank=32",
        "attention.value_residual_mix_lora_rank=32",
        "attention.gate_lora_rank=32",
        "token_shift_count=1",
    ),
    "bailingmoe3": (
        "swiglu_clamp_exp=0.0,4.0,0.0,4.0",
        "swiglu_clamp_shexp=0.0,5.0,0.0,5.0",
    ),
    "bert": ("tokenizer.ggml.token_type_count=2",),
    # Without the epsilon, separate streams stay equal to the last bit.
    "deepseek4": ("hyper_connection.epsilon=0.0",),
    "gemma4": ("attention.sliding_window_pattern=true,true,true,false,true",),
    "glm5-next": ("hyper_connection.epsilon=0.0",),
    "jina-bert-v2": ("tokenizer.ggml.token_type_count=2",),
    "jina-bert-v3": ("tokenizer.ggml.token_type_count=2",),
    "nemotron_h": (
        "block_count=6",
        "attention.head_count=2,0,2,2,0,2",
        "attention.head_count_kv=2,0,2,2,0,2",
        "feed_forward_length=0,0,384,0,0,384",
    ),
    "nemotron_h_moe": (
        "block_count=6",
        "attention.head_count=2,0,2,2,0,2",
        "attention.head_count_kv=2,0,2,2,0,2",
        "feed_forward_length=0,0,384,0,0,384",
    ),
    "nomic-bert": ("tokenizer.ggml.token_type_count=2",),
    "nomic-bert-moe": ("tokenizer.ggml.token_type_count=2", "moe_every_n_layers=2"),
    "rwkv7": (
        "attention.decay_lora_rank=32",
        "attention.iclr_lora_rank=32",
        "attention.value_residual_mix_lora_rank=32",
        "attention.gate_lora_rank=32",
        "token_shift_count=2",
    ),
}

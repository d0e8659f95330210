"""Which architectures llama.cpp knows that are not pruned, and why: plain data.

Names are llama.cpp's own. tests/oracle/test_all_architectures.py fails for a name that is neither
here nor right, so a new one of a new llama.cpp is noticed.
"""

from collections.abc import Mapping

ENCODER = "it is an encoder: its rows see each other, and nothing follows its prompt"
DIFFUSION = "it is a diffusion model: its rows see each other, and are read again and again"
DRAFT = "it drafts for another model, whose states it reads"
CROSS = "its decoder reads what its encoder makes of the prompt"

# llama_pop_set_boundary() refuses these.
REFUSED: Mapping[str, str] = {
    "bert": ENCODER,
    "dream": DIFFUSION,
    "eurobert": ENCODER,
    "gemma-embedding": ENCODER,
    "jina-bert-v2": ENCODER,
    "jina-bert-v3": ENCODER,
    "llada": DIFFUSION,
    "llada-moe": DIFFUSION,
    "llama-embed": ENCODER,
    "modern-bert": ENCODER,
    "neo-bert": ENCODER,
    "nomic-bert": ENCODER,
    "nomic-bert-moe": ENCODER,
    "rnd1": DIFFUSION,
    "t5": CROSS,
    "t5encoder": ENCODER,
    "wavtokenizer-dec": "it makes sound of codes, all of them at once",
    "dflash": DRAFT,
    "eagle3": DRAFT,
    "gemma4-assistant": DRAFT,
}

# llama.cpp's own test has no recipe that makes a model of these.
NO_RECIPE: Mapping[str, str] = {
    "clip": "it is no language model: llama.cpp opens it beside one",
    "dflash": "its recipe lacks the layers of the other model",
    "eagle3": "its recipe lacks the layers of the other model",
    "gemma4-assistant": "its recipe lacks the shapes of the other model",
    "gptj": "llama.cpp has its name, and no code for it",
    "graniteswitch": "its recipe lacks the adapters",
}

# llama.cpp itself crashes when it reads a prompt with these.
CRASHES: Mapping[str, str] = {
    "chameleon": "where no row of a ubatch has logits",
    "rwkv6qwen2": "with the model that its recipe makes",
}

# Recipes that make a model with experts alone, which upstream's list does not say.
WITH_EXPERTS = ("deepseek2-ocr", "nomic-bert-moe")

# llama.cpp crashes with flash attention on the models of these recipes.
NO_FLASH_ATTENTION = ("plm",)

SEVERAL_POSITIONS = "its rows have several positions each, by the recipe at least"
OWN_CACHE = "its cache is of another kind than keys and values alone"

# No recurrent layers, and yet no deep pass.
NO_DEEP_PASS: Mapping[str, str] = {
    "deepseek32": OWN_CACHE,
    "dots3note": OWN_CACHE,
    "gemma3n": "its state is of several streams",
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

# Keys without which a recipe makes no model, or one that cannot be told from the full model.
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
    # Streams that are kept apart stay the same to the last bit without it.
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

"""Build tiny random vision-language models: a text model with mtmd's tokens, and its mmproj.

The mmproj has the keys and tensors that tools/mtmd/clip.cpp of llama.cpp reads.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFWriter
from PIL import Image

from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import convert
from pop_local.engine.chat_messages import Message
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.images.pictures import picture_of
from pop_local.engine.model import PopModel
from pop_local.engine.prefill import read as prefill
from pop_local.engine.prefill.reading import Read
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.turn_options import TurnOptions
from support.calls import first_of
from support.shapes import read_shape
from support.synthetic import DEFAULTS, Weights, make_gguf

CONTROL = (
    *("<|vision_start|>", "<|vision_end|>", "<start_of_image>", "<end_of_image>"),
    *("<fake_token_around_image>", "<global-img>", "<|im_start|>", "<|im_end|>"),
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
# Accepts content only as parts, like SmolVLM's template.
PARTS_TEMPLATE = TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}",
)


@dataclass(frozen=True)
class MmprojRecipe:
    """The mmproj to build; `n_text`: width of the text model's states."""

    projector: str
    n_text: int = 128
    n_embd: int = 64
    n_head: int = 4
    n_ff: int = 96
    n_layer: int = 3
    image_size: int = 128
    patch: int = 8
    merge: int = 2
    n_deepstack: int = 0
    seed: int = 1

    @property
    def is_qwen(self) -> bool:
        return self.projector.startswith("qwen")


MMPROJS = {
    "llama": MmprojRecipe("idefics3", image_size=64),
    "gemma3": MmprojRecipe("gemma3"),
    "qwen2vl": MmprojRecipe("qwen2vl_merger"),
    "qwen3vl": MmprojRecipe("qwen3vl_merger", n_deepstack=3),
    "qwen3vlmoe": MmprojRecipe("qwen3vl_merger", n_deepstack=3),
}


def make_vision_model(
    folder: Path, arch: str, *, boundary: int = 5, template: str = TEMPLATE
) -> Path:
    """Write a converted model and its mmproj into a folder; return the model."""
    plain = make_gguf(
        folder / "plain.gguf",
        arch,
        n_vocab=DEFAULTS[arch].n_vocab + len(CONTROL) + 2,
        control=CONTROL,
        pieces=("\n", "\n\n"),
        chat_template=template,
    )
    plan = make_plan(read_shape(plain), boundary=boundary, min_prompt=0, tail_tokens=8)
    convert(plan, plain, folder / "model.gguf")
    make_mmproj(folder / "mmproj.gguf", MMPROJS[arch])
    return folder / "model.gguf"


def png(seed: int, width: int = 128, height: int = 96) -> bytes:
    """Return a PNG of noise that differs for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_mmproj(path: Path, vision: MmprojRecipe) -> Path:
    writer = GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_name("tiny random vision")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(vision.projector)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch)
    writer.add_vision_embedding_length(vision.n_embd)
    writer.add_vision_feed_forward_length(vision.n_ff)
    writer.add_vision_projection_dim(vision.n_text)
    writer.add_vision_block_count(vision.n_layer)
    writer.add_vision_head_count(vision.n_head)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_image_mean([0.5, 0.5, 0.5])
    writer.add_vision_image_std([0.5, 0.5, 0.5])
    writer.add_vision_use_gelu(True)
    if vision.is_qwen:
        writer.add_vision_spatial_merge_size(vision.merge)
    else:
        writer.add_vision_projector_scale_factor(vision.merge)
    if vision.projector == "idefics3":
        writer.add_vision_preproc_image_size(2 * vision.image_size)
    for name, weights in _tensors(vision):
        writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(vision: MmprojRecipe) -> Iterator[tuple[str, Weights]]:
    rng = np.random.default_rng(vision.seed)
    n, wide = vision.n_embd, 4 * vision.n_embd

    def matrix(*dims: int) -> Weights:
        n_in = int(np.prod(dims[1:]))
        weights: Weights = rng.standard_normal(dims, np.float32) * np.float32(n_in**-0.5)
        return weights

    def vector(size: int, mean: int) -> Weights:
        weights: Weights = mean + np.float32(0.1) * rng.standard_normal(size, np.float32)
        return weights

    def linear(name: str, n_out: int, n_in: int) -> Iterator[tuple[str, Weights]]:
        yield f"{name}.weight", matrix(n_out, n_in)
        yield f"{name}.bias", vector(n_out, 0)

    def norm(name: str, size: int) -> Iterator[tuple[str, Weights]]:
        yield f"{name}.weight", vector(size, 1)
        yield f"{name}.bias", vector(size, 0)

    yield "v.patch_embd.weight", matrix(n, 3, vision.patch, vision.patch)
    if vision.is_qwen:
        yield "v.patch_embd.weight.1", matrix(n, 3, vision.patch, vision.patch)
    if vision.projector != "qwen2vl_merger":
        yield "v.patch_embd.bias", vector(n, 0)
        side = vision.image_size // vision.patch
        yield "v.position_embd.weight", np.float32(0.5) * rng.standard_normal((side**2, n), "f4")
    for layer in range(vision.n_layer):
        block = f"v.blk.{layer}"
        yield from norm(f"{block}.ln1", n)
        yield from norm(f"{block}.ln2", n)
        if vision.projector == "qwen3vl_merger":
            yield from linear(f"{block}.attn_qkv", 3 * n, n)
        else:
            for part in "qkv":
                yield from linear(f"{block}.attn_{part}", n, n)
        yield from linear(f"{block}.attn_out", n, n)
        yield from linear(f"{block}.ffn_up", vision.n_ff, n)
        yield from linear(f"{block}.ffn_down", n, vision.n_ff)
        if layer < vision.n_deepstack:
            yield from norm(f"v.deepstack.{layer}.norm", wide)
            yield from linear(f"v.deepstack.{layer}.fc1", wide, wide)
            yield from linear(f"v.deepstack.{layer}.fc2", vision.n_text, wide)
    yield from norm("v.post_ln", n)
    if vision.is_qwen:
        yield from linear("mm.0", wide, wide)
        yield from linear("mm.2", vision.n_text, wide)
    elif vision.projector == "gemma3":
        yield "mm.input_projection.weight", matrix(n, vision.n_text)
        yield "mm.soft_emb_norm.weight", vector(n, 1)
    else:
        yield "mm.model.fc.weight", matrix(vision.n_text, n * vision.merge**2)


ARCHS = ("llama", "gemma3", "qwen2vl", "qwen3vl")
LONG = "a b c d e f g h " * 8


@dataclass(frozen=True)
class VisionModel:
    arch: str
    path: Path

    def opened(self, **options: Any) -> PopModel:
        defaults: dict[str, Any] = {"n_ctx": 1024, "mmproj": self.path.parent / "mmproj.gguf"}
        return PopModel(EngineOptions.of(self.path, n_threads=1, **defaults | options))


def prompt(model: PopModel, question: str, *seeds: int) -> Prompt:
    """Return a prompt with a question about noise images."""
    pictures = tuple((0, picture_of(png(seed), f"{seed}.png")) for seed in seeds)
    return model.engine.prompter.conversation([Message("user", question, pictures)])


def append(model: PopModel, made: Prompt) -> Read:
    """Read a prompt after the cached rows."""
    return prefill.append(first_of(model).cache, made, first_of(model).rule)


def answered(model: PopModel, made: Prompt, n: int = 4) -> tuple[list[int], int]:
    """Return greedy tokens after a prompt, and the number of rows read for the first token."""
    read = model.read(made)
    with closing(model.engine.sampled(TurnOptions(temperature=0.0))) as sampled:
        return list(islice(sampled, n)), read.counters.n_rows


def image_start(made: Prompt) -> int:
    return made.spans[0][0]


def image_end(made: Prompt) -> int:
    return made.text_from

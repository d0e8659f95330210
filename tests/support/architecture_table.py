"""Build the tables of docs/internals/architectures-table.md from llama.cpp's tiny recipes.

`make recipes` compiles the recipes. In the folder tests, `python -m support.architecture_table`
then builds a model of each architecture, and rewrites the tables.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pop_base.errors import UnsupportedArchitectureError
from pop_converter.architecture.arch_names import REFUSED
from pop_converter.architecture.shape import ModelShape
from pop_converter.architecture.skipping import skipping_of
from support import recipes
from support.architectures import MORE_KEYS, WITH_EXPERTS
from support.paths import ROOT
from support.shapes import read_shape

DOCUMENT = ROOT / "docs" / "internals" / "architectures-table.md"
_BEGIN, _END = "<!-- table -->\n", "<!-- end -->\n"
_COLUMNS = "layers that may be skipped | left in a skipped layer | projections | catching up |"
# Model families that users look for, in the order of the first table, and their architectures.
FAMILIES = {
    "llama": "Llama 2 and 3, Mistral 7B, Mixtral, SmolLM2, TinyLlama, Yi",
    "qwen2": "Qwen2, Qwen2.5, Qwen2.5-Coder, DeepSeek-R1-Distill-Qwen",
    "gemma3": "Gemma 3",
    "qwen3": "Qwen3",
    "qwen3moe": "Qwen3 with experts (30B-A3B)",
    "qwen35": "Qwen3.5",
    "qwen2vl": "Qwen2-VL, Qwen2.5-VL",
    "qwen3vl": "Qwen3-VL",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3n": "Gemma 3n",
    "gemma4": "Gemma 4",
    "phi3": "Phi-3, Phi-3.5, Phi-4",
    "smollm3": "SmolLM3",
    "llama4": "Llama 4",
    "mistral3": "Ministral 3",
    "deepseek2": "DeepSeek-V2, V3, R1",
    "gpt-oss": "gpt-oss",
    "glm4": "GLM-4-0414",
    "glm4moe": "GLM-4.5",
    "granite": "Granite 3",
    "granitehybrid": "Granite 4",
    "command-r": "Command R",
    "olmo2": "OLMo 2",
    "falcon": "Falcon",
    "lfm2": "LFM2",
    "mamba2": "Mamba 2",
    "gpt2": "GPT-2",
}


def make(name: recipes.Name, path: Path, seed: int = 1) -> Path:
    """Write a recipe's model with the keys that it needs, and return its path."""
    kind = replace(name, is_moe=name.is_moe or name.arch in WITH_EXPERTS)
    return recipes.make(kind, path, MORE_KEYS.get(name.arch, ()), seed)


def row(shape: ModelShape) -> str:
    """Return an architecture's row, which leaves out what varies between its models."""
    skipping = skipping_of(shape)
    layers = "all but the first" + (f" {skipping.first}" if skipping.first > 1 else "")
    if skipping.exact:
        layers += "; those that share K/V exactly"
    kinds = "fitted or own" if skipping.fits_from is not None else f"own: {skipping.no_fit}"
    if skipping.fits_from is not None and skipping.fits_from > skipping.first:
        kinds = "fitted in the last layers, own elsewhere"
    refill = f"no: {skipping.no_refill}" if skipping.no_refill else "yes"
    measured = "**" if skipping.is_measured else ""
    left = ", ".join(skipping.left) or "nothing"
    return f"| {measured}{shape.arch}{measured} | {layers} | {left} | {kinds} | {refill} |\n"


def arch_of(line: str) -> str:
    """Return the architecture of a row."""
    return line.split("|")[1].strip(" *")


def tables(rows: Iterable[str]) -> str:
    """Return three tables: well-known families, all other architectures, and refused ones."""
    by_arch = {arch_of(line): line for line in sorted(rows, key=arch_of)}
    families = "".join(
        f"| {FAMILIES[arch]} {by_arch[arch]}" for arch in FAMILIES if arch in by_arch
    )
    others = "".join(line for arch, line in by_arch.items() if arch not in FAMILIES)
    refused = "".join(f"| {name} | {why} |\n" for name, why in sorted(REFUSED.items()))
    return (
        f"\n## Well-known models\n\n| models | architecture | {_COLUMNS}\n"
        f"|---|---|---|---|---|---|\n{families}"
        f"\n## Other architectures\n\n| architecture | {_COLUMNS}\n|---|---|---|---|---|\n{others}"
        f"\n## Refused architectures\n\n| refused | because |\n|---|---|\n{refused}\n"
    )


def written(text: str) -> str:
    """Return the document's tables."""
    return text.split(_BEGIN)[1].split(_END)[0]


def built_rows() -> set[str]:
    """Return the row of each recipe's model."""
    rows = set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        for name in recipes.names():
            try:
                rows.add(row(read_shape(make(name, path))))
            except (recipes.NoModelError, UnsupportedArchitectureError):
                continue
    return rows


if __name__ == "__main__":
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(_BEGIN)
    after = rest.split(_END)[1]
    DOCUMENT.write_text(f"{before}{_BEGIN}{tables(built_rows())}{_END}{after}", encoding="utf-8")

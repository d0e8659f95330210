"""Test commands on tiny models with recurrent layers, latent attention or post-norms."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pop_local.cli import app
from support import recipes
from support.chat_models import make_chat_model
from support.shapes import read_shape

LATENT, NORMS_BEHIND = recipes.Name("deepseek2", is_moe=True), recipes.Name("olmo2", is_moe=False)
RECURRENT = recipes.Name("lfm2", is_moe=False)

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the library hides what recipes need"),
    pytest.mark.skipif(not recipes.names(), reason="`make recipes` was not run"),
]


def done(*args: object) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("name", [RECURRENT, LATENT, NORMS_BEHIND], ids=str)
def test_converted_model_of_each_architecture_answers(name: recipes.Name, tmp_path: Path) -> None:
    raw = recipes.make(
        name, tmp_path / "raw.gguf", ["context_length=2048", "attention.head_count=2"]
    )
    model = make_chat_model(raw, tmp_path / "model.gguf")
    boundary = read_shape(model).n_layer // 2
    done("convert", model, "--boundary", boundary, "--projection", "own", "--force")
    question = " ".join("abcdefgh" * 20)
    options = ["--max-tokens", 3, "--temperature", 0, "--threads", 1]
    shown = done("run", tmp_path / "model.pop.gguf", question, *options)
    assert "(144 with fast reading, " in shown

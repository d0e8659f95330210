"""Test pictures on the command line: run, chat, inspect, doctor, pull."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.repl import converse
from support.hub_server import Hub, Repo, serving
from support.program import called, run
from support.scripted_chat import Transcript
from support.synthetic import make_gguf
from support.vision_models import MMPROJS, make_mmproj, make_vision_model, png


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    (folder / "a.png").write_bytes(png(3))
    (folder / "b.png").write_bytes(png(4))
    (folder / "no.png").write_bytes(b"no picture")
    return make_vision_model(folder, "qwen2vl")


OPTIONS = ("--threads", 1, "--temperature", 0, "--max-tokens", 3)


def test_run_reads_images(path):
    a, b = path.parent / "a.png", path.parent / "b.png"
    done = called("run", path, "--image", a, "--image", b, "what differs?", *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "a.png (128 x 96): 50 tokens" in done.stderr
    assert "images 96 tokens encoded in" in done.stderr
    done = called("run", path, "--image", a, "what?", "--json", *OPTIONS)
    stats = json.loads(done.stdout)["stats"]
    assert stats["n_image"] == 48 and stats["encode_s"] > 0
    done = called("run", path, "--image", a, "what?", "--json", "--image-tokens", 16, *OPTIONS)
    assert 0 < json.loads(done.stdout)["stats"]["n_image"] <= 16


def test_run_rejects_images_in_one_line(path, tmp_path):
    done = called("run", path, "--image", path.parent / "no.png", "what?")
    assert done.returncode == 1
    assert "no.png is not a readable image" in done.stderr
    done = called("run", path, "--image", tmp_path / "absent.png", "what?")
    assert done.returncode == 1 and "absent.png" in done.stderr
    done = called("run", path, "--mmproj", path, "--image", path.parent / "a.png", "what?")
    assert done.returncode == 1 and "is not an mmproj" in done.stderr
    wide = make_mmproj(tmp_path / "wide.gguf", replace(MMPROJS["qwen2vl"], n_text=256))
    done = called("run", path, "--mmproj", wide, "what?", *OPTIONS)
    assert done.returncode == 1 and "does not match this model" in done.stderr
    alone = make_gguf(tmp_path / "alone.gguf", "llama")
    done = called("run", alone, "--image", path.parent / "a.png", "what?")
    assert done.returncode == 1 and "--mmproj FILE" in done.stderr


def chatted(path: Path, *lines: str, mmproj: str | None = "mmproj.gguf", n_ctx: int = 1024) -> str:
    vision = None if mmproj is None else path.parent / mmproj

    def opened(name: str | None, larger: int | None) -> PopModel:
        seen_by = None if name else vision
        return PopModel(EngineOptions.of(path, mmproj=seen_by, n_ctx=larger or n_ctx, n_threads=1))

    screen = Transcript(*lines)
    sampling = {"temperature": 0.0, "max_tokens": 3}
    chat = Dialogue(opened(None, None), opened, screen, sampling=sampling)
    with chat.model:
        converse(chat, screen.read_line)
        return screen.shown


def test_chat_attaches_images(path):
    a, b = path.parent / "a.png", path.parent / "b.png"
    shown = chatted(path, "/image", f"/image '{a}'", "what?", f"/image {b}", "and?")
    assert "# /image needs a path." in shown
    assert shown.count(f"# {a} (128 x 96): 50 tokens, 5% of the context.") == 1
    assert shown.count("# Your next question will include the attachment.") == 2
    assert "images 48 tokens encoded in" in shown
    assert "images 96 tokens encoded in" in shown


def test_chat_rejects_files_that_are_not_images(path):
    folder = path.parent
    shown = chatted(path, f"/image {folder / 'no.png'}", f"/image {folder / 'absent.png'}", "a")
    assert f"! {folder / 'no.png'} is not a readable image; use a PNG" in shown
    assert "absent.png" in shown and "images" not in shown.splitlines()[-1]
    shown = chatted(path, f"/image {folder / 'a.png'}", mmproj=None)
    assert "--mmproj FILE" in shown


def test_saves_and_loads_chat_with_images(path):
    a = path.parent / "a.png"
    shown = chatted(path, f"/image {a}", "what?", "/save seen", "/clear", "/load seen", "and?")
    assert shown.count("images 48 tokens") == 2
    assert shown.count("encoded in") == 1


def test_image_larger_than_context_is_dropped(path):
    big = path.parent / "big.png"
    big.write_bytes(png(5, 300, 300))
    shown = chatted(path, f"/image {big}", "what?", "x", "/retry", "l", n_ctx=256)
    assert shown.count("tokens too small: the prompt has") == 2
    assert "# The question and its attachments were dropped." in shown
    assert "images 361 tokens" in shown


def test_warns_if_new_model_cannot_read_images(path):
    a = path.parent / "a.png"
    shown = chatted(path, f"/image {a}", "what?", "/save shown", "/model blind", "more?", "/undo")
    blind = "* This model has no mmproj, so it cannot read the conversation's images"
    assert shown.count(blind) == 1
    assert shown.count("/undo and /clear remove images") == 1
    assert shown.endswith("# Dropped: what?\n")
    shown = chatted(path, "/load shown", "/load", mmproj=None)
    assert blind in shown and "# shown: 1 turn" in shown


def test_compares_prompts_with_images(path, tmp_path):
    lines = [{"prompt": "what? " * 20, "images": [str(path.parent / name)]} for name in ("a.png",)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = (tmp_path / "mine.jsonl", "--max-tokens", 2, "--threads", 1, "--json")
    done = called("compare", path, *given)
    assert done.returncode == 0, done.stderr
    [answer] = json.loads(done.stdout)["answers"]
    assert answer["pruned"]["n_pruned"] > 48 and answer["full"]["n_pruned"] == 0
    lines[0]["images"] = [str(path.parent / "no.png")]
    (tmp_path / "mine.jsonl").write_text(json.dumps(lines[0]))
    done = called("compare", path, *given)
    assert done.returncode == 1 and "no.png is not a readable image" in done.stderr


def test_inspect_shows_mmproj(path):
    done = called("inspect", path, "--json")
    assert json.loads(done.stdout)["mmproj"] == str(path.parent / "mmproj.gguf")
    assert "mmproj.gguf" in called("inspect", path).stdout
    found = called("inspect", path.parent / "mmproj.gguf")
    assert "multimodal projector" in found.stdout


def test_pull_fetches_mmproj(tmp_path):
    files = {
        "tiny-Q4_K_M-00001-of-00001.gguf": b"GGUF model",
        "mmproj-F16.gguf": b"GGUF half",
        "mmproj-Q8_0.gguf": b"GGUF small",
        "mmproj-BF16.gguf": b"GGUF brain",
    }
    with serving(Hub(repos={"a/b": Repo(files)})) as hub:
        # The client reads its endpoint from the environment at import time.
        done = run("pull", "hf:a/b", "--dir", tmp_path, **hub.environment())
    assert done.returncode == 0, done.stderr
    model = tmp_path / "tiny-Q4_K_M-00001-of-00001.gguf"
    assert done.stdout == f"{model}\n"
    assert "mmproj-Q8_0.gguf" in done.stderr
    named = tmp_path / "mmproj-tiny-Q4_K_M.gguf"
    assert {*tmp_path.glob("*.gguf")} == {model, named}
    assert named.read_bytes() == b"GGUF small"

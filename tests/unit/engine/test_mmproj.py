"""Mmprojs: choice, validation and decoding of pictures."""

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pop_base.errors import PopError
from pop_local.engine.images.pictures import Picture, picture_of, read_picture
from pop_local.engine.llama import logs
from pop_local.models.mmproj_files import find_mmproj
from support.vision_models import (
    MMPROJS,
    VisionModel,
    make_mmproj,
    make_vision_model,
    png,
    prompt,
)


def test_reads_images_of_a_question(smol, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(3))
    with smol.opened() as model:
        for images in ([path], [str(path)], [png(3)], [read_picture(path)]):
            assert model.chat("a", images=images, max_tokens=1).stats.n_image > 0
        with pytest.raises(PopError, match="must be a list"):
            model.chat("a", images=path)
        with pytest.raises(PopError, match="cannot read"):
            model.chat("a", images=[tmp_path / "none.png"])
    with smol.opened(mmproj=None) as model, pytest.raises(PopError, match="without an mmproj"):
        model.chat("a", images=[path])


def test_rejects_invalid_mmproj(smol, tmp_path):
    with pytest.raises(PopError, match="not an mmproj"):
        smol.opened(mmproj=smol.path)
    with pytest.raises(PopError, match="does not exist"):
        smol.opened(mmproj=tmp_path / "none.gguf")
    wide = make_mmproj(tmp_path / "wide.gguf", replace(MMPROJS["llama"], n_text=256))
    with smol.opened(mmproj=wide) as model:
        assert model.chat("a", max_tokens=1).stats.n_decoded == 1
        with pytest.raises(PopError, match="does not match this model"):
            model.chat("a", images=[png(3)], max_tokens=1)
    assert find_mmproj(smol.path) == smol.path.parent / "mmproj.gguf"
    make_mmproj(smol.path.parent / "mmproj-2.gguf", MMPROJS["llama"])
    assert find_mmproj(smol.path) is None
    (smol.path.parent / "mmproj-2.gguf").unlink()


@pytest.mark.parametrize("part", ["attn_k", "attn_out", "ffn_down"])
def test_mmproj_layer_without_a_tensor_is_refused(part, smol, tmp_path):
    bad, name = tmp_path / "bad.gguf", f"v.blk.1.{part}.weight"
    content = make_mmproj(bad, MMPROJS["llama"]).read_bytes()
    bad.write_bytes(content.replace(name.encode(), b"x" + name[1:].encode()))
    with pytest.raises(PopError, match=f"has no tensor {name}"):
        smol.opened(mmproj=bad)


@pytest.mark.parametrize(
    ("name", "models", "matching"),
    [
        ("mmproj.gguf", ("Text-7B.gguf", "Vision-8B-Q8_0.gguf"), (0, 1)),
        ("mmproj-model-f16.gguf", ("Text-7B.gguf", "Vision-8B.gguf"), (0, 1)),
        ("mmproj_model_f16.gguf", ("Vision-8B.gguf",), (0,)),
        ("mmproj_f16_q8_0.gguf", ("Vision-8B.gguf",), (0,)),
        ("mmproj_gone.gguf", ("Vision-8B.gguf",), ()),
        ("mmproj-Vision-8B-Q4_K_M.gguf", ("Text-7B.gguf", "Vision-8B-Q8_0.gguf"), (1,)),
        ("mmproj-Qwen2-VL-2B-f16.gguf", ("Qwen2-7B.gguf", "Qwen2-VL-2B-Q4_0.gguf"), (1,)),
        ("mmproj-Gone-8B.gguf", ("Text-7B.gguf", "Other-8B.gguf"), ()),
        ("mmproj-a-of-mine.gguf", ("a-Q4_0.gguf", "a-Q8_0.gguf", "a-Q8_0.pop.gguf"), (0, 1, 2)),
        ("mmproj-Gone-8B.gguf", ("Other-8B.gguf",), ()),
    ],
)
def test_only_mmproj_of_a_folder_needs_a_matching_name(smol, tmp_path, name, models, matching):
    (tmp_path / name).write_bytes((smol.path.parent / "mmproj.gguf").read_bytes())
    for model in models:
        (tmp_path / model).touch()
    has_mmproj = [find_mmproj(tmp_path / model) is not None for model in models]
    assert has_mmproj == [number in matching for number in range(len(models))]


def test_image_tokens_are_limited(tmp_path):
    vision_model = VisionModel("qwen2vl", make_vision_model(tmp_path, "qwen2vl"))
    with vision_model.opened() as model, vision_model.opened(image_tokens=16) as small:
        large, few = prompt(model, "a", 3), prompt(small, "a", 3)
        assert 0 < few.n_image <= 16 < large.n_image
        assert large.images[large.spans[0][0]].key != few.images[few.spans[0][0]].key
    with (
        vision_model.opened(image_tokens=1) as none,
        pytest.raises(PopError, match="cannot fit an image into 1"),
    ):
        prompt(none, "a", 3)


def test_reads_pictures_of_odd_sizes(vision_model):
    with vision_model.opened() as model:
        for size in ((1, 1), (100, 1), (1, 100), (31, 333)):
            picture = picture_of(png(3, *size), "odd")
            assert model.chat("a", images=[picture], max_tokens=1).stats.n_image > 0


def test_decoding_a_picture_does_not_block_others(smol, monkeypatch):
    large, small = picture_of(png(3), "large"), picture_of(png(4), "small")
    is_begun, may_end = threading.Event(), threading.Event()

    def slow(picture: Picture, *most: int, real: Any = Picture.rgb) -> Any:
        if picture is large:
            is_begun.set()
            assert may_end.wait(20)
        return real(picture, *most)

    monkeypatch.setattr(Picture, "rgb", slow)
    with smol.opened() as model:
        threads = [
            threading.Thread(target=model.engine.prompter.count_picture, args=(picture,))
            for picture in (large, small)
        ]
        threads[0].start()
        assert is_begun.wait(20)
        threads[1].start()
        threads[1].join(10)
        is_held = threads[1].is_alive()
        may_end.set()
        for thread in threads:
            thread.join()
    assert not is_held


def test_library_starts_no_programs(smol):
    """Videos would start ffmpeg on a client's data."""
    with smol.opened() as model:
        vision = model.engine.prompter.open_vision()
        assert not vision._mtmd.mtmd_helper_support_video(vision._ctx)


def test_mmproj_path_may_be_invalid_utf8(smol, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mm\xff.gguf"))
    path.write_bytes((smol.path.parent / "mmproj.gguf").read_bytes())
    with smol.opened(mmproj=path) as model:
        assert model.engine.prompter.count_picture(picture_of(png(3), "a")) > 0


def test_threads_keep_their_own_error(smol, tmp_path):
    with smol.opened():  # redirects llama.cpp's log
        logs.forget_errors()
        logs._on_log(4, b"f: a reason", None)
        other = threading.Thread(target=logs.forget_errors)
        other.start()
        other.join()
        assert logs.first_error() == "a reason"
        logs.forget_errors()


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[str, int, int]]:
    """Record the name, width and height of each decoded picture."""
    pictures: list[tuple[str, int, int]] = []

    def noted(picture: Picture, *most: int, real: Any = Picture.rgb) -> Any:
        width, height, pixels = real(picture, *most)
        pictures.append((picture.name, width, height))
        return width, height, pixels

    monkeypatch.setattr(Picture, "rgb", noted)
    return pictures


def test_picture_is_decoded_once_for_tokens_and_rows(smol, decoded):
    images = [picture_of(png(seed), str(seed)) for seed in range(4)]
    with smol.opened() as model:
        for image in images:
            model.engine.prompter.count_picture(image)
        model.chat("a", images=images, max_tokens=1)
        assert [name for name, *_ in decoded] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("size", "decoded_size"),
    [((1000, 500), (512, 256)), ((256, 2000), (256, 2000)), ((100, 90), (100, 90))],
)
def test_picture_is_decoded_at_the_encoders_size(tmp_path, decoded, size, decoded_size):
    """The shorter side becomes twice the encoder's 128 pixels."""
    vision_model = VisionModel("gemma3", make_vision_model(tmp_path, "gemma3"))
    with vision_model.opened() as model:
        model.engine.prompter.count_picture(picture_of(png(3, *size), "a"))
    assert decoded == [("a", *decoded_size)]

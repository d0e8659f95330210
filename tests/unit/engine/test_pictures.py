"""Image files: formats, limits and refusals."""

import random
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from pop_base.errors import PopError
from pop_local.engine.images import pictures
from pop_local.engine.images.pictures import Picture, picture_of, read_picture
from support.mutants import mutated_bytes
from support.vision_models import encoded, png


def test_reads_pictures_of_all_formats():
    image = Image.new("RGB", (40, 30), (200, 100, 50))
    for kind in pictures.FORMATS:
        picture = picture_of(encoded(image, kind), "a")
        assert (picture.width, picture.height) == (40, 30)
        _, _, rgb = picture.rgb()
        middle = rgb[3 * (15 * 40 + 20) :][:3]
        assert np.abs(np.frombuffer(middle, np.uint8).astype(int) - [200, 100, 50]).max() < 9


def test_photographs_are_rotated_and_transparency_is_white():
    image = Image.new("RGB", (40, 30))
    image.paste((255, 0, 0), (0, 0, 40, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    picture = picture_of(encoded(image, "JPEG", exif=exif), "a")
    assert (picture.width, picture.height) == (30, 40)
    pixels = np.frombuffer(picture.rgb()[2], np.uint8).reshape(40, 30, 3)
    assert pixels[20, 28, 0] > 200 and pixels[20, 2, 0] < 50
    for number in (0, 9, 255):  # invalid values
        exif[0x0112] = number
        picture = picture_of(encoded(image, "JPEG", exif=exif), "a")
        assert picture.rgb()[:2] == (picture.width, picture.height) == (40, 30)
    clear = picture_of(encoded(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "PNG"), "a")
    assert set(clear.rgb()[2]) == {255}


def test_scales_16_bit_grayscale():
    ramp = np.linspace(0, 65535, 64 * 16).astype(np.uint16).reshape(16, 64)
    picture = picture_of(encoded(Image.fromarray(ramp), "PNG"), "a")
    grey = np.frombuffer(picture.rgb()[2], np.uint8)[::3].reshape(16, 64)
    np.testing.assert_allclose(grey, ramp / 257, atol=1)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*(("PNG", mode) for mode in ("1", "P", "L", "RGB", "RGBA")), ("JPEG", "L"), ("JPEG", "RGB")],
)
def test_large_images_are_scaled_down_first(kind, mode):
    image = Image.new("L", (160, 120), 0)
    image.paste(255, (0, 0, 160, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = picture_of(encoded(image.convert(mode), kind, exif=exif), "a")
    assert (picture.width, picture.height) == (120, 160)
    width, height, rgb = picture.rgb(1200)
    assert (width, height) == (30, 40)
    pixels = np.frombuffer(rgb, np.uint8).reshape(40, 30, 3)
    assert (pixels[:, 22:] > 200).all() and (pixels[:, :18] < 50).all()


def test_only_headers_are_read(monkeypatch):
    contents = [encoded(Image.new("RGB", (40, 30)), kind) for kind in pictures.FORMATS]
    monkeypatch.setattr(Image.Image, "load", None)
    for content in contents:
        assert picture_of(content, "a").width == 40


def test_rejects_jpeg_with_many_passes(monkeypatch):
    image = Image.effect_noise((64, 64), 80)
    usual = encoded(image, "JPEG", progressive=True)
    last = usual[usual.rindex(b"\xff\xda") : -2]
    monkeypatch.setattr(pictures, "MAX_SCANNED", 64 * 64 * 20)
    picture_of(usual + b"\xff\xda\0" * 1000, "with a film behind it").rgb()
    with pytest.raises(PopError, match="too many passes"):
        picture_of(usual[:-2] + last * 20 + usual[-2:], "a")


def test_rejects_invalid_pictures(tmp_path, monkeypatch):
    for content in (b"", b"no picture", png(3)[:20], b"GIF89a" + bytes(90)):
        with pytest.raises(PopError, match="is not a readable image"):
            picture_of(content, "x.png").rgb()
    with pytest.raises(PopError, match="is not a readable image"):
        picture_of(png(3)[:3000], "x.png").rgb()
    with pytest.raises(PopError, match="is too long and narrow"):
        picture_of(encoded(Image.new("1", (5000, 1)), "PNG"), "x.png")
    bomb = encoded(Image.new("1", (12_000, 12_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(PopError, match="more than 50 million pixels"):
        picture_of(bomb, "x.png")
    with pytest.raises(PopError, match="more than 50 million pixels"):
        picture_of(encoded(Image.new("1", (20_000, 20_000)), "PNG"), "x.png")
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    path = tmp_path / "large.png"
    path.write_bytes(png(3))
    with pytest.raises(PopError, match="is larger than"):
        read_picture(path)


@pytest.mark.parametrize("mode", ["1", "P"])
def test_large_pictures_of_few_colours_are_scaled_smoothly(mode):
    board = np.indices((1_000, 9_000)).sum(0) % 2 * 255
    picture = picture_of(encoded(Image.fromarray(board.astype(np.uint8)).convert(mode), "PNG"), "a")
    width, height, rgb = picture.rgb()
    assert 7_900_000 < width * height <= 8_000_000
    middle = np.frombuffer(rgb, np.uint8).reshape(height, width, 3)[height // 2]
    assert len(np.unique(middle)) > 20


@pytest.mark.parametrize("kind", pictures.FORMATS)
def test_damaged_files_are_decoded_or_rejected(kind):
    rng = random.Random(kind)
    whole = encoded(Image.effect_noise((48, 32), 80).convert("RGB"), kind)
    for _ in range(100):
        content = mutated_bytes(rng, whole, 0, len(whole))
        try:
            picture = picture_of(content, "a")
            width, height, rgb = picture.rgb()
            assert len(rgb) == 3 * width * height
        except PopError:
            continue


def webp(width: int, height: int) -> bytes:
    """Return a file of 32 bytes whose pixels share one colour."""
    channel = (0b101 | 9 << 3, 11)  # one symbol, of 8 bits
    fields = ((width - 1, 14), (height - 1, 14), (0, 7), *[channel] * 4, (1, 4))
    bits = "".join(f"{value:0{n}b}"[::-1] for value, n in fields)[::-1]
    data = b"\x2f" + int(bits, 2).to_bytes(11, "little")
    return b"RIFF\x18\0\0\0WEBPVP8L\x0c\0\0\0" + data


def test_large_webp_is_decoded_in_another_process(monkeypatch):
    picture = picture_of(webp(4000, 3900), "a")
    monkeypatch.setattr(Image.Image, "load", None)
    width, height, rgb = picture.rgb()
    assert 7_900_000 < width * height <= 8_000_000
    assert set(rgb) == {9}


def test_webp_with_oversized_canvas_is_refused():
    with pytest.raises(PopError, match="a WebP, has more than 16 million pixels"):
        picture_of(webp(7000, 7000), "a")


@pytest.mark.parametrize("limit", ["limit_s", "limit_bytes"])
def test_decoding_has_limits(monkeypatch, limit):
    limits = {"limit_s": 20.0, "limit_bytes": 1 << 29} | {limit: 1e-3 if limit == "limit_s" else 1}
    child = pictures.KeptProcess(pictures.PictureDecoder, **limits)
    monkeypatch.setattr(pictures, "_decoder", child)
    with pytest.raises(PopError, match=r"decoding .* exceeds the limit"):
        picture_of(webp(4000, 3900), "a").rgb()
    child.close()


def test_equal_pictures_are_equal(tmp_path):
    picture = picture_of(png(3), "a")
    assert picture == picture_of(png(3), "b")
    assert picture.sha256 == Picture("b", png(3), 1, 1).sha256
    assert Image.open(BytesIO(picture.content)).size == (picture.width, picture.height)

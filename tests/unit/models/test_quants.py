"""Choose among a repository's files."""

import pytest

from pop_base.errors import PopError
from pop_local.models.quants import QuantFile, choose, choose_mmproj

BF16 = ["model-BF16-00001-of-00002.gguf", "model-BF16-00002-of-00002.gguf"]
REPO = (
    "README.md",
    "imatrix.gguf",
    "mmproj-model-f16.gguf",
    *BF16,
    "model-F16.gguf",
    "model-IQ4_XS.gguf",
    "model-Q4_K_M.gguf",
    "model-Q4_K_S.gguf",
    "model-Q8_0.gguf",
    "old/model-Q5_1.gguf",
)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("", ["model-Q4_K_M.gguf"]),
        ("Q4_K_M", ["model-Q4_K_M.gguf"]),
        ("q8_0", ["model-Q8_0.gguf"]),
        ("f16", ["model-F16.gguf"]),
        ("bf16", ["model-BF16-00001-of-00002.gguf", "model-BF16-00002-of-00002.gguf"]),
        (
            "model-BF16-00002-of-00002.gguf",
            ["model-BF16-00001-of-00002.gguf", "model-BF16-00002-of-00002.gguf"],
        ),
        ("MODEL-Q8_0.GGUF", ["model-Q8_0.gguf"]),
        ("model-q5_1", ["old/model-Q5_1.gguf"]),
        ("old/model-Q5_1.gguf", ["old/model-Q5_1.gguf"]),
        ("mmproj-model-f16.gguf", ["mmproj-model-f16.gguf"]),
    ],
)
def test_name_selects_files(name, files):
    assert list(choose("a/b", REPO, name).files) == files


def test_upper_case_suffix_is_part_of_the_same_model():
    parts = ["x-Q8_0-00001-of-00002.GGUF", "x-Q8_0-00002-of-00002.GGUF"]
    assert choose("a/b", parts, "") == QuantFile("x-Q8_0", tuple(parts))
    assert choose("a/b", [*parts, "x-F16.gguf"], parts[1]).files == tuple(parts)


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (["x-Q8_0.gguf", "x-Q5_K_M.gguf", "x-F16.gguf"], "x-Q5_K_M"),
        (["x-Q8_0.gguf", "x-F16.gguf"], "x-Q8_0"),
        (["x-F16.gguf", "x-BF16.gguf"], "x-BF16"),
        (["x-Q2_K.gguf", "x-Q3_K_M.gguf"], "x-Q3_K_M"),
        (["only-one.gguf", "mmproj.gguf"], "only-one"),
        (["x.q4_k_m.GGUF", "x.q8_0.GGUF"], "x.q4_k_m"),
    ],
)
def test_default_file_prefers_q4_k_m(files, name):
    assert choose("a/b", files, "").name == name


@pytest.mark.parametrize(
    ("files", "name", "message", "listed"),
    [
        (REPO, "Q4_K", "matches 2 files", "model-Q4_K_M, model-Q4_K_S"),
        (REPO, "Q6_K", "no file named 'Q6_K'", "model-BF16, model-F16, model-IQ4_XS"),
        (REPO, "mmproj", "no file named", "model-BF16"),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "", "matches 2 files", "a-Q4_K_M, b-Q4_K_M"),
        (["a.gguf", "b.gguf"], "", "multiple models", "hf:a/b:NAME with one of these names: a, b"),
        (["README.md", "model.safetensors"], "", "contains no complete GGUF model", ""),
        (["x-00001-of-00002.gguf"], "", "contains no complete GGUF model", ""),
        ([BF16[0], "model-Q8_0.gguf"], "bf16", "no file named 'bf16'", "model-Q8_0"),
        ([BF16[0], "a.gguf", "b.gguf"], "", "multiple models", "names: a, b"),
    ],
)
def test_ambiguous_names_list_the_choices(files, name, message, listed):
    with pytest.raises(PopError, match=message) as failure:
        choose("a/b", files, name)
    assert listed in failure.value.hint


@pytest.mark.parametrize(
    ("files", "name", "expected"),
    [
        (["x-Q4_K_M-00001-of-00002.gguf", "x-Q8_0.gguf", "x-F16.gguf"], "", "x-Q8_0"),
        (["x-Q4_K_M-00001-of-00002.gguf", "x-F16.gguf"], "", "x-F16"),
        (["Q4_K_M-00001-of-00002.gguf", "x-Q4_K_M.gguf", "x-F16.gguf"], "", "x-Q4_K_M"),
        (["x-Q4_K_M-00001-of-00002.gguf", "x-F16.gguf", "x-Q8_0.gguf"], "F16", "x-F16"),
        (["x-Q8_0-00001-of-00002.gguf", "x-Q8_0.gguf", "x-F16.gguf"], "q8_0", "x-Q8_0"),
    ],
)
def test_incomplete_split_model_does_not_hide_others(files, name, expected):
    assert choose("a/b", files, name) == QuantFile(expected, (f"{expected}.gguf",))


def test_long_list_is_shortened():
    files = [f"model-{number:03}.gguf" for number in range(100)]
    with pytest.raises(PopError) as failure:
        choose("a/b", files, "")
    assert failure.value.hint.endswith("and 60 more")


@pytest.mark.parametrize(
    ("mmprojs", "model", "expected"),
    [
        ([], "x-7B-Q4_K_M.gguf", None),
        (["mmproj-F16.gguf", "mmproj-BF16.gguf", "mmproj.gguf"], "x-Q8_0.gguf", "mmproj-F16.gguf"),
        (
            ["mmproj-x-2B-Q8_0.gguf", "mmproj-x-7B-f16.gguf"],
            "x-7B-Q8_0.gguf",
            "mmproj-x-7B-f16.gguf",
        ),
        (["mmproj-Q8_0.gguf", "7B/mmproj-F32.gguf"], "7B/x-Q4_K_M.gguf", "7B/mmproj-F32.gguf"),
    ],
)
def test_model_selects_mmproj(mmprojs, model, expected):
    assert choose_mmproj([*mmprojs, model, "README.md"], model) == expected

"""Test `pop-local convert`: the plan, the output, split models, the command."""

import hashlib
import json
import shutil
from pathlib import Path

import gguf
import pytest
from typer.testing import CliRunner

from pop_base.errors import FormatError, PlanError, UnsupportedArchitectureError
from pop_converter.gguf import content
from pop_converter.gguf.header import read_header
from pop_converter.popfile.format import PopMeta
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import convert, measure
from pop_local.cli import app
from support.converted import convert_default, names
from support.oracle import assert_same_logits
from support.shapes import read_pop_meta, read_shape
from support.synthetic import DEFAULTS, make_gguf, make_split, renamed


def command(*arguments: object):
    """Run `convert` with own projections at a named boundary."""
    depth = () if "--boundary" in arguments else ("--boundary", 5)
    options = ["--projection", "own", *map(str, (*depth, *arguments))]
    return CliRunner().invoke(app, ["convert", *options])


# --- the plan


@pytest.mark.parametrize(("n_layer", "boundary"), [(30, 20), (18, 12), (8, 5), (2, 1)])
def test_skips_a_third_of_the_layers_by_default(tiny, n_layer, boundary):
    plan = make_plan(read_shape(make_gguf(tiny, "llama", n_layer=n_layer, n_embd=64, n_ff=64)))
    assert plan.schedule == "F" * boundary + "S" * (n_layer - boundary)


@pytest.mark.parametrize("boundary", [0, 8])
def test_rejects_boundary_without_full_or_skipped_layers(tiny, boundary):
    with pytest.raises(
        PlanError, match=f"boundary {boundary} is invalid for a model with 8 layers"
    ):
        make_plan(read_shape(tiny), boundary=boundary)


def test_rejects_plan_for_another_model(tiny, tmp_path):
    other = make_gguf(tmp_path / "other.gguf", "llama", n_layer=6)
    with pytest.raises(PlanError, match="a model other than"):
        convert(make_plan(read_shape(other)), tiny, tmp_path / "out.gguf")


# --- output


@pytest.mark.parametrize("arch", sorted(DEFAULTS))
def test_adds_only_keys(tmp_path, arch):
    src = make_gguf(tmp_path / "model.gguf", arch)
    dst = tmp_path / "out.gguf"
    plan = make_plan(read_shape(src), boundary=5, sink_tokens=2, tail_tokens=9, min_prompt=50)
    meta = convert(plan, src, dst)
    assert read_pop_meta(dst) == meta
    assert meta == PopMeta(
        "FFFFFSSS",
        sink_tokens=2,
        tail_tokens=9,
        min_prompt=50,
        source_name="model.gguf",
        source_sha256=hashlib.sha256(src.read_bytes()).hexdigest(),
        tool=meta.tool,
    )
    assert meta.tool.startswith("pop-local")
    assert dst.stat().st_size == measure(plan, src).output_bytes
    before, after = gguf.GGUFReader(src), gguf.GGUFReader(dst)
    added = [name for name in after.fields if name not in before.fields]
    assert added
    assert all(name.startswith("pop.") for name in added)
    for name, field in before.fields.items():
        if name != "GGUF.kv_count":
            assert field.contents() == after.fields[name].contents(), name
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (old.name, old.tensor_type) == (new.name, new.tensor_type)
        assert old.data.tobytes() == new.data.tobytes()


@pytest.mark.parametrize("arch", sorted(DEFAULTS))
def test_unpatched_library_computes_the_same_logits(tmp_path, arch, unpatched_lib):
    src = make_gguf(tmp_path / "model.gguf", arch)
    dst = tmp_path / "out.gguf"
    convert_default(src, dst)
    assert_same_logits(src, dst, unpatched_lib)


def test_progress_increases_to_its_total(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(content, "CHUNK_BYTES", 50_000)
    seen: list[tuple[int, int]] = []
    convert_default(tiny, tmp_path / "out.gguf", progress=lambda *both: seen.append(both))
    done = [pair[0] for pair in seen]
    assert len(done) > 20
    assert done == sorted(set(done))
    assert {total for _, total in seen} == {done[-1]}


def test_small_chunks_do_not_change_output(tiny, tmp_path, monkeypatch):
    convert_default(tiny, tmp_path / "one.gguf")
    monkeypatch.setattr(content, "CHUNK_BYTES", 1013)
    convert_default(tiny, tmp_path / "other.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()


# --- split models


@pytest.mark.parametrize("empty_first", [False, True])
def test_split_model_becomes_one_file(tmp_path, unpatched_lib, empty_first):
    whole = make_gguf(tmp_path / "whole.gguf", "qwen2")
    parts = make_split(tmp_path / "model.gguf", "qwen2", max_tensors=30, empty_first=empty_first)
    assert len(parts) > 2
    dst = tmp_path / "out.gguf"
    meta = convert_default(parts[0], dst)
    assert meta.source_name == "model.gguf"
    reader = gguf.GGUFReader(dst)
    assert not any(name.startswith("split.") for name in reader.fields)
    for old, new in zip(gguf.GGUFReader(whole).tensors, reader.tensors, strict=True):
        assert old.name == new.name
        assert old.data.tobytes() == new.data.tobytes()
    assert_same_logits(whole, dst, unpatched_lib)


@pytest.mark.parametrize("empty_first", [False, True])
def test_split_model_is_fitted(tmp_path, letters, empty_first):
    whole = make_gguf(tmp_path / "whole.gguf", "qwen2")
    parts = make_split(tmp_path / "model.gguf", "qwen2", max_tensors=30, empty_first=empty_first)
    few = ("--text", str(letters), "--tokens", "2048", "--threads", "1", "--force")
    done = command(str(parts[0]), "--boundary", 4, "--projection", "fitted", *few)
    assert done.exit_code == 0, done.stderr
    dst = tmp_path / "model.pop.gguf"
    added = [tensor.name for tensor in read_header(dst).tensors if "pop_" in tensor.name]
    assert added
    copied = [tensor for tensor in gguf.GGUFReader(dst).tensors if tensor.name not in added]
    for old, new in zip(gguf.GGUFReader(whole).tensors, copied, strict=True):
        assert (old.name, old.data.tobytes()) == (new.name, new.data.tobytes())


def test_default_output_name_omits_part_number(tmp_path):
    parts = make_split(tmp_path / "model.gguf", "llama", max_tensors=40)
    assert command(parts[0]).exit_code == 0
    assert (tmp_path / "model.pop.gguf").is_file()


def test_rejects_wrong_parts(tmp_path):
    (tmp_path / "other").mkdir()
    parts = make_split(tmp_path / "model.gguf", "llama", max_tensors=30)
    others = make_split(tmp_path / "other" / "model.gguf", "qwen2", max_tensors=35)
    assert len(parts) == len(others)
    with pytest.raises(FormatError, match="not the first part") as raised:
        read_shape(parts[1])
    assert str(parts[0]) in raised.value.hint
    renamed = Path(shutil.copy(parts[0], tmp_path / "renamed.gguf"))
    with pytest.raises(FormatError, match="its name is not in the required format"):
        read_shape(renamed)
    content = parts[1].read_bytes()
    shutil.copy(others[1], parts[1])
    with pytest.raises(FormatError, match="parts belong to different models"):
        read_shape(parts[0])
    parts[1].write_bytes(content)
    shutil.copy(parts[1], parts[2])
    with pytest.raises(FormatError, match="is not part 3"):
        read_shape(parts[0])
    for part in parts[1:]:
        part.unlink()
    with pytest.raises(FormatError) as raised:
        read_shape(parts[0])
    assert all(part.name in raised.value.message for part in parts[1:])


# --- the command


def test_prints_plan_and_writes_next_to_model(tiny, tmp_path):
    done = command(tiny, "--boundary", 6)
    assert done.exit_code == 0
    assert "FFFFFFSS" in done.stdout
    assert "tiny.pop.gguf" in done.stdout
    meta = read_pop_meta(tmp_path / "tiny.pop.gguf")
    assert meta is not None
    assert meta.boundary == 6


def test_dry_run_rejects_invalid_outputs(tiny, tmp_path):
    for target, reason in ((tiny, "input file"), (tmp_path / "no" / "out.gguf", "not exist")):
        refused = command(str(tiny), str(target), "--dry-run")
        assert refused.exit_code == 1
        assert reason in " ".join(refused.stderr.split())


def test_dry_run_prints_plan_without_writing(tiny, tmp_path):
    report = json.loads(command(tiny, "--boundary", 3, "--dry-run", "--json").stdout)
    assert names(tmp_path) == {"tiny.gguf"}
    assert (report["budget"], report["seconds"]) == (None, None)
    written = json.loads(command(tiny, "--boundary", 3, "--json").stdout)
    assert written["source_sha256"] == hashlib.sha256(tiny.read_bytes()).hexdigest()
    [plan] = report["plans"]
    planned = {name: report[name] for name in report.keys() & written.keys()} | plan
    assert planned == {name: written[name] for name in planned}
    assert planned["schedule"] == "FFFSSSSS"
    assert planned["n_skipped"] == 5
    assert planned["tail_tokens"] == 32
    assert planned["source_bytes"] == tiny.stat().st_size
    written_bytes = (tmp_path / "tiny.pop.gguf").stat().st_size
    assert planned["output_bytes"] <= written_bytes < planned["output_bytes"] + 1024
    assert 1 < planned["speedup_limit"] < 8 / 3


@pytest.mark.parametrize(
    "options",
    [
        ("--boundary", "x"),
        ("--skip", "1/3"),
        ("--tokens", "0"),
        ("--projection", "own", "--distill"),
    ],
)
def test_wrong_usage_exits_with_two(tiny, tmp_path, options):
    assert command(tiny, *options).exit_code == 2
    assert names(tmp_path) == {"tiny.gguf"}


def test_failures_print_two_lines_and_exit_with_one(tmp_path):
    src = renamed(make_gguf(tmp_path / "model.gguf", "llama"), tmp_path, "bert")
    failed = command(src)
    assert failed.exit_code == 1
    assert "bert" in failed.stderr
    assert "use a decoder" in failed.stderr
    assert len(failed.stderr.splitlines()) == 2
    assert not failed.stdout
    with pytest.raises(UnsupportedArchitectureError):
        read_shape(src)

"""Test the choice between pop-local's and llama.cpp's kernels."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from pop_local.engine.llama import backend, devices, kernel_choice
from pop_local.engine.llama.devices import Device, has_kernels
from support.calls import opened, prompt, read
from support.converted import tiny

needs_kernels = pytest.mark.skipif(not has_kernels(), reason="no kernels for this processor")
ROWS = ("many", "few")


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """Return the only file of timings, which does not exist yet."""
    path = tmp_path / "cache" / "kernels.txt"
    monkeypatch.setattr(kernel_choice, "timings_file", lambda n_threads: path)
    monkeypatch.delenv(kernel_choice.VARIABLE, raising=False)
    return path


@pytest.fixture
def chosen(file):
    """Return a function that returns the choice for fixed timings."""
    file.parent.mkdir()

    def choose(*lines: str) -> str:
        file.write_text("".join(f"{each}\n" for each in lines))
        return kernel_choice.measured("", 1)[0]

    return choose


@pytest.mark.parametrize(
    ("theirs", "choice"),
    [
        ("94 94 94", "Q4_K/few"),
        ("96 96 96", ""),
        ("94 94 900", "Q4_K/few"),  # a round that another process delayed
        ("94 900 900", ""),
        ("", ""),
    ],
)
def test_llama_cpps_kernels_must_be_clearly_faster(chosen, theirs, choice):
    assert chosen("Q4_K/few ours 100 101 100", f"Q4_K/few llama.cpp {theirs}") == choice


def test_delayed_rounds_of_ours_are_no_evidence(chosen):
    assert chosen("Q4_K/few ours 900 900 100", "Q4_K/few llama.cpp 100 100 100") == ""


def test_each_kind_is_decided_separately(chosen):
    lines = [
        *("attention/many ours 10 10", "attention/many llama.cpp 5 5"),
        *("attention/few ours 10 10", "attention/few llama.cpp 20 20"),
        *("Q8_0/many ours 10 10", "Q8_0/many llama.cpp 20 20"),
        *("Q8_0/few llama.cpp 5 5", "Q8_0/few ours 10 10", "F32/many -"),
    ]
    assert chosen(*lines) == "Q8_0/few attention/many"


@pytest.mark.parametrize(
    "line", ["", "/", "Q4_K", "Q4_K/many", "Q4_K/many ours x", "\x01 \x02 \x03"]
)
def test_damaged_lines_choose_nothing(chosen, line):
    assert chosen(line, line) == ""


def forms_of(file: Path) -> dict[str, set[str]]:
    """Return the forms that have times, by kind."""
    found: dict[str, set[str]] = {}
    for line in file.read_text().splitlines():
        kind, form, *times = line.split()
        assert len(times) >= 9 or form == "-"
        found.setdefault(kind, set()).add(form)
    return found


@needs_kernels
def test_each_form_is_timed(file):
    summary = kernel_choice.measured(kernel_choice.ALL, 1)
    forms = forms_of(file)
    for rows in ROWS:
        assert forms[f"attention/{rows}"] == {"ours", "llama.cpp"}
        assert forms[f"Q4_0/{rows}"] == {"ours", "llama.cpp"}
        # Our kernels for floats serve equal results, not speed.
        assert forms[f"F16/{rows}"] == {"-"}
    timed = sorted(kind for kind, found in forms.items() if found != {"-"})
    assert [line.partition(": ")[0] for line in summary[1:]] == timed
    assert all("times the fastest)" in line for line in summary[1:])


@needs_kernels
def test_unknown_kinds_are_ignored(file):
    """Type 4 was removed from ggml."""
    assert kernel_choice.measured("4 999 1", 1) == [""]
    assert forms_of(file) == {"F16/many": {"-"}, "F16/few": {"-"}}


THEIRS = "".join(
    f"{name}/{rows} ours 10 10\n{name}/{rows} llama.cpp 5 5\n"
    for name in ("attention", "Q8_0")
    for rows in ROWS
)
CHOICE = "Q8_0/few Q8_0/many attention/few attention/many"


@needs_kernels
def test_only_missing_kinds_are_measured(file):
    file.parent.mkdir()
    file.write_text(THEIRS)
    assert kernel_choice.measured("attention 8", 1)[0] == CHOICE
    assert file.read_text() == THEIRS
    assert kernel_choice.measured("attention 8 1", 1)[0] == CHOICE
    assert file.read_text() == f"{THEIRS}F16/many -\nF16/few -\n"


def test_a_variable_switches_measuring_off(file, monkeypatch):
    file.parent.mkdir()
    file.write_text(THEIRS)
    for value in ("0", "", "avx2"):
        monkeypatch.setenv(kernel_choice.VARIABLE, value)
        assert kernel_choice.measured("8", 1) == [""]
        assert kernel_choice.stored_choice(1) == ""
    assert file.read_text() == THEIRS


def test_models_use_only_stored_timings(file, tmp_path):
    opened(tiny(tmp_path), n_gpu_layers=0).close()
    assert not file.exists()
    file.parent.mkdir()
    file.write_text(THEIRS)
    assert kernel_choice.stored_choice(1) == CHOICE


def test_without_a_cache_folder_nothing_is_stored(monkeypatch, tmp_path):
    """Use a file as the folder, because root may write to read-only folders."""
    (tmp_path / "file").write_text("some text")
    path = tmp_path / "file" / "kernels.txt"
    monkeypatch.setattr(kernel_choice, "timings_file", lambda n_threads: path)
    monkeypatch.delenv(kernel_choice.VARIABLE, raising=False)
    kernel_choice.measured("1", 1)
    assert kernel_choice.stored_choice(1) == ""
    assert (tmp_path / "file").read_text() == "some text"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00\n",
        b"\xff/few ours 9\n\xff/few llama.cpp 1\n",
        b"Q8_0/few",
        b"Q8_0/few ours 1",
        b"{}",
    ],
)
def test_a_damaged_file_is_completed(file, content):
    file.parent.mkdir()
    file.write_bytes(content)
    kernel_choice.measured("1", 1)
    lines = file.read_bytes().removeprefix(content).decode().split("\n")
    assert {"F16/many -", "F16/few -"} <= {*lines}
    [found] = file.parent.iterdir()
    assert found == file


def test_each_processor_build_and_number_of_cores_has_a_file(monkeypatch, tmp_path):
    def timed() -> Path:
        return kernel_choice.timings_file(4)

    monkeypatch.setattr(kernel_choice.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    first = timed()
    assert first == timed()
    assert first.parent == tmp_path / "pop-local"
    found = {first, kernel_choice.timings_file(3)}
    with monkeypatch.context() as patch:
        patch.setattr(devices, "devices", lambda: (Device("CPU", "Another CPU", False, 1, 1),))
        found.add(timed())
    with monkeypatch.context() as patch:
        patch.setattr(devices, "cpu_kernels", lambda: "another")
        found.add(timed())
    library = tmp_path / "library"
    library.touch()
    with monkeypatch.context() as patch:
        patch.setattr(backend.bindings()._lib, "_name", str(library))
        found.add(timed())
    if hasattr(os, "sched_getaffinity"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "sched_getaffinity", lambda pid: {*range(99)})
            found.add(timed())
        assert len(found) == 6
    assert timed() == first


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="sets Linux's cache folder")
def test_two_processes_can_measure_at_once(tmp_path):
    code = (
        "from pop_local.engine.llama import kernel_choice as found;"
        "print(found.measured('attention 8', 1)[:1])"
    )
    env = {name: value for name, value in os.environ.items() if name != kernel_choice.VARIABLE}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(2)]
    assert all(each.communicate()[0].startswith(b"['") for each in running)
    assert [each.returncode for each in running] == [0, 0]
    [path] = (tmp_path / "pop-local").iterdir()
    assert {*forms_of(path)} == {
        f"{name}/{rows}" for name in ("attention", "Q8_0") for rows in ROWS
    }


@pytest.fixture
def q4_0(tmp_path) -> Path:
    return tiny(tmp_path, type=Type.Q4_0)


def with_choice(path: Path, given: str, monkeypatch, **options) -> np.ndarray:
    monkeypatch.setattr(kernel_choice, "stored_choice", lambda n_threads: given)
    return read(opened(path, n_gpu_layers=0, **options), prompt(60))


@needs_kernels
def test_a_choice_applies_to_its_model_only(q4_0, monkeypatch):
    ours, theirs = (with_choice(q4_0, given, monkeypatch) for given in ("", "Q4_0/many"))
    assert not np.array_equal(ours, theirs)
    # The rows of a prompt are not decoded.
    np.testing.assert_array_equal(ours, with_choice(q4_0, "Q4_0/few attention/few", monkeypatch))
    np.testing.assert_array_equal(theirs, with_choice(q4_0, "Q4_0/many", monkeypatch))
    np.testing.assert_array_equal(ours, with_choice(q4_0, "", monkeypatch))


def test_choices_are_registered_once():
    given = ("Q4_0/many", "Q4_0/few", "Q4_0/many", "")
    some = [backend.choose_kernels(each) for each in given]
    assert some[0] == some[2] != some[1]
    assert some[3] == 1


def test_an_earlier_build_uses_our_kernels(monkeypatch):
    """A library without the new functions has the same ABI version."""
    monkeypatch.setattr(backend, "require_patched", object)
    assert backend.choose_kernels("Q4_0/many") == 1
    monkeypatch.delenv(kernel_choice.VARIABLE, raising=False)
    monkeypatch.setattr(devices, "call_cpu", lambda name, *values: "")
    assert kernel_choice.stored_choice(1) == ""

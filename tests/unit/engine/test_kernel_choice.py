"""Test the choice between pop-local's and llama.cpp's kernels."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from pop_converter.gguf.source import read_source
from pop_local.engine.llama import backend, devices, kernel_choice
from pop_local.engine.llama.devices import Device, has_kernels
from support.calls import opened, prompt, read
from support.converted import tiny
from support.kernels import QUANTISED

needs_kernels = pytest.mark.skipif(not has_kernels(), reason="no kernels for this processor")
ROWS = ("many", "few")
Times = float | list[float]


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """Return the path of the timings file, which does not exist yet."""
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
        kernel_choice._measured.cache_clear()
        return kernel_choice.measured("", 1)[0]

    return choose


def lines_of(kind: str, ours: Times, theirs: Times) -> list[str]:
    """Return a kind's lines. A single time applies to all rounds of both batches."""
    lists = [[each] * 18 if isinstance(each, float | int) else each for each in (ours, theirs)]
    forms = zip(("ours", "llama.cpp"), lists, strict=True)
    return [" ".join([kind, form, *map(str, times)]) for form, times in forms]


def some(n: int, time: float, others: float = 94) -> list[float]:
    """Return a batch's times: n times are `time`, and the rest are `others`."""
    return [time] * n + [others] * (9 - n)


@pytest.mark.parametrize(
    ("ours", "theirs", "choice"),
    [
        (100, 94, "Q4_K/few"),
        (100, 96, ""),
        (94, 100, ""),
        (100, some(1, 900) + some(1, 900), "Q4_K/few"),  # rounds that other processes delayed
        (100, some(2, 900) + some(0, 0), ""),
        (100, some(0, 0) + some(2, 900), ""),
        (100, some(9, 96) + some(0, 0), ""),  # in one batch only
        (100, some(0, 0) + some(9, 96), ""),
        (some(1, 90, 100) + some(0, 0, 100), 94, ""),  # ours can be as fast
        (some(5, 130, 100) + some(0, 0, 100), 94, ""),  # the machine was busy
        (100, some(4, 94, 60) + some(0, 0), "Q4_K/few"),
        (100, some(5, 94, 60) + some(0, 0), ""),
        (100, [94] * 17, ""),
        (100, [94] * 19, ""),
        (100, [], ""),
    ],
)
def test_llama_cpps_kernels_must_be_clearly_faster(chosen, ours, theirs, choice):
    assert chosen(*lines_of("Q4_K/few", ours, theirs)) == choice


def test_each_kind_is_decided_separately(chosen):
    lines = [
        *lines_of("attention/many", 10, 5),
        *lines_of("attention/few", 10, 20),
        *lines_of("Q8_0/many", 10, 20),
        *reversed(lines_of("Q8_0/few", 10, 5)),
        "F32/many -",
    ]
    assert chosen(*lines) == "Q8_0/few attention/many"


def test_the_last_lines_of_a_kind_count(chosen):
    """Another process may have measured the same kind."""
    some, others = lines_of("Q8_0/few", 10, 5), lines_of("Q8_0/few", 5, 10)
    assert chosen(*others, *some) == "Q8_0/few"
    assert chosen(*some, *others) == ""


class Busy:
    """A simulated processor that other processes use for milliseconds at a time."""

    def __init__(self, rng: np.random.Generator, shares: bool) -> None:
        self._rng, self._shares = rng, shares
        self._left_ms, self._slowdown = 0.0, 1.0

    def run_ms(self, work_ms: float) -> float:
        """Return a run's duration."""
        took = 0.0
        while work_ms > 0:
            if self._left_ms <= 0:
                self._change()
                took += 0 if self._shares else self._rng.uniform(2, 10)  # another process runs
            step = min(self._left_ms, work_ms * self._slowdown)
            took += step
            work_ms -= step / self._slowdown
            self._left_ms -= step
        return took

    def _change(self) -> None:
        if self._shares:  # a core with another hardware thread, or the bus
            self._left_ms = self._rng.exponential(5)
            self._slowdown = float(self._rng.choice([1, 1.3, 1.8]))
        else:
            self._left_ms = self._rng.uniform(1, 4)

    def rounds(self, ratio: float) -> tuple[list[float], list[float]]:
        """Return both forms' times in two batches. `ratio`: llama.cpp's time relative to ours."""
        ours_ms, ours, theirs = self._rng.uniform(0.3, 3), list[float](), list[float]()
        for i in range(18):
            for form in (ours, theirs) if i % 2 else (theirs, ours):
                form.append(1000 * self.run_ms(ours_ms * (ratio if form is theirs else 1)))
        return ours, theirs


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 1.1])
def test_busy_processors_do_not_lead_to_slower_kernels(chosen, shares, ratio):
    """Without the second batch, the rule would choose slower kernels on the shared core."""
    rng = np.random.default_rng(0)
    names = [f"{type_.name}/{rows}" for type_ in QUANTISED for rows in ROWS]
    n_chosen = 0
    for _ in range(-(-2400 // len(names))):
        lines = (lines_of(name, *Busy(rng, shares).rounds(ratio)) for name in names)
        n_chosen += len(chosen(*(line for each in lines for line in each)).split())
    assert n_chosen == 0


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
        assert len(times) == {"-": 0, "tried": 1}.get(form, 18)
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
    assert kernel_choice.measured("4 999 -7 1", 1) == [""]
    assert file.read_text() == "F16/few -\n"


THEIRS = "".join(
    f"{line}\n" for name in ("attention", "Q8_0") for line in lines_of(f"{name}/few", 10, 5)
)
CHOICE = "Q8_0/few attention/few"


@needs_kernels
def test_only_missing_kinds_are_measured(file):
    file.parent.mkdir()
    file.write_text(THEIRS)
    assert kernel_choice.measured("attention 8", 1)[0] == CHOICE
    assert file.read_text() == THEIRS
    assert kernel_choice.measured("attention 8 1", 1)[0] == CHOICE
    assert file.read_text() == f"{THEIRS}F16/few -\n"


@needs_kernels
@pytest.mark.parametrize(
    ("ours", "theirs", "is_decided"),
    [
        (100, 94, True),
        (100, 96, True),
        (some(4, 900, 100) + some(4, 900, 100), 200, True),  # still faster
        (100, some(2, 900) + some(2, 900), False),
        (100, some(0, 0) + some(9, 100), False),
        (some(5, 130, 100) + some(5, 130, 100), 94, False),
        (100, [100] * 17, False),
    ],
)
def test_undecided_timings_are_measured_again(file, ours, theirs, is_decided):
    file.parent.mkdir()
    file.write_text("".join(f"{each}\n" for each in lines_of("Q8_0/few", ours, theirs)))
    kernel_choice.measured("8", 1)
    assert file.read_text().count("tried") == (not is_decided)


@needs_kernels
@pytest.mark.parametrize(
    ("ages_s", "is_measured"),
    [
        ([], True),
        ([660], True),
        ([540], False),
        ([10_000, 540], False),
        ([10_000, 660], True),
        ([30_000, 20_000, 10_000], False),
        ([-10_000], True),  # the clock was set back
    ],
)
def test_attempts_are_few_and_far_between(file, ages_s, is_measured):
    file.parent.mkdir()
    before = "".join(f"Q8_0/few tried {time.time() - each:.0f}\n" for each in ages_s)
    file.write_text(before)
    kernel_choice.measured("8", 1)
    assert file.read_text().startswith(before)
    assert file.read_text().count("tried") == len(ages_s) + is_measured
    if not is_measured:
        assert file.read_text() == before


@needs_kernels
def test_measuring_ends_at_its_deadline(file):
    """Without the limit of one second, these 400 kinds would take 20 s."""
    started_s = time.monotonic()
    kernel_choice.measured("8 " * 400, 1)
    assert time.monotonic() - started_s < 5
    assert forms_of(file) == {"Q8_0/few": {"tried"}}


def test_a_variable_switches_measuring_off(monkeypatch):
    monkeypatch.setattr(kernel_choice, "_measured", lambda *_: pytest.fail("measured"))
    for value in ("0", "", "avx2"):
        monkeypatch.setenv(kernel_choice.VARIABLE, value)
        assert kernel_choice.timings_file(1) is None
        assert kernel_choice.measured("8", 1) == [""]


@needs_kernels
def test_the_first_opening_measures(file, tmp_path):
    """Kinds with many rows are left out: their choice would make results depend on batches."""
    path = tiny(tmp_path, type=Type.Q4_0)
    opened(path, n_gpu_layers=0).close()
    measured = file.read_text()
    assert {"Q4_0/few", "attention/few"} <= forms_of(file).keys()
    assert not [kind for kind in forms_of(file) if kind.endswith("/many")]
    opened(path, n_gpu_layers=0).close()
    kernel_choice._measured.cache_clear()
    opened(path, n_gpu_layers=0).close()
    assert file.read_text() == measured


@needs_kernels
def test_the_most_frequent_types_are_measured_first(file, tmp_path, monkeypatch):
    asked = []

    def call_cpu(name: str, n_threads: object, kinds: ctypes.c_char_p, path: object) -> str:
        asked.append(kinds.value)
        return ""

    monkeypatch.setattr(devices, "call_cpu", call_cpu)
    source = read_source(tiny(tmp_path, type=Type.Q4_0))
    for flash_attn in (True, False):
        kernel_choice.choice_for(source, 1, flash_attn=flash_attn)
    assert asked == [b"2 0 attention", b"2 0"]


@needs_kernels
def test_the_choice_does_not_change_within_a_process(file, tmp_path):
    source = read_source(tiny(tmp_path, type=Type.Q8_0))
    file.parent.mkdir()
    file.write_text(THEIRS)
    assert kernel_choice.choice_for(source, 1, flash_attn=True) == CHOICE
    file.write_text("")
    assert kernel_choice.choice_for(source, 1, flash_attn=True) == CHOICE
    kernel_choice._measured.cache_clear()
    assert kernel_choice.choice_for(source, 1, flash_attn=True) == ""


@needs_kernels
def test_without_a_cache_folder_nothing_is_measured(monkeypatch, tmp_path):
    """Use a file as the folder, because root may write to read-only folders."""
    (tmp_path / "file").write_text("some text")
    path = tmp_path / "file" / "kernels.txt"
    monkeypatch.setattr(kernel_choice, "timings_file", lambda n_threads: path)
    started_s = time.process_time()
    assert kernel_choice.measured("1 8 attention", 1) == [""]
    assert time.process_time() - started_s < 0.02, "a measurement takes at least 0.02 s"
    assert (tmp_path / "file").read_text() == "some text"


def test_without_the_librarys_properties_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.delenv(kernel_choice.VARIABLE, raising=False)
    monkeypatch.setattr(backend.bindings()._lib, "_name", str(tmp_path / "missing"))
    assert kernel_choice.timings_file(1) is None
    assert kernel_choice.measured("8", 1) == [""]


@needs_kernels
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00\n",
        b"\xff/few ours 9\n\xff/few llama.cpp 1\n",
        b"Q8_0/few",
        b"Q8_0/few ours 1",
        b"F16/few tried",
        b"{}",
    ],
)
def test_a_damaged_file_is_completed(file, content):
    file.parent.mkdir()
    file.write_bytes(content)
    kernel_choice.measured("1", 1)
    lines = file.read_bytes().removeprefix(content).decode().split("\n")
    assert "F16/few -" in lines
    [found] = file.parent.iterdir()
    assert found == file


def test_each_processor_build_and_number_of_cores_has_a_file(monkeypatch, tmp_path):
    def timed() -> Path | None:
        return kernel_choice.timings_file(4)

    monkeypatch.setattr(kernel_choice.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.delenv(kernel_choice.VARIABLE, raising=False)
    first = timed()
    assert first == timed()
    assert first is not None and first.parent == tmp_path / "pop-local"
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
        (tmp_path / "libggml-cpu-zen4.so").touch()
        found.add(timed())
        (tmp_path / "libggml-cpu-zen4.so").write_text("another")
        found.add(timed())
    if hasattr(os, "sched_getaffinity"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "sched_getaffinity", lambda pid: {*range(99)})
            found.add(timed())
        assert len(found) == 8
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
    assert {*forms_of(path)} == {"attention/few", "Q8_0/few"}


@pytest.fixture
def q4_0(tmp_path) -> Path:
    return tiny(tmp_path, type=Type.Q4_0)


def with_choice(path: Path, given: str, monkeypatch, **options) -> np.ndarray:
    monkeypatch.setattr(kernel_choice, "choice_for", lambda *_, **__: given)
    return read(opened(path, n_gpu_layers=0, **options), prompt(60))


@needs_kernels
def test_a_choice_applies_to_its_model_only(q4_0, monkeypatch):
    ours, theirs = (with_choice(q4_0, given, monkeypatch) for given in ("", "Q4_0/many"))
    assert not np.array_equal(ours, theirs)
    # The rows of a prompt are not decoded.
    np.testing.assert_array_equal(ours, with_choice(q4_0, "Q4_0/few attention/few", monkeypatch))
    np.testing.assert_array_equal(theirs, with_choice(q4_0, "Q4_0/many", monkeypatch))
    np.testing.assert_array_equal(ours, with_choice(q4_0, "", monkeypatch))


@needs_kernels
def test_a_choice_can_limit_our_kernels_to_named_operations(q4_0, monkeypatch):
    """On ARM64, llama.cpp's kernels compute everything else."""
    none = with_choice(q4_0, "only", monkeypatch)
    off = read(opened(q4_0, kernels=False, repack=False, flash_attn=True), prompt(60))
    np.testing.assert_array_equal(none, off)
    np.testing.assert_array_equal(none, with_choice(q4_0, "only Q4_0/few", monkeypatch))
    one = with_choice(q4_0, "only Q4_0/many", monkeypatch)
    both = with_choice(q4_0, "only Q4_0/many attention/many", monkeypatch)
    assert len({each.tobytes() for each in (none, one, both)}) == 3


def test_choices_are_registered_once():
    given = ("Q4_0/many", "Q4_0/few", "Q4_0/many", "")
    some = [backend.choose_kernels(each) for each in given]
    assert some[0] == some[2] != some[1]
    assert some[3] == 1

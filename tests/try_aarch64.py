"""Run wheels for Linux on ARM in qemu, and compare them with this machine.

    python tests/try_aarch64.py WHEELS FOLDER [MODEL.gguf]

The program needs Debian 13 and its package qemu-user, but no root. FOLDER keeps an ARM Python from
Debian's packages and the installed wheels between runs. WHEELS contains the wheels of pop-local and
of the backend for ARM; all other wheels come from pip's index. Both machines convert a tiny model,
whose tensors must be equal, and read a pruned prompt, whose logits may differ by noise. With MODEL,
a model of the catalog, try_installers.py runs with uv in a container of ARM programs, for which
Linux 6.7 or newer must permit user namespaces. The exit status is 1 if a step fails. pytest does
not run this file.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# With qemu's default processor, NumPy's OpenBLAS multiplies matrices to NaN.
QEMU = ("qemu-aarch64", "-cpu", "neoverse-n1")
PACKAGES = ("python3.13", "libstdc++6", "libgomp1", "ca-certificates")
PYTHON = "3.13"
PLATFORMS = ("manylinux2014_aarch64", *(f"manylinux_2_{n}_aarch64" for n in (17, 27, 28, 31, 38)))
# Linux starts each ARM program of the container with qemu, which it opens before chroot (flag F).
ARM_MAGIC = r"\x7fELF\x02\x01\x01" + r"\x00" * 9 + r"\x02\x00\xb7\x00"
ARM_MASK = r"\xff" * 7 + r"\x00" + r"\xff" * 8 + r"\xfe\xff\xff\xff"
ENTER = """
set -eu
root=$1 rule=$2
shift 2
mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
printf %s "$rule" > /proc/sys/fs/binfmt_misc/register
mkdir -p "$root/proc" "$root/dev" "$root/tmp"
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
while [ "$1" != -- ]; do
    mkdir -p "$root/$2"
    mount --bind -o ro "$1" "$root/$2"
    shift 2
done
shift
chroot=$(command -v chroot)
PATH=/uv
exec "$chroot" "$root" "$@"
"""
# qemu computes about two tokens per second.
N_CHARS = "300"
# Relative to the logits' standard deviation. Kernels of other processors sum in another order.
NOISE = 0.02
PROBE = """
import hashlib, json, platform, sys
from pathlib import Path
from pop_converter.gguf.header import read_header
from support.calls import evaluated, last_logits, opened, prompt
from support.converted import paired
from support.synthetic import make_gguf

folder = Path(sys.argv[1])
single = paired(make_gguf(folder / "llama.gguf", "llama"), folder, "fitted-wide").single
data = single.read_bytes()[read_header(single).data_start:]
with opened(single) as model:
    n_context = evaluated(model, prompt(200)).n_context
    logits = last_logits(model).tolist()
found = {"machine": platform.machine(), "sha256": hashlib.sha256(data).hexdigest()}
print(json.dumps(found | {"n_context": n_context, "logits": logits}))
"""


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Run a program and return its stdout. Exit with status 1 if the program fails."""
    print("$", *(str(each)[:80] for each in command), file=sys.stderr, flush=True)
    done = subprocess.run(
        [str(each) for each in command], env=env, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed with status {done.returncode}")
    return done.stdout


def debian(folder: Path) -> Path:
    """Extract an ARM Python into a folder, and return the folder. Nothing is installed."""
    root = folder / "root"
    if root.exists():
        return root
    apt = folder / "apt"
    for name in ("state/lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    options = ["APT::Architecture=arm64", "APT::Architectures=arm64", "Debug::NoLocking=1"]
    options += [f"Dir::State={apt}/state", f"Dir::State::status={apt}/status"]
    options += [f"Dir::Cache={apt}/cache"]
    given = [word for option in options for word in ("-o", option)]
    run("apt-get", *given, "update", "-qq")
    wanted = ("install", "-qq", "-y", "--download-only", "--no-install-recommends")
    run("apt-get", *given, *wanted, *PACKAGES)
    fresh = folder / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        run("dpkg", "-x", package, fresh)
    (fresh / "lib").symlink_to("usr/lib")
    return fresh.rename(root)


def emulated(root: Path, folder: Path) -> Path:
    """Write a program that runs the ARM Python, so that Python's child processes use it, too."""
    program = folder / "python"
    python = root / f"usr/bin/python{PYTHON}"
    program.write_text(f"#!/bin/sh\nexec {' '.join(QEMU)} -L '{root}' '{python}' \"$@\"\n")
    program.chmod(0o755)
    (folder / "start").mkdir(exist_ok=True)
    start = f"import sys\nsys.executable = {str(program)!r}\n"
    (folder / "start/sitecustomize.py").write_text(start)
    return program


def download(wheels: Path, folder: Path) -> Path:
    """Copy pop-local and all its dependencies for ARM to a folder, and return the folder."""
    found = folder / "wheels"
    shutil.rmtree(found, ignore_errors=True)
    # pip prefers these files to an index's wheels of the same version.
    [app], [backend] = wheels.glob("pop_local-*.whl"), wheels.glob("pop_local_llama_cpp-*.whl")
    arm("download", "--dest", found, f"{app}[server]", backend)
    return found


def arm(command: str, *arguments: str | Path) -> None:
    """Run a command of pip that selects wheels for the ARM Python."""
    options = ["--quiet", "--only-binary", ":all:", "--python-version", PYTHON, "--no-cache-dir"]
    options += [word for each in PLATFORMS for word in ("--platform", each)]
    run(sys.executable, "-m", "pip", command, *options, *arguments)


def install(site: Path, *arguments: str | Path) -> None:
    """Install packages for ARM into a folder, which is emptied first."""
    shutil.rmtree(site, ignore_errors=True)
    arm("install", "--target", site, *arguments)


def probe(python: Path | str, folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Convert a tiny model, read a prompt, and return what the program prints."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found: dict[str, Any] = json.loads(run(python, "-c", PROBE, folder, env=env))
    return found


def try_uv(root: Path, folder: Path, wheels: Path, model: Path) -> None:
    """Run try_installers.py with uv in a container without a compiler or a package index."""
    uv = folder / "uv"
    install(uv, "uv")
    mounts = {
        uv / "bin": "uv",
        wheels: "wheels",
        model.parent: "models",
        TESTS: "clone/tests",
        ROOT / "pop_local/data": "clone/pop_local/data",
    }
    rule = f":arm:M::{ARM_MAGIC}:{ARM_MASK}:{shutil.which(QEMU[0])}:F"
    started = (f"/usr/bin/python{PYTHON}", "/clone/tests/try_installers.py")
    found = run(
        *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", ENTER, "sh", root, rule),
        *(word for mount in mounts.items() for word in mount),
        *("--", *started, "/wheels", f"/models/{model.name}", "uv", "--characters", N_CHARS),
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", "QEMU_CPU": QEMU[2]},
    )
    print(found, end="")


def main() -> None:
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    wheels, folder = (Path(given).resolve() for given in sys.argv[1:3])
    folder.mkdir(parents=True, exist_ok=True)
    root, site = debian(folder), folder / "site"
    python = emulated(root, folder)
    found = download(wheels, folder)
    install(site, "--no-index", "--find-links", found, "pop-local[server]")
    tests = [str(TESTS), str(ROOT / "patches/llama-cpp-python")]
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    here_env = env | {"PYTHONPATH": os.pathsep.join([*tests, env.get("PYTHONPATH", "")])}
    there_env = env | {"PYTHONPATH": os.pathsep.join([str(folder / "start"), str(site), *tests])}
    report = json.loads(
        run(python, "-m", "pop_local", "doctor", "--report", "--json", env=there_env)
    )
    for check in report["checks"]:
        print(f"{check['title']}: {check['found']}")
    here = probe(sys.executable, folder / "here", here_env)
    there = probe(python, folder / "there", there_env)
    assert (here["machine"], there["machine"]) == (os.uname().machine, "aarch64")
    assert there["sha256"] == here["sha256"], "the converted tensors differ"
    assert there["n_context"] == here["n_context"] > 0, "another number of tokens was pruned"
    mine, theirs = np.array(here["logits"]), np.array(there["logits"])
    difference = float(np.sqrt(((mine - theirs) ** 2).mean()) / mine.std())
    print(f"the logits differ by {difference:.2e} of their standard deviation")
    assert difference < NOISE, "the logits differ by more than noise"
    if len(sys.argv) == 4:
        try_uv(root, folder, found, Path(sys.argv[3]).resolve())


if __name__ == "__main__":
    main()

"""`pop-local doctor`: what this installation has, and what to fix."""

import os
import platform
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import typer
from rich.text import Text

from pop_converter.architecture.shape import source_shape
from pop_converter.base.errors import PopError
from pop_converter.base.numbers import size
from pop_converter.gguf.source import read_source
from pop_local import __version__
from pop_local.commands.shared_options import Json
from pop_local.config import settings
from pop_local.engine.llama import backend, devices
from pop_local.models.mmproj_files import find_mmproj
from pop_local.models.model_names import lookup, models_dir, resolve
from pop_local.ui.hints import hint_of
from pop_local.ui.printable import printable
from pop_local.ui.tables import print_json
from pop_local.ui.theme import out
from pop_local.workflows.open import best_model

Status = Literal["ok", "note", "fix"]
MARKS = {"ok": ("ok  ", "good"), "note": ("note", "warn"), "fix": ("FIX ", "bad")}
LOOK_S = 0.2
SMALL_MEMORY_BYTES = 4_000_000_000
DRIVER = "is its driver installed, and may this user open the device?"
NO_DEVICE = {
    "CUDA": "does nvidia-smi show one, with a driver for the CUDA that this was built with?",
    "Vulkan": "ggml leaves out CPUs, as lavapipe is: GGML_VK_VISIBLE_DEVICES=0 takes the first",
}
KERNELS_VARIABLE = "GGML_POP_KERNELS"
CUDA_HINT = 'to use it: CMAKE_ARGS="-DGGML_CUDA=on" pip install ./patches/llama-cpp-python'


@dataclass(frozen=True)
class Check:
    """One thing looked at; `to_do` says what to do unless all is well."""

    key: str
    title: str
    status: Status
    found: str
    to_do: str = ""


def doctor(
    json: Json = False,
) -> None:
    """Check the backend, the devices, memory and models; exit 1 if something must be fixed."""
    checks = (
        Check("python", "Python", "ok", f"{platform.python_version()} ({sys.executable})"),
        Check("pop_local", "pop-local", "ok", __version__),
        *_backend(),
        _memory(),
        _model(),
    )
    is_ok = all(check.status != "fix" for check in checks)
    if json:
        print_json({"ok": is_ok, "checks": checks})
    else:
        _draw(checks)
    if not is_ok:
        raise typer.Exit(1)


def _draw(checks: tuple[Check, ...]) -> None:
    width = max(len(check.title) for check in checks)
    for check in checks:
        found = f"  {check.title.ljust(width)}  {printable(check.found)}"
        out.print(Text.assemble(MARKS[check.status], found), soft_wrap=True)
        if check.to_do:
            to_do = Text(f"      {' ' * width}  {printable(check.to_do)}", style="hint")
            out.print(to_do, soft_wrap=True)


def _backend() -> list[Check]:
    try:
        info = devices.describe_backend()
    except PopError as error:
        return [Check("backend", "Backend", "fix", error.message, error.hint)]
    variant = f"{info.cpu_variant}: " if info.cpu_variant else ""
    return [
        Check("backend", "Backend", "ok", f"{backend.OURS} {info.version} ({info.library_path})"),
        _abi(info.abi),
        Check("built_in", "Built in", "ok", ", ".join(name for name, _ in info.built_in)),
        *_gpus(info),
        Check("cpu_features", "CPU features", "ok", f"{variant}{_enabled(info.features)}"),
        _kernels(info.kernels),
        _threads(info.n_threads),
    ]


def _kernels(name: str) -> Check:
    title, asked = "Kernels", os.environ.get(KERNELS_VARIABLE)
    if asked is not None:
        found = f"{name}: {KERNELS_VARIABLE}={asked}"
        is_followed = asked == name or name == devices.KERNELS_OFF
        to_do = "without it the fastest are taken" if is_followed else "it names none of this build"
        return Check("kernels", title, "note", found, to_do)
    if name == devices.NO_KERNELS:
        found = "none for this processor in this build: llama.cpp's own compute"
        return Check("kernels", title, "ok", found)
    found = f"{name}, the fastest that this processor and this build have"
    return Check("kernels", title, "ok", found)


def _threads(n_threads: int) -> Check:
    """Whether other work leaves them their cores."""
    n_cpus = os.cpu_count() or 1
    found = f"{n_threads} ({n_cpus} logical CPUs)"
    n_busy = psutil.cpu_percent(LOOK_S) * n_cpus / 100
    if n_busy + n_threads < n_cpus + 0.5:
        return Check("threads", "Threads", "ok", found)
    found += f", but other work keeps {n_busy:.1f} of them busy"
    fewer = "fewer --threads may write faster, and " if n_threads > 1 else ""
    to_do = f"answers wait for it; {fewer}times mean little"
    return Check("threads", "Threads", "note", found, to_do)


def _abi(abi: int | None) -> Check:
    if abi == backend.ABI:
        return Check("pop_abi", "Pruning", "ok", f"patched, ABI {abi}")
    unpatched = "not possible: this llama.cpp is not patched"
    found = unpatched if abi is None else f"ABI {abi}, needed is {backend.ABI}"
    return Check("pop_abi", "Pruning", "fix", found, backend.INSTALL_HINT)


def _gpus(info: devices.BackendInfo) -> list[Check]:
    gpus = [
        Check("gpu", "GPU", "ok", _described(device)) for device in info.devices if device.is_gpu
    ]
    for name, n_devices in info.built_in:
        if n_devices == 0 and name != "RPC":
            found = f"{name} is built in, but no device was found"
            gpus.append(Check("gpu", "GPU", "note", found, NO_DEVICE.get(name, DRIVER)))
    if gpus:
        return gpus
    if shutil.which("nvidia-smi"):
        unused = "there is an NVIDIA GPU, but this build is for the CPU only"
        return [Check("gpu", "GPU", "note", unused, CUDA_HINT)]
    return [Check("gpu", "GPU", "ok", "none in this build: models run on the CPU")]


def _described(device: devices.Device) -> str:
    free, total = size(device.memory_free_bytes), size(device.memory_total_bytes)
    return f"{device.name}: {device.description}, {free} of {total} free"


def _enabled(features: str) -> str:
    """'CUDA : ARCHS = 900 | CPU : AVX = 1 | ...' as llama.cpp prints it: the CPU's that are on."""
    names = [part.partition("=") for part in features.partition("CPU :")[2].split("|")]
    return " ".join(name.strip() for name, _, value in names if value.strip() not in ("", "0"))


def _memory() -> Check:
    total_bytes = psutil.virtual_memory().total
    if total_bytes < SMALL_MEMORY_BYTES:
        to_do = "take small models, and a small context (--ctx)"
        return Check("memory", "Memory", "note", size(total_bytes), to_do)
    return Check("memory", "Memory", "ok", size(total_bytes))


def _as_read(path: Path) -> str:
    """Its path, where context tokens leave it if they do so exactly, and what it sees by."""
    mmproj = find_mmproj(path)
    seeing = f", sees pictures by {mmproj.name}" if mmproj else ""
    with suppress(PopError):
        if exact := source_shape(read_source(path)).exact:
            return f"{path} (context tokens leave at layer {exact}, exactly){seeing}"
    return f"{path}{seeing}"


def _model() -> Check:
    try:
        model, folder = str(settings.get("model") or best_model().name), models_dir()
    except PopError as error:
        return Check("settings", "Settings", "fix", error.message, error.hint)
    try:
        return Check("model", "Default model", "ok", _as_read(resolve(model)))
    except PopError as error:
        entry = lookup(model)
        if entry is None:
            return Check("model", "Default model", "fix", error.message, hint_of(error))
    to_do = f"run `pop-local pull {entry.name}`, or `pop-local chat`, which fetches it too"
    return Check("model", "Default model", "note", f"{entry.name} is not in {folder} yet", to_do)

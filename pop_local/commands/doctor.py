"""`pop-local doctor`: check the installation and suggest fixes."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import psutil
import typer
from rich.text import Text

from pop_base.errors import PopError
from pop_base.numbers import size
from pop_local import __version__
from pop_local.commands.shared_options import Json
from pop_local.config import settings
from pop_local.engine.llama import backend, devices
from pop_local.models.model_names import lookup, models_dir, resolve
from pop_local.ui.console import out, printable
from pop_local.ui.hints import hint_of
from pop_local.ui.tables import print_json
from pop_local.workflows.open import best_model

Status = Literal["ok", "note", "fix"]
MARKS = {"ok": ("ok  ", "good"), "note": ("note", "warn"), "fix": ("FIX ", "bad")}
DRIVER = "check that the driver is installed and that you have permission to use the device"
NO_DEVICE = {
    "CUDA": "check that nvidia-smi lists a device and that the driver supports this CUDA version",
    "Vulkan": "ggml ignores CPU devices such as lavapipe unless GGML_VK_VISIBLE_DEVICES=0 is set",
}
NO_LIBRARY = {
    "CUDA": "to use an NVIDIA GPU, install its driver, the CUDA runtime, and cuBLAS",
    "Vulkan": "to use a GPU, install the Vulkan loader and the GPU's Vulkan driver",
}
VARIABLES = re.compile(r"(?:CUDA|GGML|GOMP|HIP|LD|OMP|VK)_|LLAMA_CPP_LIB_PATH")
PACKAGES = re.compile(r"(?:gguf|huggingface_hub|llguidance|numpy|starlette|torch) ")
# Values of variables that cannot be a path or a secret.
HARMLESS = re.compile(r"[\d,.:-]+|on|off|true|false|none|amx|avx\w+|active|passive", re.IGNORECASE)
# Folders that are not part of a URL, names without an ending after them, a URL's password, and the
# Hub's access tokens.
PRIVATE = re.compile(
    r"(?<![\w./])(?:~\w*|[A-Za-z]:)?(?:[/\\](?=\S)[^/\\\n]+)*[/\\]"
    r"(?:(?=[\w-]+\.\w)|(?=\S)[^\s/\\,;)]+)|(?<=://)[^/@\s]+(?=@)|\bhf_\w+"
)
CUDA_HINT = (
    'to use the GPU, run: CMAKE_ARGS="-DGGML_CUDA=on" pip install ./patches/llama-cpp-python'
)


@dataclass(frozen=True)
class Check:
    """The result of one check. `to_do` is the suggested fix, or "" if no fix is needed."""

    key: str
    title: str
    status: Status
    found: str
    to_do: str = ""


Report = Annotated[bool, typer.Option("--report", help="Print a bug report without folder names.")]


def doctor(json: Json = False, report: Report = False) -> None:
    """Check the backend, devices, memory, and default model. Exit with code 1 if a check fails."""
    checks = (
        Check("python", "Python", "ok", f"{platform.python_version()} ({sys.executable})"),
        Check("pop_local", "pop-local", "ok", __version__),
        *_backend(),
        Check("memory", "Memory", "ok", f"{size(psutil.virtual_memory().total)} in total"),
        _model(),
    )
    if report:
        checks = tuple(
            replace(check, found=_public(check.found), to_do=_public(check.to_do))
            for check in (*checks, *_details())
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
        out.print(Text.assemble(MARKS[check.status], found), soft_wrap=not out.is_terminal)
        if check.to_do:
            to_do = Text(f"      {' ' * width}  {printable(check.to_do)}", style="hint")
            out.print(to_do, soft_wrap=not out.is_terminal)


def _public(text: str) -> str:
    """Hide folders and access tokens."""
    for name in ("HOME", "USERPROFILE"):
        if len(home := os.environ.get(name, "")) > 1:
            text = re.sub(re.escape(home) + r"(?=[/\\\s]|$)", "~", text)
    return PRIVATE.sub("...", text)


def _details() -> Iterator[Check]:
    """Yield details that need no check but belong in a bug report."""
    free = size(psutil.virtual_memory().available)
    yield Check("system", "System", "ok", f"{platform.platform()}, {free} of memory available")
    installed = sorted(f"{each.name} {each.version}" for each in importlib.metadata.distributions())
    yield Check("packages", "Packages", "ok", ", ".join(filter(PACKAGES.match, installed)))
    variables = (
        f"{name}={value if HARMLESS.fullmatch(value) else '...'}"
        for name, value in sorted(os.environ.items())
        if VARIABLES.match(name)
    )
    yield Check("variables", "Variables", "ok", ", ".join(variables))
    try:
        # Texts such as the system prompt are private.
        changed = (
            f"{key}={value if isinstance(value, int | float) else '...'}"
            for key, value in settings.given().items()
        )
        yield Check("changed", "Settings", "ok", ", ".join(changed) or "defaults")
        processors = ", ".join(device.description for device in devices.devices())
        yield Check("devices", "Devices", "ok", processors)
    except PopError:
        return  # a check reports this error


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
    variable = devices.KERNELS_VARIABLE
    if (value := os.environ.get(variable)) is not None:
        to_do = f"unset {variable} to use the fastest kernels"
        return Check("kernels", "Kernels", "note", f"{name}: {variable}={value}", to_do)
    found = f"{name}, the fastest kernels in this build for this processor"
    if name == devices.NO_KERNELS:
        found = "this build has no pop-local kernels for this CPU, so it uses llama.cpp's kernels"
    return Check("kernels", "Kernels", "ok", found)


def _threads(n_threads: int) -> Check:
    found = f"{n_threads} on {os.cpu_count() or 1} logical CPUs"
    if not (n_busy := devices.busy_cpus(n_threads)):
        return Check("threads", "Threads", "ok", found)
    found = f"{found}; other processes are using {n_busy:.1f} CPUs"
    to_do = "expect slower answers and unreliable timings"
    if n_threads > 1:
        to_do += "; a lower --threads value may improve speed"
    return Check("threads", "Threads", "note", found, to_do)


def _abi(abi: int | None) -> Check:
    if abi == backend.ABI:
        return Check("pop_abi", "Fast reading", "ok", f"patched, ABI {abi}")
    found = "not available because this build of llama.cpp lacks pop-local's patches"
    if abi is not None:
        found = f"the backend uses ABI {abi}, but pop-local needs ABI {backend.ABI}"
    return Check("pop_abi", "Fast reading", "fix", found, backend.INSTALL_HINT)


def _gpus(info: devices.BackendInfo) -> list[Check]:
    gpus = []
    for each in filter(lambda device: device.is_gpu, info.devices):
        memory = f"{size(each.memory_free_bytes)} of {size(each.memory_total_bytes)} free"
        gpus.append(Check("gpu", "GPU", "ok", f"{each.name}: {each.description}, {memory}"))
    for name, n_devices in info.built_in:
        if n_devices == 0 and name != "RPC":
            found = f"this build supports {name}, but no {name} device was found"
            gpus.append(Check("gpu", "GPU", "note", found, NO_DEVICE.get(name, DRIVER)))
    loaded = {name for name, _ in info.built_in}
    for name, to_do in NO_LIBRARY.items():
        # In wheels, each backend is a separate file, which ggml skips if a dependency is missing.
        if name not in loaded and [*info.library_path.parent.glob(f"*ggml-{name.lower()}.*")]:
            found = f"the {name} backend cannot be loaded, so models run on the CPU"
            gpus.append(Check("gpu", "GPU", "note", found, to_do))
    if gpus:
        return gpus
    if shutil.which("nvidia-smi"):
        unused = "this machine has an NVIDIA GPU, but this build supports only the CPU"
        return [Check("gpu", "GPU", "note", unused, CUDA_HINT)]
    return [Check("gpu", "GPU", "ok", "this build has no GPU support, so models run on the CPU")]


def _enabled(features: str) -> str:
    """Return the enabled CPU features from text such as 'CUDA : ARCHS = 900 | CPU : AVX = 1'."""
    names = [part.partition("=") for part in features.partition("CPU :")[2].split("|")]
    return " ".join(name.strip() for name, _, value in names if value.strip() not in ("", "0"))


def _model() -> Check:
    try:
        model, folder = str(settings.get("model") or best_model().name), models_dir()
    except PopError as error:
        return Check("settings", "Settings", "fix", error.message, error.hint)
    try:
        return Check("model", "Default model", "ok", str(resolve(model)))
    except PopError as error:
        entry = lookup(model)
        if entry is None:
            return Check("model", "Default model", "fix", error.message, hint_of(error))
    to_do = f"run `pop-local pull {entry.short_name}` or `pop-local chat` to download the model"
    found = f"{entry.short_name} has not been downloaded to {folder}"
    return Check("model", "Default model", "note", found, to_do)

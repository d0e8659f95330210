"""Test `pop-local doctor` with complete, unpatched and missing backends."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy
import pytest
from typer.testing import CliRunner

from pop_base.errors import PopError
from pop_local.cli import app
from pop_local.commands.doctor import _public
from pop_local.engine.llama import backend, devices
from pop_local.engine.llama.devices import BackendInfo, Device
from pop_local.models import model_names as models
from pop_local.workflows.open import best_model

FEATURES = "CUDA : ARCHS = 900 | CPU : SSE3 = 1 | AVX = 1 | AVX512 = 0 | OPENMP = 1 | REPACK = 1 | "
LOG = """load_backend: loaded RPC backend from /env/lib/libggml-rpc.so
load_backend: loaded CPU backend from /env/lib/libggml-cpu-zen4.so
"""
SPINNING = ("GOMP_", "OMP_")
CPU = Device("CPU", "Some CPU", False, 8 * 10**9, 16 * 10**9)
GPU = Device("CUDA0", "Some GPU", True, 70 * 10**9, 80 * 10**9)


def doctor(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


def checks() -> dict[str, dict[str, str]]:
    return {check["key"]: check for check in json.loads(doctor("--json").stdout)["checks"]}


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Return a function that simulates an installed backend."""
    monkeypatch.setenv(models.MODELS_VARIABLE, str(tmp_path))
    monkeypatch.setattr("pop_local.commands.doctor.shutil.which", lambda name: None)
    monkeypatch.setattr("pop_local.commands.doctor.os.cpu_count", lambda: 8)
    monkeypatch.setattr("pop_local.commands.doctor.psutil.cpu_percent", lambda interval: 50.0)

    def pretend(
        *,
        abi: int | None = backend.ABI,
        found: tuple[Device, ...] = (CPU,),
        built_in: tuple[tuple[str, int], ...] = (("RPC", 0), ("CPU", 1)),
        variant: str = "",
        n_threads: int = 4,
        kernels: str = devices.NO_KERNELS,
        library: Path = Path("lib/libllama.so"),
    ) -> None:
        info = BackendInfo(
            *("0.3.36", library, abi, found, built_in, FEATURES, n_threads, variant, kernels)
        )
        monkeypatch.setattr("pop_local.engine.llama.devices.describe_backend", lambda: info)

    return pretend


def test_reports_no_problem_after_install(install):
    install()
    done = doctor()
    assert done.exit_code == 0
    assert f"patched, ABI {backend.ABI}" in done.stdout
    assert "  SSE3 AVX OPENMP REPACK" in done.stdout
    assert "FIX" not in done.stdout


def test_reports_unpatched_backend(install):
    install(abi=None)
    done = doctor()
    assert done.exit_code == 1
    assert "this build of llama.cpp lacks pop-local's patches" in done.stdout
    assert "pip install ./patches/llama-cpp-python" in done.stdout
    assert json.loads(doctor("--json").stdout)["ok"] is False
    install(abi=backend.ABI + 1)
    assert doctor().exit_code == 1
    assert checks()["pop_abi"]["status"] == "fix"


@pytest.mark.parametrize("is_ours", [True, False])
def test_reports_conflicting_llama_cpp_python(tmp_path, monkeypatch, is_ours):
    """Accept a system package that the virtual environment hides."""
    folder = tmp_path / "llama_cpp"
    if is_ours:
        folder.symlink_to(Path(llama_cpp.__file__).parent)
    else:
        folder.mkdir()
        (folder / "__init__.py").touch()
    metadata = tmp_path / "llama_cpp_python-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    backend.bindings.cache_clear()
    found = checks()["backend"]
    if not is_ours:
        assert found["status"] == "ok"
        return
    assert doctor().exit_code == 1
    assert found["found"].startswith("llama-cpp-python 9.9 has overwritten")
    assert "pip uninstall llama-cpp-python" in found["to_do"]


def test_explains_missing_backend_after_uninstall(monkeypatch):
    monkeypatch.delattr("llama_cpp.llama_cpp")
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", None)
    backend.bindings.cache_clear()
    assert doctor().exit_code == 1
    assert checks()["backend"]["found"].startswith("pop-local-llama-cpp cannot be imported")
    assert "uninstalling llama-cpp-python also removes" in checks()["backend"]["to_do"]


def test_shows_cpu_variant(install):
    install(variant=devices._cpu_variant(LOG))
    assert checks()["cpu_features"]["found"] == "zen4: SSE3 AVX OPENMP REPACK"
    assert devices._cpu_variant(LOG.replace("-zen4", "")) == ""


@pytest.mark.parametrize(
    ("kernels", "asked", "found", "status"),
    [
        (
            "avx512vnni",
            None,
            "avx512vnni, the fastest kernels in this build for this processor",
            "ok",
        ),
        ("avx2", "avx2", "avx2: GGML_POP_KERNELS=avx2", "note"),
        ("amx", "avx-2", "amx: GGML_POP_KERNELS=avx-2", "note"),
        ("off", "0", "off: GGML_POP_KERNELS=0", "note"),
        ("none", None, "this build has no pop-local kernels for this CPU, so it uses", "ok"),
    ],
)
def test_shows_kernels(install, monkeypatch, kernels, asked, found, status):
    monkeypatch.delenv("GGML_POP_KERNELS", raising=False)
    if asked is not None:
        monkeypatch.setenv("GGML_POP_KERNELS", asked)
    install(kernels=kernels)
    check = checks()["kernels"]
    assert check["found"].startswith(found)
    assert check["status"] == status


def test_removed_measure_option_gets_a_hint():
    result = doctor("--measure")
    assert result.exit_code == 2
    words = " ".join(result.output.replace("│", " ").split())
    assert "No such option --measure: it was removed; pop-local now uses" in words


@pytest.mark.parametrize("name", ["i8mm", "dotprod"])
def test_rejects_names_of_removed_kernels(monkeypatch, name):
    monkeypatch.setenv("GGML_POP_KERNELS", name)
    check = checks()["backend"]
    assert check["status"] == "fix"
    assert check["found"].startswith(f"GGML_POP_KERNELS={name} selects kernels for ARM64, which")
    assert check["to_do"].startswith("unset GGML_POP_KERNELS")


def test_notes_threads_without_a_free_core(install, monkeypatch):
    install()
    assert checks()["threads"]["status"] == "ok"
    monkeypatch.setattr("pop_local.commands.doctor.psutil.cpu_percent", lambda interval: 60.0)
    assert checks()["threads"]["status"] == "note"
    assert checks()["threads"]["found"].endswith("; other processes are using 4.8 CPUs")
    assert "lower --threads" in checks()["threads"]["to_do"]
    assert doctor().exit_code == 0
    install(n_threads=1)
    monkeypatch.setattr("pop_local.commands.doctor.psutil.cpu_percent", lambda interval: 100.0)
    assert checks()["threads"]["to_do"] == "expect slower answers and unreliable timings"


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, backend.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_waiting_threads_sleep_soon(given, spins):
    """Check the spin count that libgomp reports in a process that loads it."""
    given = given | {"OMP_DISPLAY_ENV": "VERBOSE"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SPINNING)}
    load = "from pop_local.engine.llama.backend import bindings; bindings()"
    words = [sys.executable, "-c", load]
    said = subprocess.run(words, env=kept | given, check=True, capture_output=True, text=True)
    if "OPENMP DISPLAY ENVIRONMENT" not in said.stderr:
        pytest.skip("this build is without libgomp")
    assert f"GOMP_SPINCOUNT = '{spins}'" in said.stderr


@pytest.mark.parametrize(
    ("name", "hint"),
    [("Vulkan", "GGML_VK_VISIBLE_DEVICES=0"), ("CUDA", "nvidia-smi"), ("SYCL", "driver")],
)
def test_notes_backend_without_device(install, name, hint):
    install(built_in=((name, 0), ("RPC", 0), ("CPU", 1)))
    assert checks()["built_in"]["found"] == f"{name}, RPC, CPU"
    assert checks()["gpu"]["found"] == f"this build supports {name}, but no {name} device was found"
    assert hint in checks()["gpu"]["to_do"]
    assert doctor().exit_code == 0


@pytest.mark.parametrize("file", ["libggml-cuda.so", "ggml-cuda.dll", "libggml-cuda.dylib"])
def test_notes_backend_that_cannot_be_loaded(install, tmp_path, file):
    """A wheel with CUDA falls back to the CPU without a driver, and states why."""
    (tmp_path / file).touch()
    install(library=tmp_path / "libllama.so")
    found = [
        check for check in json.loads(doctor("--json").stdout)["checks"] if check["key"] == "gpu"
    ]
    assert [check["status"] for check in found] == ["note"]
    assert found[0]["found"] == "the CUDA backend cannot be loaded, so models run on the CPU"
    assert "cuBLAS" in found[0]["to_do"]
    assert doctor().exit_code == 0
    install(library=tmp_path / "libllama.so", built_in=(("CUDA", 1), ("CPU", 1)), found=(GPU, CPU))
    assert checks()["gpu"]["status"] == "ok"


def test_notes_gpu_without_gpu_build(install, monkeypatch):
    install()
    monkeypatch.setattr("pop_local.commands.doctor.shutil.which", lambda name: "/bin/" + name)
    assert checks()["gpu"]["status"] == "note"
    assert "GGML_CUDA" in checks()["gpu"]["to_do"]
    assert doctor().exit_code == 0


def test_checks_default_model(install, tmp_path):
    install()
    assert "pop-local pull" in checks()["model"]["to_do"]
    file = tmp_path / best_model().file
    file.touch()
    assert checks()["model"]["found"] == str(file)


def report(*arguments: str) -> str:
    return doctor("--report", *arguments).stdout


def test_report_contains_system_details(install, monkeypatch):
    install(found=(GPU, CPU))
    monkeypatch.setattr(devices, "devices", lambda: (GPU, CPU))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("POP_LOCAL_CTX", "777")
    found = {check["key"]: check["found"] for check in json.loads(report("--json"))["checks"]}
    assert platform.platform() in found["system"]
    assert f"numpy {numpy.__version__}" in found["packages"]
    assert "OMP_NUM_THREADS=3" in found["variables"]
    assert "ctx=777" in found["changed"]
    assert found["devices"] == "Some GPU, Some CPU"
    assert set(checks()) < set(found)


@pytest.mark.parametrize("is_installed", [True, False])
def test_report_hides_folders_and_secrets(install, monkeypatch, tmp_path, is_installed):
    install()
    if not is_installed:

        def missing() -> BackendInfo:
            raise PopError("cannot load /srv/anna smith/libllama.so", "open C:\\Users\\anna\\x.dll")

        monkeypatch.setattr(devices, "describe_backend", missing)
        monkeypatch.setattr(devices, "devices", missing)
    home = tmp_path / "anna"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv(models.MODELS_VARIABLE, str(home))
    monkeypatch.setenv("POP_LOCAL_MODEL", "smollm2")
    monkeypatch.setenv("POP_LOCAL_SYSTEM", "Anna is ill.")
    monkeypatch.setenv("POP_LOCAL_API_KEY", "anna-key")
    monkeypatch.setenv("HF_TOKEN", "hf_anna")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/anna/lib:/srv/anna/lib")
    monkeypatch.setenv("GGML_TEXT", "hf_anna")
    shown = report()
    assert "anna" not in shown.lower()
    assert "downloaded to ~" in shown
    assert "GGML_TEXT=..." in shown
    assert "LD_LIBRARY_PATH=..." in shown
    assert is_installed or "cannot load ...libllama.so" in shown
    assert "anna" in doctor().stdout
    assert str(tmp_path) not in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("downloaded to /mnt/anna", "downloaded to ..."),
        ("in ~/anna, 3 files", "in ..., 3 files"),
        ("(C:\\Users\\anna)", "(...)"),
        ("~anna/x/y.gguf", "...y.gguf"),
        ("/home/annasmith/m", "..."),
        ("http://anna:secret@host/x", "http://...@host/x"),
        ("see https://example.org/a/b/c, 3/4/5 GB", "see https://example.org/a/b/c, 3/4/5 GB"),
    ],
)
def test_report_hides_names_of_folders(monkeypatch, text, shown):
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.delenv("USERPROFILE", raising=False)
    assert _public(text) == shown


def test_report_contains_settings_error_once(install, monkeypatch):
    install()
    monkeypatch.setenv("POP_LOCAL_CTX", "many")
    done = doctor("--report")
    assert done.exit_code == 1
    assert done.stdout.count("many") == 1
    assert "System" in done.stdout

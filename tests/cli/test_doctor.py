"""`pop-local doctor` against backends that are whole, unpatched or missing."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from converter.errors import PopError
from pop_local.cli import app
from pop_local.engine.llama import backend
from pop_local.engine.llama.devices import BackendInfo, Device
from pop_local.models import names as models
from support.shared_kv import make_shared

FEATURES = "CUDA : ARCHS = 900 | CPU : SSE3 = 1 | AVX = 1 | AVX512 = 0 | OPENMP = 1 | REPACK = 1 | "
CPU = Device("CPU", "Some CPU", False, 8 * 10**9, 16 * 10**9)
GPU = Device("CUDA0", "Some GPU", True, 70 * 10**9, 80 * 10**9)


def doctor(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


def checks() -> dict[str, dict[str, str]]:
    return {check["key"]: check for check in json.loads(doctor("--json").stdout)["checks"]}


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Pretends that a backend is installed."""
    monkeypatch.setenv(models.MODELS_VARIABLE, str(tmp_path))
    monkeypatch.setattr("pop_local.commands.doctor.shutil.which", lambda name: None)

    def pretend(
        *,
        abi: int | None = backend.ABI,
        devices: tuple[Device, ...] = (CPU,),
        built_in: tuple[tuple[str, int], ...] = (("RPC", 0), ("CPU", 1)),
    ) -> None:
        info = BackendInfo("0.3.36", Path("lib/libllama.so"), abi, devices, built_in, FEATURES, 4)
        monkeypatch.setattr("pop_local.engine.llama.devices.describe_backend", lambda: info)

    return pretend


def test_all_is_well(install):
    install()
    done = doctor()
    assert done.exit_code == 0
    assert f"patched, ABI {backend.ABI}" in done.stdout
    assert "  SSE3 AVX OPENMP REPACK" in done.stdout
    assert "FIX" not in done.stdout


def test_unpatched_backend_must_be_fixed(install):
    install(abi=None)
    done = doctor()
    assert done.exit_code == 1
    assert "this llama.cpp is not patched" in done.stdout
    assert "pip install ./patches/llama-cpp-python" in done.stdout
    found = json.loads(doctor("--json").stdout)
    assert found["ok"] is False


def test_other_abi_must_be_fixed(install):
    install(abi=backend.ABI + 1)
    assert doctor().exit_code == 1
    assert checks()["pop_abi"]["status"] == "fix"


def test_missing_backend_must_be_fixed(install, monkeypatch):
    install()

    def missing() -> BackendInfo:
        raise PopError("llama-cpp-python cannot be imported", backend.INSTALL_HINT)

    monkeypatch.setattr("pop_local.engine.llama.devices.describe_backend", missing)
    assert doctor().exit_code == 1
    assert checks()["backend"]["to_do"] == backend.INSTALL_HINT


def test_gpus_are_listed(install):
    install(devices=(GPU, CPU))
    assert checks()["gpu"]["found"] == "CUDA0: Some GPU, 70.00 GB of 80.00 GB free"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("Vulkan", "GGML_VK_VISIBLE_DEVICES=0"), ("CUDA", "nvidia-smi"), ("SYCL", "driver")],
)
def test_a_backend_without_a_device_is_noted(install, name, hint):
    install(built_in=((name, 0), ("RPC", 0), ("CPU", 1)))
    assert checks()["built_in"]["found"] == f"{name}, RPC, CPU"
    assert checks()["gpu"]["found"] == f"{name} is built in, but no device was found"
    assert hint in checks()["gpu"]["to_do"]
    assert doctor().exit_code == 0


def test_gpu_without_a_build_for_it_is_noted(install, monkeypatch):
    install()
    monkeypatch.setattr("pop_local.commands.doctor.shutil.which", lambda name: "/bin/" + name)
    assert checks()["gpu"]["status"] == "note"
    assert "GGML_CUDA" in checks()["gpu"]["to_do"]
    assert doctor().exit_code == 0


def test_default_model_is_looked_for(install, tmp_path):
    install()
    assert "pop-local pull" in checks()["model"]["to_do"]
    file = tmp_path / models.find(models.DEFAULT_MODEL).file
    file.touch()
    assert checks()["model"]["found"] == str(file)


def test_a_model_that_is_read_exactly_is_said_to_be(install, tmp_path, monkeypatch):
    install()
    path = make_shared(tmp_path / "model.gguf", "gemma4")
    monkeypatch.setenv("POP_LOCAL_MODEL", str(path))
    assert checks()["model"]["found"] == f"{path} (context tokens leave at layer 4, exactly)"

"""Cross-compile llama.cpp's CPU code for ARM64, and run the tests of our kernels in qemu.

    python tests/try_arm_kernels.py [PYTEST_ARGUMENTS]

Two of the CPU variants of the wheels are built: one with dot products, one with matrix instructions
(i8mm). On each emulated processor, ggml must load the right variant, and our kernels must compute
only if GGML_POP_KERNELS names them, or if stored timings show that they are faster. Then all of
tests/kernels runs. Without the cross-compiler (g++-aarch64-linux-gnu) or qemu (qemu-user), the
program prints what is missing. The exit status is then 1 in CI and 0 elsewhere. It is also 1 if a
step fails. pytest does not run this file.
"""

import functools
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PACKAGE = ROOT / "patches/llama-cpp-python"
sys.path[:0] = [str(TESTS), str(PACKAGE), str(ROOT), str(ROOT / "converter")]

from pop_build.tree import prepare, recipe  # noqa: E402
from support import arm  # noqa: E402

COMPILERS = "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++"
TOOLS = (*COMPILERS, "qemu-aarch64", "cmake")
DOTPROD, I8MM = "ggml-cpu-armv8.2_2", "ggml-cpu-armv8.6_1"
SETTINGS = {
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_C_COMPILER": COMPILERS[0],
    "CMAKE_CXX_COMPILER": COMPILERS[1],
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_BACKEND_DL": "ON",
    "GGML_CPU_ALL_VARIANTS": "ON",
    "GGML_NATIVE": "OFF",
    "GGML_OPENMP": "OFF",
    "LLAMA_BUILD_COMMON": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_TOOLS": "OFF",
}


@dataclass(frozen=True)
class Processor:
    """A processor of qemu, the library that ggml must load, and the best kernels that it runs."""

    name: str
    library: str
    kernels: str


PROCESSORS = (
    Processor("max", I8MM, "i8mm"),
    Processor("neoverse-n1", DOTPROD, "dotprod"),
    Processor("cortex-a76", DOTPROD, "dotprod"),
)


def run(*command: str | Path) -> None:
    """Run a program. Exit with status 1 and the end of its output if the program fails."""
    done = subprocess.run(
        [str(each) for each in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        print(done.stdout[-4000:], file=sys.stderr)
        sys.exit(f"{command[0]} failed with status {done.returncode}")


def build() -> Path:
    """Build ggml's libraries and the program that calls them. Return their folder."""
    tree = prepare(recipe(PACKAGE, os.environ))
    source, folder = tree / "src/vendor/llama.cpp", tree / "arm"
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    settings = [f"-D{name}={value}" for name, value in SETTINGS.items()]
    run("cmake", *generator, "-S", source, "-B", folder, *settings)
    targets = ("ggml-base", DOTPROD, I8MM)
    run("cmake", "--build", folder, "--parallel", str(os.cpu_count()), "--target", *targets)
    ggml, libraries = source / "ggml", folder / "bin"
    files = (ggml / "src/ggml-backend-reg.cpp", ggml / "src/ggml-backend-dl.cpp")
    flags = ("-std=c++17", "-O1", "-rdynamic", "-DGGML_BACKEND_DL", "-DGGML_SHARED")
    run(
        *(COMPILERS[1], *flags, f"-I{ggml / 'include'}", f"-I{ggml / 'src'}"),
        *(TESTS / "support/arm_server.cpp", *files, "-o", libraries / arm.PROGRAM),
        *(f"-L{libraries}", "-lggml-base", "-Wl,-rpath,$ORIGIN"),
    )
    return libraries


@functools.cache
def timings() -> Path:
    """Store timings that make our kernels faster with few rows and slower with many rows."""
    path = Path(os.environ[arm.FOLDER_VARIABLE]) / "timings.txt"
    times = {"few ours": 1, "few llama.cpp": 2, "many ours": 2, "many llama.cpp": 1}
    path.write_text("".join(f"Q8_0/{form}{f' {time}' * 18}\n" for form, time in times.items()))
    return path


def check_selection(processor: Processor) -> None:
    """Check which library ggml loads, and when our kernels compute."""
    best = processor.kernels
    expected = {
        "": ("none", "only Q8_0/few"),
        "avx2": ("none", "only Q8_0/few"),
        "off": ("off", ""),
        "i8mm": (best, "Q8_0/many"),
    }
    for requested, (kernels, choice) in expected.items():
        os.environ["GGML_POP_KERNELS"] = requested
        server = arm.Server(Path(os.environ[arm.FOLDER_VARIABLE]))
        name = server.string(server.call(server.find("ggml_pop_kernels"))).decode()
        words = server.copy(b"\0"), server.copy(f"{timings()}\0".encode())
        lines = server.string(server.call(server.find("ggml_pop_choose"), 1, *words)).decode()
        server.close()
        found = (server.cpu_library, name, lines.partition("\n")[0])
        wanted = (f"lib{processor.library}.so", kernels, choice)
        if found != wanted:
            sys.exit(f"{processor.name}, kernels {requested!r}: {found} instead of {wanted}")


def main() -> None:
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        print(f"skipped: {', '.join(missing)} missing (Debian: g++-aarch64-linux-gnu, qemu-user)")
        sys.exit("CI" in os.environ)
    started_s = time.monotonic()
    os.environ[arm.FOLDER_VARIABLE] = str(build())
    print(f"built in {time.monotonic() - started_s:.0f} s", flush=True)
    tests = [sys.executable, "-m", "pytest", str(TESTS / "kernels"), *sys.argv[1:]]
    failed = []
    for processor in PROCESSORS:
        started_s = time.monotonic()
        os.environ["QEMU_CPU"] = processor.name
        check_selection(processor)
        os.environ["GGML_POP_KERNELS"] = processor.kernels
        if subprocess.run(tests).returncode != 0:
            failed.append(processor.name)
        took_s = time.monotonic() - started_s
        print(f"{processor.name}, {processor.kernels}: {took_s:.0f} s", flush=True)
    if failed:
        sys.exit(f"tests failed on {', '.join(failed)}")


if __name__ == "__main__":
    main()

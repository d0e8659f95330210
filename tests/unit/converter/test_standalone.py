"""Test that pop-converter converts a model in an environment without pop_local."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from gguf import GGUFReader

import pop_converter
import pop_local
from support.paths import ROOT
from support.synthetic import make_gguf

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROGRAM = """
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, sys.argv[1])
assert find_spec("pop_local") is None

from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import read_source
from pop_converter.popfile.format import pop_meta
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import convert

model, converted = map(Path, sys.argv[2:])
plan = make_plan(source_shape(read_source(model)), boundary=5)
convert(plan, model, converted)
meta = pop_meta(read_source(converted).first)
print(meta.schedule, meta.projection, meta.tool)
print([name for name in sys.modules if name.startswith("pop_local")])
"""


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]


def with_dependencies(names: list[str]) -> set[str]:
    """Return the installed distributions of these requirements, without extras."""
    found: set[str] = set()
    while names:
        requirement = names.pop()
        name = re.split(r"[^\w.-]", requirement)[0].lower()
        if name in found or "extra ==" in requirement:
            continue
        try:
            names += distribution(name).requires or []
        except PackageNotFoundError:  # needed only on another system or Python version
            continue
        found.add(name)
    return found


def link_distribution(name: str, site: Path) -> None:
    """Link the top-level files and folders of an installed distribution into `site`."""
    files = distribution(name).files or []
    for part in {path.parts[0] for path in files if path.parts[0] not in ("..", "__pycache__")}:
        source = Path(str(distribution(name).locate_file(part)))
        if not (site / part).exists():
            (site / part).symlink_to(source, target_is_directory=source.is_dir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_the_converter_works_without_pop_local(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "converter", source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--target", str(site))
    subprocess.run([*pip, *options, str(source)], check=True)
    for name in with_dependencies(list(project(source)["dependencies"])):
        link_distribution(name, site)
    assert not (site / "pop_local").exists()

    model = make_gguf(tmp_path / "model.gguf", "llama")
    converted = tmp_path / "model.pop.gguf"
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, site, model, converted]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    assert shown.stdout.splitlines() == [
        f"FFFFFSSS own pop-converter {pop_converter.__version__}",
        "[]",
    ]
    before, after = (
        {t.name: t.data.tobytes() for t in GGUFReader(p).tensors} for p in (model, converted)
    )
    assert before.items() <= after.items()


def test_both_packages_have_the_same_version_and_requirements():
    assert pop_converter.__version__ == pop_local.__version__
    assert {*project(ROOT / "converter")["dependencies"]} <= {*project(ROOT)["dependencies"]}

"""Test that pop-converter converts a model without importing pop_local."""

import os
import subprocess
import sys
from pathlib import Path

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
from pathlib import Path

sys.modules["pop_local"] = None

from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import read_source
from pop_converter.popfile.format import pop_meta
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import convert

model, converted = map(Path, sys.argv[1:])
plan = make_plan(source_shape(read_source(model)), boundary=5)
convert(plan, model, converted)
meta = pop_meta(read_source(converted).first)
print(meta.schedule, meta.projection)
"""


def settings(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))


def test_converter_works_without_pop_local(tmp_path):
    model = make_gguf(tmp_path / "model.gguf", "llama")
    converted = tmp_path / "model.pop.gguf"
    command = [sys.executable, "-c", PROGRAM, model, converted]
    env = os.environ | {"PYTHONPATH": str(ROOT / "converter")}
    process = subprocess.run(
        command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    )
    assert process.stdout.split() == ["FFFFFSSS", "own"]
    before, after = (
        {t.name: t.data.tobytes() for t in GGUFReader(p).tensors} for p in (model, converted)
    )
    assert before.items() <= after.items()


def test_both_packages_have_the_same_version_and_requirements():
    assert pop_converter.__version__ == pop_local.__version__
    ours, converters = (settings(folder)["project"] for folder in (ROOT, ROOT / "converter"))
    assert {*converters["dependencies"]} <= {*ours["dependencies"]}


def test_both_wheels_contain_all_packages_of_the_converter():
    packages = {path.parent.name for path in (ROOT / "converter").glob("*/__init__.py")}
    assert packages == {"pop_base", "pop_converter"}
    for folder in (ROOT, ROOT / "converter"):
        tools = settings(folder)["tool"]["setuptools"]
        assert {f"{package}*" for package in packages} <= {*tools["packages"]["find"]["include"]}
        assert all("py.typed" in tools["package-data"][package] for package in packages)

"""Try the hooks on toy releases: hunks that fail, and code that must be read again."""

from pathlib import Path

import try_release
from pop_build.fetch import Pin
from support.building import DIFF, LINES, read, write
from try_release import compare, misfits, points

README = """# Hooks

## The next llama.cpp

1. Write the version.
2. Review:
   - `build_cvec`: check that
     it is called.
   - `llama_context::decode`: check it. Our `llama_pop_init` depends on `root`.
   - `graph.h`: read it.
   - Backends: do something without code.
     - *CUDA* (`ggml_cuda_*`) reorders nodes.
3. Run `make test`.
"""
OLD = """int other() {
    return 1;
}

int build_cvec(int x) {
    // a comment
    // another
    // a third
    return x;
}
"""


def hooks_of(folder: Path, diff: str = DIFF) -> Path:
    write(folder / "patches/README.md", README)
    write(folder / "patches/llama.cpp/0001-hook.patch", diff)
    write(folder / "patches/llama.cpp/src/llama-pop.cpp", "int ours;\n")
    return folder / "patches/llama.cpp"


def release(folder: Path, lines: list[str], graph: str = OLD) -> Path:
    """Write a release's tree with a file that the toy hook changes."""
    write(folder / "llama_cpp/__init__.py", "")
    write(folder / "vendor/llama.cpp/src/a.cpp", "\n".join(lines) + "\n")
    write(folder / "vendor/llama.cpp/src/graph.cpp", graph)
    return folder


def test_failing_hunk_does_not_stop_the_others(tmp_path):
    tree = release(tmp_path / "new", ["first", *LINES[:4], "line V", *LINES[5:]])
    n_hunks, [message] = misfits(hooks_of(tmp_path), tmp_path, tree)
    assert n_hunks == 2
    assert message == "0001-hook.patch: src/a.cpp, hunk 1 of 2: matching lines: none"
    assert "hook();" in read(tree / "vendor/llama.cpp/src/a.cpp")


def test_checklist_names_code():
    checklist = points(read(Path(try_release.__file__).parents[1] / "README.md"))
    assert len(checklist) > 20
    assert {"build_cvec", "get_n_kv"} <= {name for point in checklist for name in point.names}


def test_comparison_prints_hunks_and_checklist(tmp_path, monkeypatch, capsys):
    hooks = hooks_of(tmp_path)
    old = release(tmp_path / "old", LINES)
    new = release(tmp_path / "new", ["other", *LINES[:4], "V", *LINES[5:]], OLD.replace("x;", "y;"))
    monkeypatch.setattr(try_release, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(try_release, "find_hooks", lambda package: hooks)
    monkeypatch.setattr(try_release, "fetch_or_keep", lambda pin, folder: old)
    pin = Pin("llama-cpp-python", "1.0", "", tmp_path)
    assert not compare(pin, new)
    output = capsys.readouterr().out
    assert output.startswith("1 of 2 hunks apply.")
    assert 'Read again 1 of 4 points of "The next llama.cpp":' in output
    assert "1 changes: vendor/llama.cpp/src/graph.cpp:9" in output
    assert compare(pin, old)
    assert "Read again 0 of 4 points" in capsys.readouterr().out
    assert "hook();" not in read(old / "vendor/llama.cpp/src/a.cpp")

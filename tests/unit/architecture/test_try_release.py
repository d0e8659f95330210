"""Try the hooks on toy releases: hunks that fail, and code that must be read again."""

import subprocess
import sys
from pathlib import Path

import try_release
from pop_build.errors import BuildError
from pop_build.fetch import Pin
from support.building import DIFF, LINES, read, write
from try_release import Change, changes, compare, concerned, main, misfits, points

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


def test_all_hunks_apply_where_lines_have_moved(tmp_path):
    tree = release(tmp_path / "new", ["first", *LINES])
    assert misfits(hooks_of(tmp_path), tmp_path, tree) == (2, [])
    assert "hook();" in read(tree / "vendor/llama.cpp/src/a.cpp")


def test_a_hunk_that_fails_does_not_stop_the_others(tmp_path):
    tree = release(tmp_path / "new", ["first", *LINES[:4], "line V", *LINES[5:]])
    n_hunks, [message] = misfits(hooks_of(tmp_path), tmp_path, tree)
    assert n_hunks == 2
    assert message.startswith("0001-hook.patch does not apply to src/a.cpp: hunk 1 of 2")
    assert "expected 'line 5'" in message
    assert "hook();" in read(tree / "vendor/llama.cpp/src/a.cpp")


def test_the_second_hunk_is_named_by_its_own_number(tmp_path):
    tree = release(tmp_path / "new", [*LINES[:15], "line XVI", *LINES[16:]])
    _, [message] = misfits(hooks_of(tmp_path), tmp_path, tree)
    assert "hunk 2 of 2 (@@ -15,3 +16,4 @@)" in message


def test_missing_and_colliding_files_are_listed(tmp_path):
    tree = release(tmp_path / "new", LINES)
    (tree / "vendor/llama.cpp/src/a.cpp").unlink()
    write(tree / "vendor/llama.cpp/src/llama-pop.cpp", "theirs")
    n_hunks, found = misfits(hooks_of(tmp_path), tmp_path, tree)
    assert n_hunks == 2
    assert found[0] == "vendor/llama.cpp/src/llama-pop.cpp exists upstream: rename our file"
    assert [each.partition(": ")[0] for each in found[1:]] == ["hunk 1", "hunk 2"]
    assert all("does not exist" in each for each in found[1:])


def test_the_checklist_is_read_from_the_document():
    found = points(README)
    assert [each.names for each in found] == [
        ("build_cvec",),
        ("llama_context::decode", "root"),
        ("graph.h",),
        ("ggml_cuda_*",),
    ]
    assert found[0].text == "`build_cvec`: check that it is called."


def test_the_real_checklist_names_code():
    listed = points(read(Path(try_release.__file__).parents[1] / "README.md"))
    assert len(listed) > 20
    assert {"build_cvec", "get_n_kv"} <= {name for point in listed for name in point.names}


def test_changes_name_their_function(tmp_path):
    old = release(tmp_path / "old", LINES)
    new = release(tmp_path / "new", LINES, OLD.replace("return x", "return x + 1"))
    write(new / "docs/notes.md", "build_cvec")
    [change] = changes(old, new)
    assert (change.path, change.line) == ("vendor/llama.cpp/src/graph.cpp", 9)
    assert "int build_cvec(int x)" in change.text
    cvec, decode, *_ = points(README)
    assert concerned(cvec, [change]) == [change]
    assert concerned(decode, [change]) == []


def test_points_match_qualified_names_files_and_prefixes():
    _, decode, graph, cuda = points(README)
    common = Change("src/x.cpp", 1, "int decode() root\n")
    assert concerned(decode, [common]) == []
    found = Change("src/x.cpp", 1, "int llama_context::decode(int n)\n")
    assert concerned(decode, [common, found]) == [found]
    header = Change("src/graph.h", 1, "\n")
    assert concerned(graph, [Change("src/subgraph.h", 1, "\n"), header]) == [header]
    key = Change("src/x.cpp", 1, "ggml_cuda_graph_key()\n")
    assert concerned(cuda, [common, key]) == [key]


def test_a_comparison_prints_what_to_do(tmp_path, monkeypatch, capsys):
    hooks = hooks_of(tmp_path)
    old = release(tmp_path / "old", LINES)
    new = release(tmp_path / "new", ["other", *LINES[:4], "V", *LINES[5:]], OLD.replace("x;", "y;"))
    monkeypatch.setattr(try_release, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(try_release, "find_hooks", lambda package: hooks)
    monkeypatch.setattr(try_release, "fetch_or_keep", lambda pin, folder: old)
    pin = Pin("llama-cpp-python", "1.0", "", tmp_path)
    assert not compare(pin, new)
    shown = capsys.readouterr().out
    assert shown.startswith("1 of 2 hunks apply.")
    assert 'Read again 1 of 4 points of "The next llama.cpp":' in shown
    assert "1 changes: vendor/llama.cpp/src/graph.cpp:9" in shown
    assert compare(pin, old)
    assert "Read again 0 of 4 points" in capsys.readouterr().out
    assert "hook();" not in read(old / "vendor/llama.cpp/src/a.cpp")


def test_errors_are_one_message(monkeypatch, capsys):
    def fail(*_: str) -> str:
        raise BuildError("pip index failed: no network", "Check the network and the version.")

    monkeypatch.setattr(try_release, "_pip", fail)
    assert main([]) == 1
    assert "pip index failed" in capsys.readouterr().err
    monkeypatch.setattr(try_release, "_pip", lambda *_: "nothing")
    assert main([]) == 1
    assert main(["1", "2"]) == 2


def test_help_is_wrong_usage_without_a_traceback():
    command = [sys.executable, try_release.__file__, "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert "try a given release" in run.stderr

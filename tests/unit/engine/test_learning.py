"""Online calibration: added rows, sums and their file."""

import json
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from pop_converter.base.errors import PopError
from pop_converter.gguf.source import read_source
from pop_converter.popfile.sidecar import write_sidecar
from pop_converter.projection import Projection
from pop_local.calibration.activations import WindowReader, loaded
from pop_local.engine.learning import online_calibrator as learning
from pop_local.engine.learning.sums import Sums, SumsFile
from pop_local.engine.llama.backend import Mode
from pop_local.engine.prompt.prompt import Prompt
from support.calibrating import planned
from support.calls import never, opened, prompt
from support.synthetic import make_gguf

N = 512
LARGE = {"n_batch": N, "n_ubatch": N, "n_ctx": 4 * N}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("POP_LOCAL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(learning, "SAVED_ROWS", 0)
    return tmp_path / "state" / "learned"


@pytest.fixture
def plain(tmp_path):
    return make_gguf(tmp_path / "llama.gguf", "llama")


@pytest.fixture(params=["llama", "gemma3", "qwen3moe"])
def each(request, tmp_path):
    """Return a model of each kind: dense, with windows, with experts."""
    return make_gguf(tmp_path / f"{request.param}.gguf", request.param)


def learning_model(path, **options) -> Any:
    model = opened(path, **LARGE | options)
    model.learn(1 << 30)
    return model


def with_sidecar(folder, arch, boundary):
    path, sidecar = make_gguf(folder / f"{arch}.gguf", arch), folder / "own.pop-sidecar.gguf"
    write_sidecar(planned(path, boundary, Projection.OWN), path, sidecar)
    return path, sidecar


def read(model: Any, tokens) -> None:
    model.engine.cache.clear()
    model.read(Prompt(tokens))


def same_sums(found: Sums, wanted: Sums, boundary: int) -> None:
    ours, theirs = found.grams[boundary], wanted.grams[boundary]
    assert ours.n_rows == theirs.n_rows > 0
    for a, b in ((ours.xx, theirs.xx), *((xy, theirs.xy[layer]) for layer, xy in ours.xy.items())):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_sums_of_full_prompts_equal_a_calibrations(each):
    windows = [prompt(N, seed) for seed in range(3)]
    model = learning_model(each)
    for window in windows:
        read(model, window)
    model.engine.calibrator.work(never)
    assert model.engine.calibrator.n_rows == 3 * (N - 1)
    found, summing = model.engine.calibrator.sums(), model.engine.calibrator.summing
    wanted = Sums(dict(found.wides))
    for boundary in model.engine.calibrator.boundaries:
        wanted.grams[boundary] = summing.empty(boundary, summing.layers(boundary))
    at = summing.wanted(model.engine.calibrator.boundaries)
    with loaded(each, n_threads=1) as context:
        reading = WindowReader(context, at)
        for window in windows:
            summing.add(wanted, reading.window(window))
    for boundary in model.engine.calibrator.boundaries:
        same_sums(found, wanted, boundary)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_sums_of_refilled_rows_equal_full_prompts(arch, tmp_path, monkeypatch):
    """Rows of a deep pass equal the full model's and have the same weights."""
    path, sidecar = with_sidecar(tmp_path, arch, boundary=4)
    tokens = prompt(N)
    full, pruned = (
        learning_model(path, sidecar=sidecar, keep_states=keeps) for keeps in (False, True)
    )
    full.engine.set_mode(Mode.OFF)
    read(full, tokens)
    read(pruned, tokens)
    assert pruned.engine.calibrator.n_waiting == 0
    monkeypatch.setattr(pruned.engine.refiller, "_chunk", N)
    pruned.engine.refiller.refill()
    [seen], [refilled] = full.engine.calibrator._waiting, pruned.engine.calibrator._waiting
    assert (seen.position, seen.n_rows) == (refilled.position, refilled.n_rows) == (0, N)
    for name in ("states", "k", "v", "mass"):
        of_full, of_deep = getattr(seen, name), getattr(refilled, name)
        assert of_full.keys() == of_deep.keys()
        for layer, rows in of_full.items():
            np.testing.assert_allclose(of_deep[layer], rows, atol=1e-3)


def test_rows_that_attend_to_projected_rows_are_not_added(tmp_path):
    """Tail rows run all layers, but attend to projected rows."""
    path, sidecar = with_sidecar(tmp_path, "llama", boundary=5)
    model = learning_model(path, sidecar=sidecar, keep_states=True)
    read(model, prompt(3 * N))
    assert model.engine.calibrator.n_waiting == 0


def test_held_out_rows_are_in_no_sum(plain):
    model = learning_model(plain)
    tokens = prompt(N * 3)
    read(model, tokens)
    read(model, prompt(N * 3, seed=1))
    assert len(model.engine.calibrator.held_out) == 1
    model.engine.calibrator.work(never)
    assert model.engine.calibrator.n_rows == 5 * (N - 1)
    assert model.engine.calibrator.held_out[0].tokens.tolist() == prompt(N * 3, seed=1)[2 * N :]
    # Rereading adds nothing.
    read(model, prompt(N * 3, seed=1))
    model.engine.calibrator.work(never)
    assert (model.engine.calibrator.n_rows, len(model.engine.calibrator.held_out)) == (
        5 * (N - 1),
        1,
    )


def test_nothing_of_a_prompt_is_on_the_disk(plain, folder):
    model = learning_model(plain)
    text = "the access code of the green depot is 48151 " * 300
    tokens = model.engine.context.vocabulary.tokenize(text)[: 3 * N]
    read(model, tokens)
    model.engine.calibrator.work(never)
    model.close()
    kept = b"".join(path.read_bytes() for path in folder.iterdir())
    assert len(kept) > 10_000
    words = {b"depot", b"48151", b"access"}
    as_numbers = {np.asarray(tokens[5:9], kind).tobytes() for kind in (np.int32, np.int64)}
    assert not [each for each in words | as_numbers if each in kept]
    assert oct(folder.stat().st_mode)[-3:] == "700"


def test_concurrent_learners_share_one_file(plain, caplog):
    """All use the wider input that the first process to choose one has stored."""
    one, two = learning_model(plain), learning_model(plain)
    for seed, model in enumerate((one, two)):
        read(model, prompt(3 * N, seed))
    threads = [threading.Thread(target=m.engine.calibrator.work, args=(never,)) for m in (one, two)]
    for thread in threads:
        thread.start()
        thread.join()
    one.close()
    two.close()
    n_rows = 2 * 3 * (N - 1)
    known = SumsFile.of(read_source(plain)).known()
    assert known.n_rows[one.engine.calibrator.boundaries[0]] == n_rows
    assert "dropped" not in caplog.text
    three = learning_model(plain)
    read(three, prompt(3 * N, 3))
    three.engine.calibrator.work(never)
    three.close()
    assert three.engine.calibrator.n_rows == n_rows + 3 * (N - 1)


def test_a_damaged_file_is_replaced_with_a_warning(plain, folder, caplog):
    model = learning_model(plain)
    read(model, prompt(2 * N))
    model.engine.calibrator.work(never)
    model.close()
    [path] = folder.glob("*.sums.npz")
    path.write_bytes(path.read_bytes()[:-5000])
    other = learning_model(plain)
    assert other.engine.calibrator.n_rows == 0 and "damaged" in caplog.text
    assert list(folder.glob("*.damaged")) and not path.exists()


ADDING = """
import sys
from pathlib import Path
import numpy as np
from pop_converter.fit.least_squares import Gram
from pop_local.engine.learning.sums import Sums, SumsFile

gram = Gram(np.ones((900, 900), np.float32), {2: np.ones((900, 64), np.float32)}, 1)
print("begun", flush=True)
while True:
    SumsFile(Path(sys.argv[1]), "model").add(Sums(grams={1: gram}), {1: ["fitted"]})
"""


def test_a_kill_at_any_time_leaves_whole_sums(tmp_path):
    file = SumsFile(tmp_path / "learned" / "model.sums.npz", "model")
    seen = 0
    for number in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", ADDING, str(file.path)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None and child.stdout.readline()
        time.sleep(0.05 + 0.03 * number)
        child.kill()
        child.wait()
        grams = file.load().grams
        n_rows = grams[1].n_rows if grams else 0
        assert n_rows >= seen
        seen = n_rows
        assert not grams or (grams[1].xx == n_rows).all()
    assert seen > 1
    assert not list(tmp_path.rglob("*.damaged"))


def test_rows_beyond_the_memory_limit_are_counted_and_dropped(plain):
    model = learning_model(plain)
    model.engine.calibrator._room_bytes = 1_000_000
    read(model, prompt(3 * N))
    assert model.engine.calibrator.n_missed > 0
    assert model.engine.calibrator._waiting_bytes <= 1_000_000


def test_row_buffers_are_reused_despite_decoded_tokens(plain):
    model = learning_model(plain)
    read(model, prompt(2 * N))
    model.engine.calibrator._waiting.clear()
    model.engine.calibrator._used.extend(blocks := [np.empty(10**6, np.float32)])
    model.engine.sequences[0].step(5)
    assert model.engine.calibrator._used == blocks


def test_insufficient_memory_is_an_error(plain):
    with pytest.raises(PopError, match="not enough free memory"):
        opened(plain, **LARGE).learn(1000)


def test_rows_without_attention_are_added(each):
    """Without attention cells, all rows have equal weights."""
    model = learning_model(each)
    read(model, prompt(N))
    [tapped] = model.engine.calibrator._waiting
    summing, boundary = model.engine.calibrator.summing, model.engine.calibrator.boundaries[0]
    wides = {boundary: summing.choose_input(boundary, [summing.state(boundary, tapped)])}
    found, wanted = (Sums(wides, {boundary: summing.empty(boundary, [7])}) for _ in range(2))
    for mass in tapped.mass.values():
        mass[:] = 1
    summing.add(wanted, tapped)
    tapped.mass.clear()
    summing.add(found, tapped)
    same_sums(found, wanted, boundary)


def test_candidates_are_the_deepest_that_memory_allows(each):
    every = learning_model(each).engine.calibrator
    assert every.boundaries == tuple(sorted(every.boundaries)) and every.boundaries[0] == 4
    few: Any = opened(each, **LARGE)
    few.learn(2 * every._sums_bytes(4) + 1000)
    assert few.engine.calibrator.boundaries == (4,)


def test_learning_is_optional_and_has_a_goal(plain):
    model = learning_model(plain)
    assert model.engine.calibrator.n_wanted == learning.ROWS_TO_FIT * 128
    assert opened(plain, **LARGE).engine.calibrator is None


# --- damaged or hostile files

HEADS: dict[str, Any] = {
    "no object": [],
    "no list": {"grams": None},
    "short": {"grams": [[4]]},
    "text": {"grams": "abc"},
    "boundary": {"grams": [["4", [5], 9]]},
    "mixed": {"grams": [[4, [5, 6, 7], 9], ["x", [5], 9]]},
    "list": {"grams": [[[4], [5], 9]]},
    "float": {"grams": [[4.0, [5], 9]]},
    "large": {"grams": [[10**30, [5], 9]]},
    "rows": {"grams": [[4, [5, 6, 7], "many"]]},
    "infinite": {"grams": [[4, [5, 6, 7], float("inf")]]},
    "no kinds": {"kinds": None},
    "kinds": {"kinds": {"x": ["own"]}},
}
ARRAYS: dict[str, Any] = {
    "integers": {"xx.4": np.zeros((225, 225), np.int8)},
    "shape": {"xy.4.5": np.zeros((2, 2), np.float32)},
    "not finite": {"xy.4.5": np.full((225, 128), np.nan, np.float32)},
    "input": {"previous.4": np.zeros((2, 2), np.float32)},
    "words": {"previous.4": np.array("x")},
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Return the arrays of a file with one window's sums. Read only."""
    folder = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POP_LOCAL_STATE_DIR", str(folder))
        patch.setattr(learning, "SAVED_ROWS", 0)
        with learning_model(make_gguf(folder / "llama.gguf", "llama")) as model:
            read(model, prompt(N))
            model.engine.calibrator.work(never)
        return dict(np.load(model.engine.calibrator.file.path))


@pytest.mark.parametrize("case", [*HEADS, *ARRAYS, "nested"])
def test_hostile_sums_file_is_set_aside(plain, case, learned):
    file, good = SumsFile.of(read_source(plain)), dict(learned)
    file.path.parent.mkdir(parents=True)
    head = json.loads(str(good["head"]))
    if case in HEADS:
        change = HEADS[case]
        good["head"] = np.array(json.dumps(head | change if change else change))
    elif case == "nested":
        good["head"] = np.array("[" * 100_000)
    np.savez(file.path, **(good | ARRAYS.get(case, {})))
    with learning_model(plain) as model:
        read(model, prompt(N, 1))
        model.engine.calibrator.work(never)
    assert file.path.with_suffix(".damaged").exists()
    assert set(file.known().n_rows.values()) == {N - 1}

"""Open files with the keys that each earlier version of the converter wrote.

earlier_formats.json contains the POP keys of the sidecars that the repository shipped, one entry
for each set of keys, and of two formats that the repository never shipped. `commit` is the first
commit that wrote the set. Add an entry when `convert` writes other keys.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pop_base.errors import FormatError
from pop_converter.gguf.header import read_header
from pop_converter.popfile.format import (
    Budget,
    Calibration,
    DeepRows,
    Measured,
    PopMeta,
    encode_keys,
    pop_meta,
)
from pop_converter.projection import Projection
from support.calls import evaluated, opened, prompt
from support.converted import Pair, paired
from support.pop_files import add_to
from support.shapes import read_pop_meta
from support.synthetic import make_gguf

FORMATS = json.loads(Path(__file__).with_name("earlier_formats.json").read_text(encoding="utf-8"))
REMOVED = "fitted-attention"
OPENED = [each for each in FORMATS if each["keys"]["pop.projection"] != REMOVED]
REFUSED = [each for each in FORMATS if each["keys"]["pop.projection"] == REMOVED]
BOUNDARY = 4
PROMPT = prompt(120)


def name_of(entry: dict[str, Any]) -> str:
    return f"{entry['name']}, {entry['commit']}"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("pairs")
    base = make_gguf(folder / "llama.gguf", "llama")
    projections = {entry["keys"]["pop.projection"] for entry in OPENED}
    pairs = {}
    for projection in sorted(projections):
        (folder / projection).mkdir()
        pairs[projection] = paired(base, folder / projection, projection, boundary=BOUNDARY)
    return pairs


def written(entry: dict[str, Any], src: Path, dst: Path) -> Path:
    """Write a copy of a file whose POP keys, except a sidecar's binding, are the entry's."""
    keys = entry["keys"] | {"pop.schedule": "F" * BOUNDARY + "S" * (8 - BOUNDARY)}
    return add_to(src, dst, keys, kept="pop.sidecar.")


@pytest.mark.parametrize("entry", OPENED, ids=name_of)
@pytest.mark.parametrize("form", ["single", "sidecar"])
def test_files_of_every_earlier_format_open(pairs, tmp_path, entry, form):
    pair, keys = pairs[entry["keys"]["pop.projection"]], entry["keys"]
    if form == "sidecar":
        sidecar = written(entry, pair.sidecar, tmp_path / "old.pop-sidecar.gguf")
        model, meta = opened(pair.base, sidecar=sidecar), read_pop_meta(sidecar)
    else:
        single = written(entry, pair.single, tmp_path / "old.gguf")
        model, meta = opened(single), read_pop_meta(single)
    assert meta is not None
    assert meta.source_name == keys["pop.source.name"]
    assert meta.tail_tokens == keys["pop.tail_tokens"]
    measured = meta.measured.kl_mean if meta.measured else None
    assert measured == pytest.approx(keys.get("pop.measured.kl_mean"))
    # The sink, the tail, and the tokens that the file's rule selects run through all layers.
    n_ends = meta.sink_tokens + meta.tail_tokens
    assert 0 < evaluated(model, PROMPT).n_context <= len(PROMPT) - n_ends


@pytest.mark.parametrize("entry", REFUSED, ids=name_of)
def test_removed_projection_is_refused_with_a_hint(pairs, tmp_path, entry):
    path = written(entry, pairs["own"].single, tmp_path / "old.gguf")
    with pytest.raises(
        FormatError, match=f"pop.projection has an unknown value: '{REMOVED}'"
    ) as it:
        pop_meta(read_header(path))
    assert it.value.hint == "update pop-local, or convert the model again"


def test_entries_differ_from_each_other():
    sets = [(entry["keys"]["pop.projection"], *sorted(entry["keys"])) for entry in FORMATS]
    assert len(set(sets)) == len(FORMATS) == 12


def test_each_key_of_this_version_has_an_entry():
    """Require an entry for new keys, so that later versions still open this version's files."""
    groups = (Calibration("text", "0" * 64, 9, 0.1), Measured(), Budget("fast", 0.1, 1.1, "", 2, 1))
    meta = PopMeta("FS", Projection.OWN, 1, 16, 64, DeepRows.NAMES, "model", "0" * 64, "pop-local")
    calibration, measured, budget = groups
    meta = replace(meta, calibration=calibration, measured=measured, budget=budget)
    written_now = {re.findall(rb"pop\.[a-z0-9_.]+", key)[0].decode() for key in encode_keys(meta)}
    assert len(written_now) == 40
    assert written_now in [set(entry["keys"]) for entry in FORMATS]

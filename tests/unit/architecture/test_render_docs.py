"""Check that the documents' tables equal the stored results (tests/bench/render_docs.py)."""

import re
import sys
from pathlib import Path

import pytest

from pop_converter.gguf.header import read_header
from pop_converter.popfile.sidecar import sidecar_meta
from pop_local.measure.budget import BUDGETS
from pop_local.models.model_names import load_catalog
from support.paths import ROOT, TESTS

sys.path.append(str(TESTS / "bench"))
import doc_figures
import render_docs

SHIPPED = ROOT / "pop_local" / "data" / "sidecars"
LOOK_UPS = ("n", "full", "pruned", "lost", "gained")


@pytest.mark.parametrize(
    "path", render_docs.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)
def test_tables_are_rendered(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert render_docs.rendered(text) == text, "run `make docs`"


def test_each_result_is_shown_with_its_origin() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in render_docs.DOCUMENTS)
    for path in doc_figures.RESULTS.glob("*.json"):
        kept = render_docs.read(path.stem)
        assert kept["commands"] and kept["machine"] and kept["versions"] and kept["date"]
        assert f"<!-- table {path.stem}" in text
        names = {column["name"] for column in kept["columns"]}
        assert all(names.issuperset(row.keys() - {"lookups"}) for row in kept["rows"])


def test_budget_table_has_the_limits() -> None:
    rows = {row["quality"].split(" ")[0]: row for row in render_docs.read("budgets")["rows"]}
    assert rows.keys() == BUDGETS.keys()
    for quality, budget in BUDGETS.items():
        row = rows[quality]
        assert (row["kl"], row["ppl_ratio"], row["copy_ppl_ratio"]) == (
            budget.max_kl,
            budget.max_ppl_ratio,
            budget.max_copy_ratio,
        )
        assert row["lookups_lost"] == budget.max_lost_lookups
        assert f"| {budget.max_lost_lookups:.0%} |" in render_docs.kept_table("budgets", None)


def test_figures_of_shipped_sidecars_equal_their_files() -> None:
    rows = {row["name"]: row for row in doc_figures.read("shipped")["rows"]}
    for model in load_catalog():
        row = rows.pop(model.short_name)
        path = SHIPPED / model.file.replace(".gguf", ".pop-sidecar.gguf")
        meta = sidecar_meta(read_header(path))
        assert meta.measured is not None
        skipped = f"{meta.n_layer - meta.boundary} of {meta.n_layer}"
        assert row["skipped"].startswith(skipped)
        assert row["same_first"] == round(meta.measured.top1_agreement, 3)
        assert row["kl"] == [round(meta.measured.kl_mean, 4), round(meta.measured.kl_se, 4)]
        assert row["ppl_ratio"][0] == round(meta.measured.ppl_ratio, 3)
        assert row["copy_ppl_ratio"][0] == round(meta.measured.copy_ppl_ratio, 3)
        counts = {key: getattr(meta.measured, f"lookups_{key}") for key in LOOK_UPS}
        assert counts == {key: row["lookups"][key] for key in LOOK_UPS}
    assert not rows


def test_documents_quote_the_speeds_of_one_machine() -> None:
    shipped = doc_figures.read("shipped")
    for row in shipped["rows"]:
        assert row["pruned"] / row["full"] == pytest.approx(row["speedup_2048"][0], abs=0.01)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quality = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8").split("\n## ")[0]
    origin = doc_figures.origin("shipped", "").strip()
    for text in (readme, quality):
        assert text.count(origin) == 1 and text.count(shipped["machine"]) == 1
        # A ratio is rendered, so that it changes with the results.
        prose = re.sub(r"<!-- (figure|table).*?<!-- end -->|^ {4}.*$", "", text, flags=re.S | re.M)
        assert not re.search(r"\d\.\d+x?( to \d\.\d+)? times|\d\.\d+x", prose)


def test_tables_for_users_show_ratios_look_ups_and_limits() -> None:
    [row] = [line for line in doc_figures.summary().splitlines() if "`smollm2`" in line]
    assert re.search(r"\| [\d.]+ s \(\d\.\dx\) \| [\d.]+ s \(\d\.\dx\) \|", row)
    assert row.endswith("| 28 of 200 | 28 of 28 |"), "a small model finds few strings"
    [row] = [line for line in doc_figures.models_table().splitlines() if "`gemma3`" in line]
    assert "| base | `fast` |" in row


def test_chart_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    render_docs.draw(tmp_path / "ttft.png")
    assert (tmp_path / "ttft.png").stat().st_size > 10_000

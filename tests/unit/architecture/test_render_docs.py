"""Check that the documents' tables equal the stored results (tests/bench/render_docs.py)."""

import re
import sys
from pathlib import Path
from typing import Any

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
    shown = "".join(path.read_text(encoding="utf-8") for path in render_docs.DOCUMENTS)
    for path in doc_figures.RESULTS.glob("*.json"):
        kept = render_docs.read(path.stem)
        assert kept["commands"] and kept["machine"] and kept["versions"] and kept["date"]
        assert f"<!-- table {path.stem}" in shown
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


def test_cells_use_the_format_up_to_their_number_of_values() -> None:
    layout = "{:.2f}x ({:.2f}-{:.2f})"
    assert render_docs.cell_text([1.5, 1, 2], layout) == "1.50x (1.00-2.00)"
    assert render_docs.cell_text(1.5, layout) == "1.50x"
    assert render_docs.cell_text({"value": [1.5], "note": "*"}, layout) == "1.50x *"
    assert render_docs.cell_text("not tried", layout) == "not tried"
    assert render_docs.cell_text(None, layout) == ""


def test_repeated_names_are_omitted_and_columns_are_selected() -> None:
    columns = [{"name": "a", "title": "A"}, {"name": "b", "title": "B", "format": "{:.0%}"}]
    made = render_docs.table(columns, [{"a": "x", "b": 0.5}, {"a": "x", "b": 1}])
    assert made == "| A | B |\n|---|---:|\n| x | 50% |\n|  | 100% |\n"
    text = "<!-- table budgets: quality, kl -->\n<!-- end -->\n"
    assert "copy" not in render_docs.rendered(text) and "balanced" in render_docs.rendered(text)


def test_look_ups_fill_their_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [{"name": "model", "title": "model"}]
    found = {"n": 200, "full": 180, "pruned": 177, "lost": 4, "gained": 1, "p": 0.375}
    kept: Any = {"columns": columns, "rows": [{"model": "M", "lookups": found}, {"model": "N"}]}
    kept |= {"commands": [], "machine": "here", "date": ""}
    monkeypatch.setattr(render_docs, "read", lambda _: kept)
    cells = "| 180 of 200 | 177 of 200 | 4 of 180 | 0.38 |"
    chosen = "model, lookups_full, lookups_pruned, lookups_lost, lookups_p"
    shown = render_docs.rendered(f"<!-- table any: {chosen} -->\n<!-- end -->\n")
    assert f"| M {cells}" in shown and "| N |  |  |  |  |" in shown


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


def test_figures_are_computed_from_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    row: Any = {"llama": 10, "full": 20, "pruned": 30}
    row |= {"lookups": {"full": 5, "lost": 1}}
    rows = [row, row | {"full": 40, "pruned": 40}]
    monkeypatch.setattr(doc_figures, "read", lambda _: {"rows": rows})
    names = ("kernels", "saved", "lookups")
    text = "".join(f"<!-- figure {name} -->old<!-- end -->\n" for name in names)
    shown = re.sub("<!--.*?-->", "", render_docs.rendered(text)).split("\n")[:-1]
    assert shown == ["2.0 to 4.0", "0 to 33", "8 of 10"]


def test_tables_for_users_show_ratios_look_ups_and_limits() -> None:
    [row] = [line for line in doc_figures.summary().splitlines() if "`smollm2`" in line]
    assert re.search(r"\| [\d.]+ s \(\d\.\dx\) \| [\d.]+ s \(\d\.\dx\) \|", row)
    assert row.endswith("| 28 of 200 | 28 of 28 |"), "a small model finds few strings"
    [row] = [line for line in doc_figures.models_table().splitlines() if "`gemma3`" in line]
    assert "| base | `fast` |" in row


def test_sizes_of_hub_models_follow_from_their_names() -> None:
    assert doc_figures.billions("qwen3-30b-a3b") == 30 and doc_figures.billions("phi-4") == 14.7
    assert all(doc_figures.billions(name) > 0 for name in doc_figures.hub_names())
    assert doc_figures.PARAMETERS.keys() <= doc_figures.hub_names().keys()


def test_chart_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    render_docs.draw(tmp_path / "ttft.png")
    assert (tmp_path / "ttft.png").stat().st_size > 10_000

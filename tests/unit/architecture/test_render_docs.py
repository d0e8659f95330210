"""Check that the documents' tables equal the stored results (tests/bench/render_docs.py)."""

import sys
from pathlib import Path
from typing import Any

import pytest

from pop_local.measure.budget import BUDGETS
from support.paths import ROOT, TESTS

sys.path.append(str(TESTS / "bench"))
import render_docs


@pytest.mark.parametrize(
    "path", render_docs.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)
def test_tables_are_rendered(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert render_docs.rendered(text) == text, "run `make docs`"


def test_each_result_is_shown_with_its_origin() -> None:
    shown = "".join(path.read_text(encoding="utf-8") for path in render_docs.DOCUMENTS)
    for path in render_docs.RESULTS.glob("*.json"):
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
    columns += [
        {"name": name, "title": name} for name in ("skipped", "ppl_ratio", "copy_ppl_ratio")
    ]
    found = {"n": 200, "full": 180, "pruned": 177, "lost": 4, "gained": 1, "p": 0.375}
    row = {"model": "M", "llama": 1.0, "full": 2.0, "pruned": 3.0}
    kept: Any = {"columns": columns, "rows": [row | {"lookups": found}, row | {"model": "N"}]}
    kept |= {"commands": [], "machine": "here", "date": ""}
    monkeypatch.setattr(render_docs, "read", lambda _: kept)
    cells = "| 180 of 200 | 177 of 200 | 4 of 180 | 0.38 |"
    chosen = "model, lookups_full, lookups_pruned, lookups_lost, lookups_p"
    shown = render_docs.rendered(f"<!-- table any: {chosen} -->\n<!-- end -->\n")
    assert f"| M {cells}" in shown and "| N |  |  |  |  |" in shown
    shown = render_docs.rendered("<!-- table summary -->\n<!-- end -->\n")
    assert cells in shown and "lost of full" in shown and "| 1, 2, 3 |" in shown


def test_chart_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    render_docs.draw(tmp_path / "ttft.png")
    assert (tmp_path / "ttft.png").stat().st_size > 10_000

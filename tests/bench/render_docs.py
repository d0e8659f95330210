"""Render the documents' tables and the README's chart from docs/results.

    python tests/bench/render_docs.py [--no-chart]        (make docs)

`<!-- table NAME -->` in a document, or `<!-- table NAME: COLUMN, COLUMN -->` for some columns,
starts a table; all lines up to `<!-- end -->` are replaced. A result is a JSON file: columns with a
title and a format, rows, and the machine. A cell is null, a text, a list of numbers for the format
or for its first part, or an object with such a `value` and its own `note` or `format`. A row's
`lookups`, as `pop-local eval --json` prints them, fill the columns of LOOKUPS, which a result need
not list. A `source` replaces the sentence about commands, machine and date.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
CHART = ROOT / "docs" / "images" / "ttft.png"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_TABLE = re.compile(r"(<!-- table ([\w-]+)(?:: ([^>]*?))? -->\n).*?(<!-- end -->)", re.S)
# Tokens of the chart's prompts.
_N_CHARTED = 2048
_BARS = {"llama": "llama.cpp", "full": "pop-local, in full", "pruned": "pop-local, pruned"}

Row: TypeAlias = dict[str, Any]
# Columns of a row's `lookups`, and the counts that each shows.
LOOKUPS: list[Row] = [
    {"name": "lookups_full", "title": "look-ups, full", "format": "{} of {}", "of": ["full", "n"]},
    {"name": "lookups_pruned", "title": "pruned", "format": "{} of {}", "of": ["pruned", "n"]},
    {"name": "lookups_lost", "title": "lost of full", "format": "{} of {}", "of": ["lost", "full"]},
    {"name": "lookups_p", "title": "p", "format": "{:.2g}", "of": ["p"]},
]


def read(name: str) -> Any:
    """Return a stored result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def cell_text(value: Any, layout: str) -> str:
    """Return a cell; with fewer values than the layout has, use its first part."""
    if isinstance(value, dict):
        text = cell_text(value["value"], value.get("format", layout))
        return f"{text} {value['note']}" if "note" in value else text
    if value is None or isinstance(value, str):
        return value or ""
    values = value if isinstance(value, list) else [value]
    parts = re.split(r"(?= ± | \()", layout)
    while len(parts) > 1 and "".join(parts).count("{") > len(values):
        parts.pop()
    return "".join(parts).format(*values)


def table(columns: list[Row], rows: list[Row]) -> str:
    """Return a Markdown table; a repeated name in the first column is left out."""
    lines = [
        "| " + " | ".join(column["title"] for column in columns) + " |",
        "|" + "|".join("---:" if "format" in column else "---" for column in columns) + "|",
    ]
    before = None
    for row in rows:
        cells = [cell_text(row.get(c["name"]), c.get("format", "{}")) for c in columns]
        if cells[0] == before:
            cells[0] = ""
        before = cells[0] or before
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_lookups(row: Row) -> Row:
    """Return the row with a cell for each column of LOOKUPS if look-ups were measured."""
    if (found := row.get("lookups")) is None:
        return row
    return row | {c["name"]: [found[name] for name in c["of"]] for c in LOOKUPS}


def kept_table(name: str, chosen: str | None) -> str:
    """Return a result's table with the chosen columns, and its commands and machine."""
    kept = read(name)
    columns = kept["columns"]
    if chosen:
        by_name = {column["name"]: column for column in [*LOOKUPS, *columns]}
        columns = [by_name[column] for column in chosen.split(", ")]
    commands = " and ".join(f"`{command}`" for command in kept["commands"])
    when = f"on {kept['date']}, with {commands} on {kept['machine']}"
    source = kept.get("source", f"These figures were measured {when}.")
    notes = f" {kept['notes']}." if "notes" in kept else ""
    return f"\n{table(columns, [*map(with_lookups, kept['rows'])])}\n{source}{notes}\n"


def summary() -> str:
    """Return README's table: the shipped sidecars' losses and speeds."""
    shipped = read("shipped")
    columns = {column["name"]: column for column in shipped["columns"]}
    rows = [
        with_lookups(row) | {"speeds": [row[name] for name in _BARS]} for row in shipped["rows"]
    ]
    title = "tokens/s: llama.cpp, ours in full, pruned"
    shown = [columns["model"], columns["skipped"]]
    shown += [{"name": "speeds", "title": title, "format": "{:,.0f}, {:,.0f}, {:,.0f}"}]
    shown += [columns[name] for name in ("ppl_ratio", "copy_ppl_ratio")]
    return table([*shown, *LOOKUPS], rows)


def rendered(text: str) -> str:
    """Return a document with its tables replaced."""

    def anew(found: re.Match[str]) -> str:
        begin, name, chosen, end = found.groups()
        return begin + (summary() if name == "summary" else kept_table(name, chosen)) + end

    return _TABLE.sub(anew, text)


def draw(path: Path) -> None:
    """Draw the time to first token: tokens of the prompt over tokens per second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shipped = read("shipped")
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for at, (name, color) in enumerate(zip(_BARS, ("#b8b8b8", "#7aa6d8", "#1f5fa8"), strict=True)):
        heights = [_N_CHARTED / row[name] for row in shipped["rows"]]
        places = [place + (at - 1) * 0.27 for place in range(len(heights))]
        bars = axes.bar(places, heights, 0.26, label=_BARS[name], color=color)
        axes.bar_label(bars, [f"{height:.1f}" for height in heights], fontsize=8)
    axes.set_yscale("log")
    axes.set_ylim(0.5, 130)
    names = [f"{row['model'].split(' ')[0]}\n{_N_CHARTED:,} tokens" for row in shipped["rows"]]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("seconds (log scale)", fontsize=8)
    axes.set_title(f"Time to first token, {shipped['machine']}", fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-chart", action="store_true", help="tables alone; no matplotlib")
    for document in DOCUMENTS:
        before = document.read_text(encoding="utf-8")
        if (after := rendered(before)) != before:
            document.write_text(after, encoding="utf-8")
    if not parser.parse_args().no_chart:
        draw(CHART)

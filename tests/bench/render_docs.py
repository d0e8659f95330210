"""Render the documents' tables and the README's chart from docs/results.

    python tests/bench/render_docs.py [--no-chart]        (make docs)

`<!-- table NAME -->` in a document, or `<!-- table NAME: COLUMN, COLUMN -->` for selected columns,
starts a table; all lines up to `<!-- end -->` are replaced. `<!-- figure NAME -->` starts a figure,
which also ends at `<!-- end -->`. doc_figures.py defines the figures and the user docs' tables.

A result is a JSON file: columns with a title and a format, rows, and the machine. A cell is null, a
string, a list of numbers for the format or its first part, or an object with such a `value` and
its own `note` or `format`. A row's `lookups`, as `pop-local eval --json` prints them, fill the
columns of LOOKUPS, which a result need not list. A `commit` names the version that contains the
program of the commands, if it was removed since. A `source` replaces the sentence about commands,
machine, and date.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from doc_figures import FIGURES, N_PROMPT, ROOT, TABLES, WAYS, Row, read

CHART = ROOT / "docs" / "images" / "ttft.png"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_TABLE = re.compile(r"(<!-- table ([\w-]+)(?:: ([^>]*?))? -->\n).*?(<!-- end -->)", re.S)
_FIGURE = re.compile(r"(<!-- figure ([\w.-]+) -->)[^<]*(<!-- end -->)")
# Columns of a row's `lookups`, and the counts that each shows.
LOOKUPS: list[Row] = [
    {"name": "lookups_full", "title": "look-ups, full", "format": "{} of {}", "of": ["full", "n"]},
    {"name": "lookups_pruned", "title": "pruned", "format": "{} of {}", "of": ["pruned", "n"]},
    {"name": "lookups_lost", "title": "lost of full", "format": "{} of {}", "of": ["lost", "full"]},
    {"name": "lookups_p", "title": "p", "format": "{:.2g}", "of": ["p"]},
]


def cell_text(value: Any, layout: str) -> str:
    """Return a cell's text; if values are missing, use only the first part of the layout."""
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
    """Return a Markdown table that omits repeated names in the first column."""
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
    """Return the row, with a cell for each column of LOOKUPS if look-ups were measured."""
    if (found := row.get("lookups")) is None:
        return row
    return row | {c["name"]: [found[name] for name in c["of"]] for c in LOOKUPS}


def kept_table(name: str, chosen: str | None) -> str:
    """Return a result's table with the chosen columns, followed by its commands and machine."""
    kept = read(name)
    columns = kept["columns"]
    if chosen:
        by_name = {column["name"]: column for column in [*LOOKUPS, *columns]}
        columns = [by_name[column] for column in chosen.split(", ")]
    commit = f" (at commit {kept['commit']})" if "commit" in kept else ""
    commands = [f"`{command}`" for command in kept["commands"]]
    separator = ", and " if len(commands) > 2 else " and "
    listed = separator.join(filter(None, (", ".join(commands[:-1]), *commands[-1:])))
    ran = f"On {kept['date']}, we ran {listed}{commit} on {kept['machine']}."
    source = kept.get("source", ran)
    notes = f" {kept['notes']}." if "notes" in kept else ""
    return f"\n{table(columns, [*map(with_lookups, kept['rows'])])}\n{source}{notes}\n"


def rendered(text: str) -> str:
    """Return a document with its tables and figures replaced."""

    def table_of(found: re.Match[str]) -> str:
        begin, name, chosen, end = found.groups()
        return begin + (TABLES[name]() if name in TABLES else kept_table(name, chosen)) + end

    def figure_of(found: re.Match[str]) -> str:
        return found[1] + FIGURES[found[2]]() + found[3]

    return _FIGURE.sub(figure_of, _TABLE.sub(table_of, text))


def draw(path: Path) -> None:
    """Draw the time to first token: prompt tokens divided by tokens per second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shipped = read("shipped")
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for at, (name, color) in enumerate(zip(WAYS, ("#b8b8b8", "#7aa6d8", "#1f5fa8"), strict=True)):
        heights = [N_PROMPT / row[name] for row in shipped["rows"]]
        places = [place + (at - 1) * 0.27 for place in range(len(heights))]
        bars = axes.bar(places, heights, 0.26, label=WAYS[name], color=color)
        axes.bar_label(bars, [f"{height:.1f}" for height in heights], fontsize=8)
    axes.set_yscale("log")
    axes.set_ylim(0.5, 130)
    names = [f"{row['model'].split(' ')[0]}\n{N_PROMPT:,} tokens" for row in shipped["rows"]]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("seconds (log scale)", fontsize=8)
    axes.set_title(f"Time to first token, {shipped['machine']}", fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-chart", action="store_true", help="skip the chart (and matplotlib)")
    for document in DOCUMENTS:
        before = document.read_text(encoding="utf-8")
        if (after := rendered(before)) != before:
            document.write_text(after, encoding="utf-8")
    if not parser.parse_args().no_chart:
        draw(CHART)

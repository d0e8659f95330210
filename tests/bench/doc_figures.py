"""Figures and tables for the user docs, computed from docs/results and the catalog.

render_docs.py inserts a figure from FIGURES at `<!-- figure NAME -->`, and a table from TABLES at
`<!-- table NAME -->`.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
# A clone's own packages come first, so that an installed copy never supplies an old catalog.
sys.path[:0] = [str(ROOT), str(ROOT / "converter")]

from pop_converter.gguf.header import read_header  # noqa: E402
from pop_converter.popfile.sidecar import SUFFIX, sidecar_meta  # noqa: E402
from pop_local.models.model_names import CatalogModel, hub_names, load_catalog  # noqa: E402
from pop_local.models.sidecars import SHIPPED  # noqa: E402

# Tokens of the prompt in the users' tables and the chart.
N_PROMPT = 2048
# Ways of reading, and their names for users.
WAYS = {"llama": "llama.cpp", "full": "pop-local", "pruned": "with fast reading"}
# Billions of parameters of hub models whose names leave them out.
PARAMETERS = {
    "smollm2-360m": 0.36,
    "gemma-3n-e2b": 4.5,
    "gemma-3n-e4b": 6.9,
    "phi-3.5-mini": 3.8,
    "phi-4-mini": 3.8,
    "phi-4": 14.7,
    "mistral-nemo": 12.2,
    "mistral-small-3.2": 24.0,
}
# Estimates: bytes per parameter with Q4_K_M, and memory for a context and the program.
GB_PER_BILLION = 0.61
MORE_GB = 1.0
Row: TypeAlias = dict[str, Any]


def read(name: str) -> Any:
    """Return a stored result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; a title that starts with a space is right-aligned."""
    titles = list(titles)
    lines = [
        "| " + " | ".join(title.strip() for title in titles) + " |",
        "|" + "|".join("---:" if title.startswith(" ") else "---" for title in titles) + "|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def amount(n_bytes: float) -> str:
    """Return a byte count in readable form: 98 MB, 1.1 GB."""
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.1f} GB"


def seconds(tokens_per_s: float) -> str:
    """Return the time to read the prompt."""
    return f"{N_PROMPT / tokens_per_s:.1f} s"


def users_rows() -> list[Row]:
    """Return the catalog's models with their figures from the results."""
    shipped = {row["name"]: row for row in read("shipped")["rows"]}
    memory = {row["name"]: row for row in read("models")["rows"]}
    return [
        {**shipped[model.short_name], **memory[model.short_name], "catalog": model}
        for model in load_catalog()
    ]


def kept(row: Row) -> str:
    """Return how many of the full model's correct look-ups fast reading keeps."""
    found = row["lookups"]
    return f"{found['full'] - found['lost']} of {found['full']}"


def origin(name: str, verb: str = "We measured these values") -> str:
    """Return the sentence with a result's machine and date."""
    result = read(name)
    return f"{verb} on {result['machine']} on {result['date']}."


def summary() -> str:
    """Return the README's table for users."""
    titles = ["model", " file", " RAM", *(f" {way}" for way in WAYS.values())]
    titles += [" same next word", " correct look-ups", " still correct"]
    rows = []
    for row in users_rows():
        cells = [f"`{row['name']}`", amount(row["catalog"].size_bytes), amount(row["ram"])]
        cells.append(seconds(row["llama"]))
        for way in ("full", "pruned"):
            cells.append(f"{seconds(row[way])} ({row[way] / row['llama']:.1f}x)")
        found = row["lookups"]
        cells += [f"{row['same_first']:.0%}", f"{found['full']} of {found['n']}", kept(row)]
        rows.append(cells)
    return f"\n{markdown(titles, rows)}\n{origin('shipped', 'We measured the times')}\n"


def verdict() -> str:
    """Return quality.md's first table."""
    titles = ["model", " same next word", " predicts text worse by", " repeats text worse by"]
    rows = [
        [
            f"`{row['name']}`",
            f"{row['same_first']:.1%}",
            f"{row['ppl_ratio'][0] - 1:.1%}",
            f"{row['copy_ppl_ratio'][0] - 1:.1%}",
            kept(row),
        ]
        for row in users_rows()
    ]
    return f"\n{markdown([*titles, ' exact strings kept'], rows)}\n{origin('shipped')}\n"


def machines() -> str:
    """Return the kernels' speeds on both machines for one prompt length."""
    amx = {row["model"]: row for row in read("speeds")["rows"] if row["tokens"] == N_PROMPT}
    titles = ["model", *(f" {text}" for text in ("llama.cpp", "pop-local", "faster by") * 2)]
    rows = []
    for row in users_rows():
        there = amx[row["model"]]
        pairs = [(row["llama"], row["full"]), (there["llama"][0], there["full"][0])]
        cells = [[f"{a:,.0f}", f"{b:,.0f}", f"{b / a:.1f}x"] for a, b in pairs]
        rows.append([f"`{row['name']}`", *cells[0], *cells[1]])
    measured = zip(MACHINES, ("first", "last"), strict=True)
    verb = "We measured the values in the"
    origins = [origin(name, f"{verb} {which} three columns") for name, which in measured]
    return f"\n{markdown(titles, rows)}\n{' '.join(origins)}\n"


MACHINES = ("shipped", "speeds")


def quality_limits(model: CatalogModel) -> str:
    """Return the quality level whose limits a model's shipped sidecar meets."""
    meta = sidecar_meta(read_header(SHIPPED / f"{Path(model.file).stem}{SUFFIX}"))
    return f"`{meta.budget.quality}`" if meta.budget else "none"


def models_table() -> str:
    """Return the models with shipped sidecars."""
    titles = ["name", " file", " RAM", " context", "kind", "quality limits", "license"]
    rows = [
        [
            f"`{row['name']}`",
            amount(row["catalog"].size_bytes),
            amount(row["ram"]),
            f"{row['n_ctx']:,}",
            row["kind"],
            quality_limits(row["catalog"]),
            row["catalog"].license,
        ]
        for row in users_rows()
    ]
    measured = f"{origin('models', 'We measured RAM usage')} {read('models')['notes']}."
    return f"\n{markdown(titles, rows)}\n{measured}\n"


def billions(name: str) -> float:
    """Return a hub model's parameter count in billions, from PARAMETERS or its name."""
    if name in PARAMETERS:
        return PARAMETERS[name]
    return float(re.findall(r"(\d+(?:\.\d+)?)b\b", name)[0])


def hub_table() -> str:
    """Return the hub's models with estimates, smallest first."""
    titles = ["name", " billion parameters", " download, GB", " RAM, GB", "repository"]
    rows = []
    for name, repository in sorted(hub_names().items(), key=lambda item: billions(item[0])):
        size = billions(name) * GB_PER_BILLION
        cells = [f"`{name}`", f"{billions(name):g}", f"{size:.1f}"]
        rows.append([*cells, f"{size + MORE_GB:.1f}", repository])
    return f"\n{markdown(titles, rows)}\n"


def span(values: Iterable[float], layout: str = "{:.1f}") -> str:
    """Return the smallest and largest values."""
    found = sorted(values)
    return f"{layout.format(found[0])} to {layout.format(found[-1])}"


def _ratios(above: str, below: str) -> list[float]:
    return [row[above] / row[below] for row in read("shipped")["rows"]]


def _amx() -> list[float]:
    rows = [row for row in read("speeds")["rows"] if row["llama"] is not None]
    return [row["full"][0] / row["llama"][0] for row in rows]


def _shipped(name: str) -> Row:
    return next(row for row in read("shipped")["rows"] if row["name"] == name)


def _look_ups() -> str:
    found = [row["lookups"] for row in read("shipped")["rows"]]
    full, lost = (sum(each[key] for each in found) for key in ("full", "lost"))
    return f"{full - lost} of {full}"


def _found(name: str) -> str:
    found = _shipped(name)["lookups"]
    return f"{found['full']} of {found['n']}"


FIGURES: dict[str, Callable[[], str]] = {
    "kernels": lambda: span(_ratios("full", "llama")),
    "saved": lambda: span((100 - 100 / ratio for ratio in _ratios("pruned", "full")), "{:.0f}"),
    "kernels-amx": lambda: span(_amx()),
    "lookups": _look_ups,
    "1.5b-same": lambda: f"{100 * _shipped('qwen-1.5b')['same_first']:.0f}",
    "1.5b-worse": lambda: f"{_shipped('qwen-1.5b')['ppl_ratio'][0] - 1:.1%}",
    "1.5b-found": lambda: _found("qwen-1.5b"),
    "smollm2-found": lambda: _found("smollm2"),
    "0.5b-speedup": lambda: f"{_shipped('qwen-0.5b')['speedup_2048'][0]:.2f}",
    "0.5b-deep": lambda: f"{_shipped('qwen-0.5b')['deep']:.0%}",
    "0.5b-limit": lambda: f"{_shipped('qwen-0.5b')['limit']:.2f}",
}
TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "verdict": verdict,
    "machines": machines,
    "models": models_table,
    "hub": hub_table,
}

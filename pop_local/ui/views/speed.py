"""How `bench` shows time to first token: a table in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pop_local.ui.tables import Column, Table, markdown
from pop_local.ui.theme import say

if TYPE_CHECKING:
    from pop_local.workflows.bench import Speed


def show_speed(found: Speed) -> None:
    layers = f"{found.boundary} to {found.n_layer - 1} of {found.n_layer}"
    layers += ", exactly" if found.is_exact else ""
    say(f"{found.model}: context tokens skip layers {layers}")
    say(f"{found.backend}; medians, in brackets the extremes")
    columns = _EXACT_ROWS if found.is_exact else _ROWS
    if found.upstream is not None:
        say(f"Kernels for prompts: {found.kernels}, beside llama.cpp's own ({found.upstream})")
        columns = (*columns[:2], _UPSTREAM, columns[2], _KERNELS, *columns[3:])
    say("")
    if any(row.n_selected for row in found.rows):
        columns = (*columns[:2], _SELECTED, *columns[2:])
    if any(row.n_image for row in found.rows):
        columns = (columns[0], _IMAGE, *columns[1:-3], *_ENCODING, *columns[-3:])
    say(markdown(Table.of(columns, found.rows)))
    if any(row.read_speedup.min > row.limit for row in found.rows):
        say(_ABOVE)
    if any(row.n_image for row in found.rows):
        say(_NOT_ENCODING)


# The text of a Spread.
_PRECISE = "{0.median:.3f} ({0.min:.3f}-{0.max:.3f})".format
_RATIO = "{0.median:.2f}x ({0.min:.2f}-{0.max:.2f})".format


def _columns(left: str, name: str, how: str) -> tuple[Column, ...]:
    """`left`: the count of the tokens that skip layers, `name` its title; `how` they are read."""
    rates = "{0.full:.1f} / {0.pop:.1f}".format
    return (
        Column("n_prompt", "Prompt tokens", "{:,}".format, numeric=True),
        Column(left, name, "{:,}".format, numeric=True),
        Column("full_ttft_s", "TTFT full (s)", _PRECISE, numeric=True),
        Column("pop_ttft_s", f"TTFT {how} (s)", _PRECISE, numeric=True),
        Column("speedup", "Speed-up", _RATIO, numeric=True),
        Column("limit", "Limit", "{:.2f}".format, numeric=True),
        Column("of_limit", "of limit", "{:.0%}".format, numeric=True),
        Column("decode_tokens_per_s", f"Decode full / {how} (tokens/s)", rates, numeric=True),
    )


_ROWS = _columns("n_pruned", "pruned", "pruned")
_IMAGE = Column("n_image", "of a picture", "{:,}".format, numeric=True)
_ENCODING = (
    Column("encode_s", "encoding (s)", "{:.3f}".format, numeric=True),
    Column("read_speedup", "Speed-up without it", _RATIO, numeric=True),
)
_NOT_ENCODING = (
    "\nEncoding the picture is part of both TTFTs, and pruning does not shorten it; the limit is"
    " that of the rest."
)
_ABOVE = (
    "\nAbove the limit: that is a measurement, too, whose noise is more than the full tokens cost."
)
_UPSTREAM = Column("upstream_ttft_s", "TTFT llama.cpp (s)", _PRECISE, numeric=True)
_KERNELS = Column("kernels_speedup", "by kernels", _RATIO, numeric=True)
_SELECTED = Column("n_selected", "selected", "{:,}".format, numeric=True)
_EXACT_ROWS = _columns("n_skipped_exact", "left exactly", "exact")

"""The output of `bench`: a Markdown table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pop_local.ui.console import say
from pop_local.ui.tables import Column, markdown

if TYPE_CHECKING:
    from pop_local.workflows.benchmark import Speed


def show_speed(found: Speed) -> None:
    layers = f"{found.boundary} to {found.n_layer - 1} of {found.n_layer}"
    layers += ", exactly" if found.is_exact else ""
    say(f"{found.model}: prompt tokens skip layers {layers}")
    say(f"{found.backend}; medians (minimum-maximum)")
    if found.upstream is not None:
        say(f"Prompt kernels: {found.kernels}, compared with llama.cpp's ({found.upstream})")
    say("")
    say(markdown([*_columns(found)], found.rows))


def _columns(found: Speed) -> Iterator[Column]:
    how = "exact" if found.is_exact else "pruned"
    yield _number("Prompt tokens", lambda row: f"{row.n_prompt:,}")
    if found.is_exact:
        yield _number("left exactly", lambda row: f"{row.n_skipped_exact:,}")
    else:
        yield _number("pruned", lambda row: f"{row.n_pruned:,}")
    if any(row.n_deep for row in found.rows):
        yield _number("deep", lambda row: f"{row.n_deep:,}")
    if found.upstream is not None:
        yield _number("TTFT llama.cpp (s)", lambda row: _PRECISE(row.upstream_ttft_s))
    yield _number("TTFT full (s)", lambda row: _PRECISE(row.full_ttft_s))
    if found.upstream is not None:
        yield _number("by kernels", lambda row: _RATIO(row.kernels_speedup))
    yield _number(f"TTFT {how} (s)", lambda row: _PRECISE(row.pop_ttft_s))
    yield _number("Speed-up", lambda row: _RATIO(row.speedup))
    rates = "{0.full:.1f} / {0.pop:.1f}".format
    yield _number(f"Decode full / {how} (tokens/s)", lambda row: rates(row.decode_tokens_per_s))


def _number(title: str, cell: Callable[[Any], str]) -> Column:
    return Column(title, cell, numeric=True)


# The text of a Spread.
_PRECISE = "{0.median:.3f} ({0.min:.3f}-{0.max:.3f})".format
_RATIO = "{0.median:.2f}x ({0.min:.2f}-{0.max:.2f})".format

"""The output of `bench`: a table of medians and a summary."""

from collections.abc import Callable, Iterator
from typing import Any

from pop_local.ui.tables import Column, print_sentence, print_table
from pop_local.workflows.bench import Speed


def show_speed(speed: Speed) -> None:
    layers = f"{speed.boundary} to {speed.n_layer - 1} of {speed.n_layer}"
    layers += ", exactly" if speed.is_exact else ""
    print_sentence(f"{speed.model}: prompt tokens skip layers {layers}")
    print_sentence(f"{speed.backend}. Times are medians. Ranges are in parentheses.")
    if speed.upstream is not None:
        kernels = f"{speed.kernels}, compared with llama.cpp's ({speed.upstream})"
        print_sentence(f"Prompt kernels: {kernels}")
    print_sentence("")
    print_table([*_columns(speed)], speed.rows)
    print_sentence("")
    print_sentence(speed.rows[-1].in_words)


def _columns(speed: Speed) -> Iterator[Column]:
    yield _number("Tokens", lambda row: f"{row.n_prompt:,}")
    if speed.upstream is not None:
        yield _number("llama.cpp", lambda row: f"{row.upstream_ttft_s.median:.3f} s")
    yield _number("In full", lambda row: f"{row.full_ttft_s.median:.3f} s")
    yield _number("Fast", lambda row: f"{row.pop_ttft_s.median:.3f} s")
    if any(row.n_deep for row in speed.rows):
        yield _number("Deep", lambda row: f"{row.n_deep / row.n_prompt:.0%}")
    yield _number("Speedup", lambda row: _RATIO(row.speedup))


def _number(title: str, cell: Callable[[Any], str]) -> Column:
    return Column(title, cell, numeric=True)


# The text of a Spread.
_RATIO = "{0.median:.2f}x ({0.min:.2f}-{0.max:.2f})".format

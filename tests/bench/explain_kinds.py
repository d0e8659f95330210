"""Why a kind of text loses more than another: what it repeats, or what is new. Not a test.

    python tests/bench/explain_kinds.py MODEL.gguf [--sidecar PATH] [--windows 8] TEXT ...

A token of a continuation repeats when the context has it after the same two tokens, so that the
model may copy it from there; what repeats within the continuation counts as new. Prints Markdown,
for each text: the mean KL divergence, the share of tokens that repeat, the mean KL of these and of
the others, and the share of all KL that the twentieth with the largest has.
"""

import argparse
from pathlib import Path

import numpy as np

from pop_local.engine.model import PopModel
from pop_local.measure.divergence import Flags, Floats
from pop_local.measure.estimate import Estimate, mean, ratio
from pop_local.measure.forced import Pruning, forced
from pop_local.measure.heldout import given_text, tokenize
from pop_local.measure.quality import QualitySettings, Window, read_reference, score


def repeats(window: Window) -> Flags:
    """Whether the context has each token of the continuation after the same two tokens."""
    context, tokens = window.context, [*window.context, *window.continuation]
    seen = set(zip(context, context[1:], context[2:], strict=False))
    follows = zip(tokens, tokens[1:], tokens[2:], strict=False)
    return np.array([each in seen for each in follows][len(context) - 2 :])


def of_worst(kl: Floats) -> float:
    """The share of all KL [n_windows, n_tokens] that the largest twentieth has."""
    ranked = np.sort(kl, axis=None)
    return float(ranked[-(ranked.size // 20) :].sum() / ranked.sum())


def cell(estimate: Estimate, digits: int = 4) -> str:
    error = "" if estimate.se is None else f" ± {estimate.se:.{digits}f}"
    return f"{estimate.value:.{digits}f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--sidecar", type=Path, help="the model's sidecar")
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args()
    settings = QualitySettings(options.windows, n_draws=1)
    print("| text | KL | tokens that repeat | their KL | KL of the others | worst twentieth |")
    print("|---|---|---|---|---|---|")
    with PopModel(options.model, sidecar=options.sidecar, n_threads=1, n_ctx=2048) as model:
        if not model.boundary:
            parser.error("nothing is pruned in MODEL: name its sidecar by --sidecar")
        for path in options.texts:
            tokens = tokenize(model, given_text(path))
            reference = read_reference(model, tokens, settings, lambda done, total: None)
            with forced(model) as reader:
                pruning = Pruning(model.boundary)
                windows, full = reference.windows, reference.full
                [scores] = score(reader, windows, full, [pruning], lambda n: None)
            kl = np.stack([each.divergence.kl for each in scores])
            old = np.stack([repeats(window) for window in windows]).astype(np.float64)
            new = 1 - old
            cells = [path.stem, cell(mean(kl)), cell(mean(old), 2)]
            for of in (old, new):
                each, counts = (kl * of).sum(axis=1), of.sum(axis=1)
                cells.append(cell(ratio(each, counts)) if counts.any() else "")
            cells.append(f"{of_worst(kl):.0%}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

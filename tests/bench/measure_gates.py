"""Measure each layer's importance with virtual gates, for docs/how-it-works.md. Not a test.

    python tests/bench/measure_gates.py MODEL.gguf [--windows 20 --context 192 --continuation 64]
        [--text FILE] [--threads 1] [--seed 0]

This program implements the importance analysis of arXiv 2602.03295. A gate g_l = 1 multiplies layer
l's contribution to the residual stream. Each layer has one gate for the context rows of a window
and one gate for the answer rows. The loss L has one target for each answer row, sampled from the
model's predictions, so dL/dg_l has expectation zero, and the importance I_l = E[(dL/dg_l)^2] grows
with the number of rows.

The last context row counts as an answer row, because it predicts the first answer token and runs
through all layers even in a pruned prompt. Each window yields one sample of each squared gradient,
with a relative standard deviation of sqrt(2) or more.

Prints a Markdown row for each layer, and the medians and means of the last third and of the other
layers. Needs torch, and a dense llama, qwen2, qwen3 or gemma3 model.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pop_converter.base.progress import Progress, Ran, counting
from pop_converter.gguf.source import read_source
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama.devices import default_threads
from pop_local.engine.model import PopModel
from pop_local.measure.estimate import Estimate, mean, redrawn
from pop_local.measure.heldout import Text, given_text, shipped_part, spread_windows, tokenize
from pop_local.research.decoder import Decoder
from pop_local.ui.watch import terminal_watch

Tokens = NDArray[np.int32]
Floats = NDArray[np.float64]

# Windows per batch. On a CPU, larger batches are no faster.
N_BATCH = 4


def gate_gradients(
    decoder: Decoder,
    windows: Tokens,
    n_context: int,
    *,
    n_batch: int,
    seed: int,
    on_progress: Progress,
) -> tuple[Floats, Floats]:
    """Differentiate the loss on windows [n_windows, n_tokens] with respect to each gate.

    Return dL/dg [n_windows, n_layer] in nats, summed over all answer rows, for the gates of the
    context rows and of the answer rows. The first `n_context` tokens of each window are its
    context. `n_batch`: windows per batch. `on_progress(done, total)` counts layers times windows,
    forward and backward. The seed determines the targets.
    """
    generator = torch.Generator().manual_seed(seed)
    ran = counting(2 * decoder.n_layer * len(windows), on_progress)
    found = torch.cat(
        [
            _batch(decoder, windows[start : start + n_batch], n_context, generator, ran)
            for start in range(0, len(windows), n_batch)
        ],
        dim=1,
    )
    by_row = found.cpu().double().numpy().transpose(1, 0, 2)
    return by_row[..., :n_context].sum(axis=-1), by_row[..., n_context:].sum(axis=-1)


def _batch(
    decoder: Decoder,
    windows: Tokens,
    n_context: int,
    generator: torch.Generator,
    ran: Ran,
) -> Tensor:
    """Return the contribution of each row to dL/dg, [n_layer, n_windows, n_tokens].

    The forward pass keeps only the layers' outputs, and the backward pass runs the layers again.
    """
    states = [decoder.embed(windows)]
    for index in range(decoder.n_layer):
        with torch.no_grad():
            states.append(decoder.layer(index)(states[-1]))
        ran(len(windows))
    output = states.pop()
    gradient = torch.zeros_like(output)
    for window, rows in enumerate(output[:, n_context:]):
        gradient[window, n_context:] = _loss_gradient(decoder, rows, generator)
    found = []
    for index in reversed(range(decoder.n_layer)):
        before = states.pop()
        found.append((gradient * (output - before)).sum(-1))
        states_in = before.detach().requires_grad_()
        [gradient] = torch.autograd.grad(decoder.layer(index)(states_in), states_in, gradient)
        output = before
        ran(len(windows))
    return torch.stack(found[::-1])


def _loss_gradient(decoder: Decoder, states: Tensor, generator: torch.Generator) -> Tensor:
    """Return dL/dh [n_answer, n_embd] for the last layer's output h at the answer rows."""
    states = states.detach().requires_grad_()
    log_p = decoder.logits(states).log_softmax(-1)
    targets = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    [gradient] = torch.autograd.grad(-log_p.gather(1, targets).sum(), states)
    return gradient


@dataclass(frozen=True)
class StageImportance:
    """The importance I_l of each layer, in squared nats, summed over a window's answer rows.

    The last third of the layers and the other layers are each summarized by a median and a mean,
    since a few layers dominate the mean. `median_ratio`: the last third's median divided by the
    other layers' median (None if the other layers' median is zero).
    """

    layers: tuple[Estimate, ...]
    last_third_median: Estimate
    others_median: Estimate
    median_ratio: Estimate | None
    last_third_mean: Estimate
    others_mean: Estimate


@dataclass(frozen=True)
class Importance:
    """Each layer's importance for prompts and for answers."""

    prefill: StageImportance
    decode: StageImportance


def stage_of(squares: NDArray[np.float64]) -> StageImportance:
    """Summarize the squared gradients [n_windows, n_layer] of all layers."""
    n_layer = squares.shape[1]
    n_others = n_layer - max(1, n_layer // 3)
    last, others = squares[:, n_others:], squares[:, :n_others]

    def median_ratio(drawn: NDArray[np.float64]) -> float:
        return _median_layer(drawn[:, n_others:]) / _median_layer(drawn[:, :n_others])

    return StageImportance(
        layers=tuple(mean(squares[:, layer]) for layer in range(n_layer)),
        last_third_median=redrawn(last, _median_layer),
        others_median=redrawn(others, _median_layer),
        median_ratio=redrawn(squares, median_ratio) if _median_layer(others) else None,
        last_third_mean=mean(last),
        others_mean=mean(others),
    )


def _median_layer(squares: NDArray[np.float64]) -> float:
    return float(np.median(squares.mean(axis=0)))


def read_windows(options: argparse.Namespace) -> Tokens:
    """Return windows of equal length [n_windows, n_tokens], which start with any BOS token."""
    shipped = Text("prose of pop-local", (shipped_part("prose"),))
    text = given_text(options.text) if options.text else shipped
    n_window = options.context + options.continuation
    with PopModel(EngineOptions.of(options.model, n_ctx=n_window, n_threads=1)) as model:
        start = model.engine.context.vocabulary.bos
        texts = spread_windows(tokenize(model, text), options.windows, n_window - len(start))
    return np.array([[*start, *each] for each in texts], np.int32)


def measure(options: argparse.Namespace, windows: Tokens) -> Importance:
    torch.set_num_threads(options.threads or default_threads())
    decoder = Decoder(read_source(options.model))
    with terminal_watch() as watch:
        prefill, decode = gate_gradients(
            decoder,
            windows,
            options.context,
            n_batch=N_BATCH,
            seed=options.seed,
            on_progress=watch.stage("Virtual gates"),
        )
    return Importance(stage_of(prefill**2), stage_of(decode**2))


def shown(figure: Estimate | None) -> str:
    return "-" if figure is None else f"{figure.value:.2f} ± {figure.se or 0:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure each layer's importance.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="text to measure on (default: shipped prose)")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--context", type=int, default=192, help="context tokens per window")
    parser.add_argument("--continuation", type=int, default=64, help="answer tokens per window")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0, help="seed for the targets")
    options = parser.parse_args()
    found = measure(options, read_windows(options))
    print("| layer | prefill | decode |\n|---|---|---|")
    for layer, pair in enumerate(zip(found.prefill.layers, found.decode.layers, strict=True)):
        print(f"| {layer} | {' | '.join(map(shown, pair))} |")
    for name, stage in (("prefill", found.prefill), ("decode", found.decode)):
        medians = f"{shown(stage.last_third_median)}, others {shown(stage.others_median)}"
        means = f"{shown(stage.last_third_mean)}, others {shown(stage.others_mean)}"
        print(f"{name}: median of the last third {medians}, ratio {shown(stage.median_ratio)};")
        print(f"{name}: mean of the last third {means}")


if __name__ == "__main__":
    main()

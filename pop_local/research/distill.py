"""Distill fitted K/V projections by training them on the full model's predictions.

Least squares (pop_converter.fit.least_squares) approximates each layer's K and V without regard to
the effect on later layers. Distillation simulates pruning: all context rows except the sinks stop
at the boundary. Answer rows run through all layers and attend to the projected K and V. The loss
is KL(full || pruned) over the answer rows. Adam (arXiv 1412.6980) updates the projections with
gradients backpropagated through the skipped layers. The model's weights stay frozen. The method is
knowledge distillation (Hinton et al., arXiv 1503.02531).

Copying is the first ability that pruning impairs, so some windows end with a repeated passage.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import cos, pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pop_base.progress import Progress, Ran, counting
from pop_converter.fit.least_squares import FitError, normalised
from pop_converter.fit.weights import KvProjection
from pop_converter.fit.wide import WideInput
from pop_converter.popfile.pruning_plan import Plan
from pop_local.calibration.texts import DistillText
from pop_local.research.decoder import BASE_BYTES, Decoder, StoredKv
from pop_local.research.hyper import Hyper

Tokens = NDArray[np.int32]

# Windows per step, passes over all windows, and windows read at a time.
N_BATCH = 2
_N_PASSES = 2
_N_READ = 4
# The maximum change of K or V per step, relative to their spread, for inputs of typical power.
_STEP = 0.2
_N_WARM = 10
_BETAS = (0.9, 0.98)
# The share of windows read again with a repeated passage, and the range of the passage's length in
# tokens.
_COPIES = 0.4
_PASSAGE = (96, 200)
# The range of the context's share of a window. Steps with a repeated passage use a smaller share.
_CONTEXT = (0.47, 0.78)
_COPY_CONTEXT = (0.47, 0.58)
# Number of each window's rows that are used for the inputs' statistics.
_ROWS_EACH = 64
# The minimum power of an input, relative to the mean power of all inputs.
_LEAST_POWER = 0.1
# The loss covers the N likeliest tokens of each answer row, combined over all rows.
_N_LIKELY = 64


@dataclass(frozen=True)
class InitialFit:
    """The initial fit for distillation: projections for all skipped layers except the first.

    `wide`: the function that computes a wide fit's extra inputs (None for other fits). `n_sink`:
    the number of leading rows that are never pruned (up to a quarter of a window).
    """

    boundary: int
    n_sink: int
    projections: Mapping[int, KvProjection]
    wide: WideInput | None = None


@dataclass(frozen=True)
class TeacherStates:
    """The full model's states for the text's windows and for windows with a repeated passage.

    `states` [n_all, n_tokens, n_embd]: the boundary layer's inputs. `last`: the last layer's
    outputs, with the same shape. `likely` [n_all, n_tokens, n_likely]: the most likely next tokens
    for each possible answer row (0 for all other rows). `weights` [n_all, n_tokens]: each row's
    weight in the loss.
    """

    text: DistillText
    weights: Tensor
    states: Tensor
    last: Tensor
    likely: Tensor


@torch.no_grad()
def read(
    decoder: Decoder, boundary: int, text: DistillText, *, seed: int, on_progress: Progress
) -> TeacherStates:
    """Run the full model on all windows, and on some copies that end with a repeated passage.

    `boundary`: the fit's boundary. `seed`: seed for choosing passages. Progress is reported in
    (window, layer) pairs. An exception from `on_progress` stops the run.
    """
    copies = _repeating(text.windows, np.random.default_rng(seed))
    every = np.concatenate([text.windows, copies])
    weights = np.concatenate([text.weights, np.ones(copies.shape, np.float32)])
    ran = counting((decoder.n_layer + 1) * len(every), on_progress)
    parts = [every[at : at + _N_READ] for at in range(0, len(every), _N_READ)]
    states = torch.cat([decoder.embed(part) for part in parts])
    entering = states
    for index in range(decoder.n_layer):
        if index == boundary:
            entering = states.clone()
        _run(decoder, index, states, ran)
    likely = torch.zeros(*every.shape, min(_N_LIKELY, decoder.n_vocab), dtype=torch.int32)
    n_context = int(_CONTEXT[0] * every.shape[1])
    for window, tokens in zip(states, likely, strict=True):
        logits = decoder.logits(window[n_context:])
        tokens[n_context:] = logits.topk(likely.shape[-1]).indices
        ran(1)
    return TeacherStates(text, torch.from_numpy(weights), entering, states, likely)


def _run(decoder: Decoder, index: int, states: Tensor, ran: Ran) -> None:
    """Run a layer and overwrite its input [n_windows, n_tokens, n_embd] with its output."""
    layer = decoder.layer(index)
    for at in range(0, len(states), _N_READ):
        part = states[at : at + _N_READ]
        part.copy_(layer(part))
        ran(len(part))


def distill(
    decoder: Decoder,
    start: InitialFit,
    reference: TeacherStates,
    *,
    seed: int,
    on_progress: Progress,
) -> dict[int, KvProjection]:
    """Train a fit's projections on the full model's states, and return the result.

    `reference` must contain the states at the fit's boundary. Progress is reported in
    forward and backward layer passes. An exception from `on_progress` stops the training. `seed`:
    seed for choosing the windows' order and context lengths. Raises FitError if any trained weight
    is not finite.
    """
    rng = np.random.default_rng(seed)
    n_windows, n_tokens = reference.states.shape[:2]
    n_batch = min(N_BATCH, n_windows)
    n_each = n_windows // n_batch
    n_steps = _N_PASSES * n_each
    # A backward pass costs as much as two forward passes.
    n_step = 3 * (decoder.n_layer - start.boundary) * n_batch
    # Preparing the inputs counts as one more layer.
    ran = counting(n_windows + n_steps * n_step, on_progress)
    student = _Student(decoder, start, reference, ran)
    optimizer = torch.optim.Adam(student.changes, lr=_STEP, betas=_BETAS)
    passes = [rng.permutation(n_windows)[: n_each * n_batch] for _ in range(_N_PASSES)]
    order = np.concatenate(passes).tolist()
    for step in range(n_steps):
        batch = order[step * n_batch : (step + 1) * n_batch]
        shares = _CONTEXT if max(batch) < len(reference.text.windows) else _COPY_CONTEXT
        low, high = (int(share * n_tokens) for share in shares)
        n_context = int(rng.integers(low, max(high, low + 1)))
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / _N_WARM)
            group["lr"] = _STEP * warm * (1 + cos(pi * step / n_steps)) / 2
        optimizer.zero_grad()
        student.loss(batch, n_context).backward()
        optimizer.step()
        ran(n_step)
    return student.trained()


def _repeating(windows: Tokens, rng: np.random.Generator) -> Tokens:
    """Copy some of the windows [n, n_tokens], and end each copy with a passage from its context."""
    n_windows, n_tokens = windows.shape
    copies = windows[rng.permutation(n_windows)[: round(_COPIES * n_windows)]].copy()
    for window in copies:
        n_passage = min(int(rng.integers(*_PASSAGE)), n_tokens // 3)
        n_context = int(_COPY_CONTEXT[0] * n_tokens)
        begin = int(rng.integers(1, max(2, n_context - n_passage)))
        window[n_tokens - n_passage :] = window[begin : begin + n_passage]
    return copies


class _Student:
    """The pruned model's skipped layers, and the trained changes to their projections."""

    @torch.no_grad()
    def __init__(
        self, decoder: Decoder, start: InitialFit, reference: TeacherStates, ran: Ran
    ) -> None:
        self._decoder, self._start, self._reference = decoder, start, reference
        self._deep = [decoder.layer(index) for index in range(start.boundary, decoder.n_layer)]
        # The weights for uncentered inputs without the norm's gain; the last column is the bias.
        self._weights: dict[int, Tensor] = {}
        for layer, fit in start.projections.items():
            parts = [fit.weight, fit.bias[:, None]]
            if fit.wide is not None:
                parts.insert(1, fit.wide)
            self._weights[layer] = torch.from_numpy(np.hstack(parts))
        n_inputs = next(iter(self._weights.values())).shape[1]
        # The projections' inputs; the last one is constant.
        self._inputs = torch.ones(*reference.states.shape[:2], n_inputs)
        for window, inputs in zip(reference.states, self._inputs, strict=True):
            x = normalised(window.numpy(), decoder.hyper.eps)
            seen = [x] if start.wide is None else [x, start.wide(x)]
            inputs[:, :-1] = torch.from_numpy(np.hstack(seen))
            ran(1)
        # The first row of each window is an outlier, so the statistics omit it.
        context = self._inputs[:, 1:]
        mean = context.mean((0, 1))
        mean[-1] = 0
        self._inputs -= mean
        self._mean = mean
        stride = -(-self._inputs.shape[1] // _ROWS_EACH)
        rows = context[:, ::stride].flatten(0, 1)
        self._gains, self._units, self._changes = {}, {}, {}
        for layer, weights in self._weights.items():
            gain = torch.tensor(start.projections[layer].gain)
            gain = functional.pad(gain, (0, n_inputs - len(gain)), value=1.0)
            # The inputs are centered, so that changing the weights does not shift the mean of K
            # and V.
            weights[:, -1] += weights @ (gain * self._mean)
            self._gains[layer], self._units[layer] = gain, _units(rows * gain, weights)
            self._changes[layer] = torch.zeros_like(weights, requires_grad=True)

    @property
    def changes(self) -> list[Tensor]:
        return list(self._changes.values())

    def loss(self, batch: list[int], n_context: int) -> Tensor:
        """Return the weighted mean of `kl` over the answer rows."""
        weights = self._reference.weights[batch][:, n_context:]
        return (self.kl(batch, n_context) * weights).sum() / weights.sum()

    def kl(self, batch: list[int], n_context: int) -> Tensor:
        """Return KL(full || pruned) [n, n_answer] in nats for the chosen windows' answer rows.

        The KL is computed over the tokens that are likely in at least one answer row. With a large
        vocabulary, computing all logits would dominate the run time.
        """
        reference = self._reference
        tokens = torch.unique(reference.likely[batch][:, n_context:])
        with torch.no_grad():
            last = reference.last[batch][:, n_context:]
            full = self._decoder.logits(last, tokens).log_softmax(-1)
        pruned = self._decoder.logits(self._last(batch, n_context), tokens).log_softmax(-1)
        return functional.kl_div(pruned, full, reduction="none", log_target=True).sum(-1)

    def _last(self, batch: list[int], n_context: int) -> Tensor:
        """Return the last layer's output [n_chosen, n_answer, n_embd] for the answer rows."""
        states, inputs = self._reference.states[batch], self._inputs[batch]
        n_sink = _n_sink(self._start.n_sink, states.shape[1])
        every = torch.arange(states.shape[1])
        full, context = torch.cat([every[:n_sink], every[n_context:]]), every[n_sink:n_context]
        rows = states[:, full]
        stored = self._deep[0].key_value(states[:, context], context)
        inputs = inputs[:, context]
        for layer, computed in enumerate(self._deep, self._start.boundary):
            if layer in self._changes:
                both = functional.linear(inputs, self._changed(layer) * self._gains[layer])
                n_k = self._start.projections[layer].n_k
                stored = StoredKv(both[..., :n_k], both[..., n_k:], context)
            rows = computed(rows, full, stored)
        return rows[:, n_sink:]

    def _changed(self, layer: int) -> Tensor:
        return self._weights[layer] + self._units[layer] * self._changes[layer]

    @torch.no_grad()
    def trained(self) -> dict[int, KvProjection]:
        projections = {}
        for layer, before in self._start.projections.items():
            changed = self._changed(layer)
            changed[:, -1] -= changed @ (self._gains[layer] * self._mean)
            after = changed.cpu().numpy()
            if not np.isfinite(after).all():
                raise FitError(
                    f"the distilled fit for layer {layer} contains NaN or infinity",
                    "convert without distilling",
                )
            n_embd = len(before.gain)
            wide = np.ascontiguousarray(after[:, n_embd:-1])
            projections[layer] = replace(
                before,
                weight=np.ascontiguousarray(after[:, :n_embd]),
                bias=np.ascontiguousarray(after[:, -1]),
                wide=wide if before.wide is not None else None,
            )
        return projections


def _units(rows: Tensor, weights: Tensor) -> Tensor:
    """Return the step sizes [n_out, n_in] for changes to a projection with inputs [n_rows, n_in].

    One step changes an output by the output's standard deviation divided by n_in. The step size
    for weak inputs is limited, because large weights would increase the quantization error.
    """
    spread = (rows @ weights.T).std(0)
    power = rows.square().mean(0).sqrt()
    power = power.clamp(min=_LEAST_POWER * float(power.mean()))
    units: Tensor = spread[:, None] / (power * rows.shape[1])
    return units


def _n_sink(n_sink: int, n_tokens: int) -> int:
    # With more sinks, short windows would have no context rows.
    return min(n_sink, n_tokens // 4)


def memory(plan: Plan, hyper: Hyper, n_windows: int, n_tokens: int, matrices: torch.dtype) -> int:
    """Return the memory (in bytes) needed for distillation with windows [n_windows, n_tokens].

    `matrices`: the data type of the skipped layers' matrices.
    """
    shape, n_inputs = plan.shape, plan.shape.n_wide(plan.boundary, plan.projection)
    n_inputs += shape.n_embd + 1
    n_all = round((1 + _COPIES) * n_windows) * n_tokens
    reference = 4 * n_all * (2 * shape.n_embd + _N_LIKELY)
    main = BASE_BYTES + 4 * n_all * (shape.n_embd + n_inputs)
    head = shape.n_vocab * shape.n_embd
    kept = sum(shape.n_weights[plan.boundary :]) + head
    # Either one layer or the LM head is loaded in float32 at a time.
    weights = matrices.itemsize * kept + 4 * max(*shape.n_weights, head)
    projections = 6 * n_inputs * sum(map(shape.n_kv, plan.fitted_layers))
    n_head = max(shape.n_heads_out) // hyper.dim_v
    n_answer = n_tokens - int(_CONTEXT[0] * n_tokens)
    n_rows = N_BATCH * (n_answer + _n_sink(plan.sink_tokens, n_tokens))
    per_row = 4 * min(shape.n_vocab, n_rows * _N_LIKELY) + plan.n_skipped * (
        12 * max(shape.n_neurons) + 5 * n_head * n_tokens
    )
    return reference + main + weights + 4 * (projections + n_rows * per_row)

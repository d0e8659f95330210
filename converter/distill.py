"""Distils fitted K/V projections: trains them end to end on what the full model predicts.

Least squares (converter.fit) brings K and V of each layer near to the full model's, whatever the
layers make of the difference. Here the skipped layers are computed as a pruned prompt has them: the
rows of a context stop at the boundary, all but the first (the sink), and those of the answer after
it run all layers and attend to the projections' K and V. The loss is KL(full || pruned), averaged
over the answer's rows; its gradient goes through the skipped layers into the projections, which
Adam changes (knowledge distillation: Hinton et al., arXiv 1503.02531; Adam: arXiv 1412.6980). The
model's weights stay as they are.

Some windows end with a passage of their own context, since copying is what pruning loses first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import cos, pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from converter.decoder import Decoder, Layer, Stored
from converter.fit import FitError, normalised
from converter.hyper import Hyper
from converter.plan import Plan
from converter.progress import Progress, Ran, counting
from converter.weights import KvProjection
from converter.wide import WideInput

Tokens = NDArray[np.int32]

N_EPOCHS = 2
# Windows a step, and in one pass of the layers that only read.
N_BATCH = 2
_N_READ = 4
# The largest step: what it changes in K or V at most, in units of their own spread, where all
# inputs are as strong as usual. Steps rise to it.
_STEP = 0.2
_N_WARM = 10
_BETAS = (0.9, 0.98)
# For each window of text, how many repeat a passage, and its length in tokens.
_COPIES = 0.4
_PASSAGE = (96, 200)
# What share of a window is its context, at least and at most; less of those that repeat a passage.
_CONTEXT = (0.47, 0.78)
_COPY_CONTEXT = (0.47, 0.58)
# What is known of the inputs is from so many rows of each window.
_ROWS_EACH = 64
# Of an input, in units of the mean.
_LEAST_POWER = 0.1
# So many tokens of each row of an answer are what the loss looks at, in all of its rows.
_N_LIKELY = 64
# The interpreter with torch loaded.
_BASE_BYTES = 400_000_000


@dataclass(frozen=True)
class Start:
    """What is distilled: the fitted projections of all skipped layers but the first, by layer.

    `wide` makes the wider input that they see, None without one; with `sees_heads` they see what
    the heads of the boundary layer's attention give, too.
    """

    boundary: int
    projections: Mapping[int, KvProjection]
    wide: WideInput | None = None
    sees_heads: bool = False


@dataclass(frozen=True)
class _Seen:
    """Of all windows [n_windows, n_tokens, ...]: the states at the boundary, the inputs of the
    projections without their `mean` [n_inputs + 1], a one last, and the full model's last states.
    """

    states: Tensor
    inputs: Tensor
    mean: Tensor
    last: Tensor


def distill(
    decoder: Decoder, start: Start, windows: Tokens, *, seed: int, on_progress: Progress
) -> dict[int, KvProjection]:
    """Train projections on windows [n_windows, n_tokens], and return them.

    `on_progress(done, total)` counts windows through layers, forwards and backwards; what it raises
    ends the work. The same seed draws the same contexts and passages. Raises FitError for weights
    that are not finite.
    """
    rng = np.random.default_rng(seed)
    copies = _repeating(windows, rng)
    every = np.concatenate([windows, copies])
    n_deep = decoder.n_layer - start.boundary
    n_steps = N_EPOCHS * len(every) // N_BATCH
    # A way backwards costs what two forwards do.
    n_read, n_step = decoder.n_layer * len(every), 3 * n_deep * N_BATCH
    ran = counting(n_read + n_steps * n_step, on_progress)
    deep = [decoder.layer(index) for index in range(start.boundary, decoder.n_layer)]
    seen = _read(decoder, start, deep, every, ran)
    student = _Student(decoder, start, deep, seen)
    optimizer = torch.optim.Adam(student.changes, lr=_STEP, betas=_BETAS)
    order: list[int] = []
    for step in range(n_steps):
        if len(order) < N_BATCH:
            order = rng.permutation(len(every)).tolist()
        chosen = [order.pop() for _ in range(N_BATCH)]
        shares = _CONTEXT if max(chosen) < len(windows) else _COPY_CONTEXT
        low, high = (int(share * every.shape[1]) for share in shares)
        n_context = int(rng.integers(low, max(high, low + 1)))
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / _N_WARM)
            group["lr"] = _STEP * warm * (1 + cos(pi * step / n_steps)) / 2
        optimizer.zero_grad()
        student.kl(chosen, n_context).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ran(n_step)
    return student.trained()


def _repeating(windows: Tokens, rng: np.random.Generator) -> Tokens:
    """Return a share of windows [n, n_tokens] with a passage of theirs again at the end."""
    n_windows, n_tokens = windows.shape
    made = windows[rng.permutation(n_windows)[: round(_COPIES * n_windows)]].copy()
    for window in made:
        n_passage = min(int(rng.integers(*_PASSAGE)), n_tokens // 3)
        n_context = int(_COPY_CONTEXT[0] * n_tokens)
        begin = int(rng.integers(1, max(2, n_context - n_passage)))
        window[n_tokens - n_passage :] = window[begin : begin + n_passage]
    return made


@torch.no_grad()
def _read(decoder: Decoder, start: Start, deep: list[Layer], windows: Tokens, ran: Ran) -> _Seen:
    parts = [windows[at : at + _N_READ] for at in range(0, len(windows), _N_READ)]
    states = [decoder.embed(part) for part in parts]
    for index in range(start.boundary):
        layer = decoder.layer(index)
        for number, part in enumerate(states):
            states[number] = layer(part)
            ran(len(part))
    inputs = torch.cat([_inputs(decoder, start, deep[0], part) for part in states])
    # The first row of a window is no context, and unlike all others.
    mean = inputs[:, 1:].mean((0, 1))
    mean[-1] = 0
    inputs -= mean
    last = list(states)
    for layer in deep:
        for number, part in enumerate(last):
            last[number] = layer(part)
            ran(len(part))
    return _Seen(torch.cat(states), inputs, mean, torch.cat(last))


def _inputs(decoder: Decoder, start: Start, layer: Layer, states: Tensor) -> Tensor:
    """Return what projections see [n_windows, n_tokens, n_inputs + 1] of states."""
    parts = []
    for window in states.cpu().numpy():
        x = normalised(window, decoder.hyper.eps)
        seen = [x] if start.wide is None else [x, start.wide(x)]
        parts.append(np.hstack(seen))
    made = [torch.from_numpy(np.stack(parts)).to(states.device)]
    if start.sees_heads:
        made.append(layer.heads(states))
    made.append(torch.ones_like(states[..., :1]))
    return torch.cat(made, -1)


class _Student:
    """The skipped layers as a pruned prompt has them, and the changes of its projections."""

    def __init__(self, decoder: Decoder, start: Start, deep: list[Layer], seen: _Seen) -> None:
        self._decoder, self._start, self._deep, self._seen = decoder, start, deep, seen
        n_tokens = seen.inputs.shape[1]
        rows = seen.inputs[:, 1:].flatten(0, 1)[:: -(-n_tokens // _ROWS_EACH)]
        self._gains, self._weights, self._units = {}, {}, {}
        for layer, projection in start.projections.items():
            gain = torch.tensor(projection.gain, device=rows.device)
            gain = functional.pad(gain, (0, rows.shape[1] - len(gain)), value=1.0)
            weights = self._joined(projection)
            # Changes of other weights should leave the mean of K and V alone.
            weights[:, -1] += weights @ (gain * seen.mean)
            self._gains[layer], self._weights[layer] = gain, weights
            self._units[layer] = _units(rows * gain, weights)
        self._changes = {
            layer: torch.zeros_like(weights, requires_grad=True)
            for layer, weights in self._weights.items()
        }

    @property
    def changes(self) -> list[Tensor]:
        return list(self._changes.values())

    def kl(self, chosen: list[int], n_context: int) -> Tensor:
        """Return KL(full || pruned) in nats of the answer's rows of some windows, [n, n_answer].

        It is among the tokens that are likely in one of these rows: with all of a large vocabulary
        the LM head would take most of the time.
        """
        with torch.no_grad():
            last = self._seen.last[chosen][:, n_context:]
            logits = self._decoder.logits(last)
            n_likely = min(_N_LIKELY, logits.shape[-1])
            tokens = torch.unique(logits.topk(n_likely).indices)
            full = self._decoder.logits(last, tokens).log_softmax(-1)
        pruned = self._decoder.logits(self._last(chosen, n_context), tokens).log_softmax(-1)
        return functional.kl_div(pruned, full, reduction="none", log_target=True).sum(-1)

    def _last(self, chosen: list[int], n_context: int) -> Tensor:
        """Return the last states of the answer's rows [n_chosen, n_answer, n_embd]."""
        states, inputs = self._seen.states[chosen], self._seen.inputs[chosen]
        device = states.device
        answer = torch.arange(n_context, states.shape[1], device=device)
        full = torch.cat([torch.zeros(1, dtype=answer.dtype, device=device), answer])
        context = torch.arange(1, n_context, device=device)
        rows = states[:, full]
        stored = self._deep[0].key_value(states[:, context], context)
        inputs = inputs[:, context]
        for layer, computed in enumerate(self._deep, self._start.boundary):
            if layer in self._changes:
                stored = self._stored(layer, inputs, context)
            rows = computed(rows, full, stored)
        return rows[:, 1:]

    def _stored(self, layer: int, inputs: Tensor, positions: Tensor) -> Stored:
        n_k = self._start.projections[layer].n_k
        both = functional.linear(inputs, self._changed(layer) * self._gains[layer])
        return Stored(both[..., :n_k], both[..., n_k:], positions)

    def _joined(self, projection: KvProjection) -> Tensor:
        """Return a layer's weights for inputs with their mean, of which the gain is apart."""
        parts = [projection.weight]
        if projection.wide is not None:
            parts.append(projection.wide)
        joined = np.hstack([*parts, projection.bias[:, None]])
        return torch.from_numpy(joined).to(self._decoder.device)

    def _changed(self, layer: int) -> Tensor:
        return self._weights[layer] + self._units[layer] * self._changes[layer]

    @torch.no_grad()
    def trained(self) -> dict[int, KvProjection]:
        found = {}
        for layer, before in self._start.projections.items():
            changed = self._changed(layer)
            changed[:, -1] -= changed @ (self._gains[layer] * self._seen.mean)
            after = changed.cpu().numpy()
            if not np.isfinite(after).all():
                raise FitError(
                    f"the distilled fit of layer {layer} is not finite", "take it as it was"
                )
            n_embd = len(before.gain)
            wide = np.ascontiguousarray(after[:, n_embd:-1])
            found[layer] = replace(
                before,
                weight=np.ascontiguousarray(after[:, :n_embd]),
                bias=np.ascontiguousarray(after[:, -1]),
                wide=wide if before.wide is not None else None,
            )
        return found


def _units(rows: Tensor, weights: Tensor) -> Tensor:
    """Return the units [n_out, n_in] of changes, for inputs [n_rows, n_in] and weights alike.

    A change of one moves an output by its own spread over n_in. Weak inputs count as stronger than
    they are: large weights would spoil the blocks that they are stored in.
    """
    spread = (rows @ weights.T).std(0)
    power = rows.square().mean(0).sqrt()
    power = power.clamp(min=_LEAST_POWER * float(power.mean()))
    units: Tensor = spread[:, None] / (power * rows.shape[1])
    return units


def needed_bytes(
    plan: Plan, hyper: Hyper, n_windows: int, n_tokens: int, matrices: torch.dtype
) -> int:
    """Return the memory that `distill` takes for windows [n_windows, n_tokens], torch included."""
    shape = plan.shape
    layers = [
        sum(parts)
        for parts in zip(shape.attn_proj_macs, shape.kv_macs, shape.ffn_macs, strict=True)
    ]
    kept = sum(layers[plan.boundary :]) + shape.head_macs
    # One layer, or the head, is read in float32 while the others are there.
    weights = matrices.itemsize * kept + 4 * max(*layers, shape.head_macs)
    n_inputs = shape.n_embd + shape.n_wide(plan.boundary, plan.projection) + 1
    rows = round((1 + _COPIES) * n_windows) * n_tokens * (3 * shape.n_embd + 2 * n_inputs)
    projections = 6 * n_inputs * sum(shape.kv_macs[each] for each in plan.fitted_layers)
    n_head = max(shape.attn_dim) // (hyper.dim_k + hyper.dim_v)
    n_answer = n_tokens - int(_CONTEXT[0] * n_tokens)
    per_row = 6 * shape.n_vocab + plan.n_skipped * (
        4 * max(shape.ffn_macs) // shape.n_embd + 5 * n_head * n_tokens
    )
    step = N_BATCH * n_answer * per_row
    return _BASE_BYTES + weights + 4 * (rows + projections // shape.n_embd + step)

"""Virtual gates: each layer's importance, measured separately for context and answer rows.

This module implements the importance analysis of arXiv 2602.03295 (see docs/analysis.md). A gate
g_l = 1 multiplies layer l's contribution to the residual stream. Each layer has one gate for the
context rows of a window and one gate for the answer rows. The loss L has one target for each answer
row, sampled from the model's predictions, so dL/dg_l has expectation zero, and the importance I_l =
E[(dL/dg_l)^2] grows with the number of rows.

The last context row counts as an answer row, because it predicts the first answer token and runs
through all layers even in a pruned prompt. Each window yields one sample of each squared gradient,
with a relative standard deviation of sqrt(2) or more.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pop_converter.architecture.shape import ModelShape
from pop_converter.base.progress import Progress, Ran, counting
from pop_local.research.decoder import BASE_BYTES, Decoder
from pop_local.research.hyper import Hyper

Tokens = NDArray[np.int32]
Floats = NDArray[np.float64]


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
    generator = torch.Generator(decoder.device).manual_seed(seed)
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


def needed_bytes(
    shape: ModelShape, hyper: Hyper, n_tokens: int, n_answer: int, n_batch: int
) -> int:
    """Return the memory in bytes that `gate_gradients` and torch need for windows of `n_tokens`."""
    # The previous layer is still in memory while a layer is read.
    weights = shape.n_vocab * shape.n_embd + 2 * max(shape.n_weights)
    n_head, n_ff = max(shape.n_heads_out) // hyper.dim_v, max(shape.n_neurons)
    per_token = shape.n_embd * (shape.n_layer + 20) + 6 * n_ff + 5 * n_head * n_tokens
    logits = 5 * n_answer * shape.n_vocab
    return BASE_BYTES + 4 * (weights + n_batch * n_tokens * per_token + logits)

"""Virtual gates: the importance of each layer, apart for reading and for answering.

The importance analysis of the paper (arXiv 2602.03295, the section on virtual gates), as follows. A
gate g_l = 1 multiplies what layer l adds to the residual stream, attention and FFN alike. A window
is a context and the answer tokens after it. The gate exists twice: one multiplies the rows of
the context only (*prefill*), the other those of the answer only (*decode*).
The loss L of a window is the negative log-likelihood of one target for each answer row, where the
targets are not the text's but drawn from the model's own distribution. Then the importance

    I_l = E[(dL/dg_l)^2]

is the Fisher information of the gate, the second derivative of the KL divergence between the model
and the gated one: closing the gate costs about I_l / 2 nats over the window's answer rows. What
the targets are drawn from makes the expectation of dL/dg_l zero, so that its square adds up over
rows: I_l grows in proportion to the number of answer rows.

Context rows have no loss of their own: what counts is what answer rows attend to. The last context
row, which predicts the first answer token, is one of the answer's here, as it is a full row in POP.
One window gives one sample of each square, whose relative standard deviation is at least sqrt(2).

An answer row does two things: it predicts the next token, and later answer rows read it, as they
read context. The decode gate multiplies both. What prediction alone needs of a layer (*predict*) is
the decode gate of a window with one answer row, which no other row reads. Each answer row serves as
that one: the loss L_t of row t is differentiated for a gate of row t alone, and

    I_l = E[sum over t of (dL_t/dg_lt)^2]

adds the squares up over the rows, to the scale of the other two, and has a sample for each row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .decoder import Decoder
from .hyper import Hyper
from .shape import ModelShape

Tokens = NDArray[np.int32]
Floats = NDArray[np.float64]

# The interpreter with torch loaded.
_BASE_BYTES = 400_000_000


@dataclass(frozen=True)
class GateGradients:
    """dL/dg of each window and layer, [n_windows, n_layer], in nats over all answer rows.

    `predict`: dL_t/dg_t of each answer row's own loss, [n_windows, n_layer, n_answer].
    """

    prefill: Floats
    decode: Floats
    predict: Floats


def gate_gradients(
    decoder: Decoder,
    windows: Tokens,
    n_context: int,
    *,
    n_batch: int,
    seed: int,
    on_progress: Callable[[int, int], object],
) -> GateGradients:
    """Of windows [n_windows, n_tokens], the first `n_context` tokens of each being context.

    `n_batch` windows are computed at a time. `on_progress(done, total)` counts layers times
    windows, forwards and backwards. The same seed draws the same targets.
    """
    generator = torch.Generator(decoder.device).manual_seed(seed)
    total = 2 * decoder.n_layer * len(windows)
    done = 0

    def ran(n_windows: int) -> None:
        nonlocal done
        done += n_windows
        on_progress(done, total)

    ran(0)
    found = [
        _batch(decoder, windows[start : start + n_batch], n_context, generator, ran)
        for start in range(0, len(windows), n_batch)
    ]
    staged, own = (
        torch.cat(parts, dim=1).cpu().double().numpy() for parts in zip(*found, strict=True)
    )
    return GateGradients(
        prefill=staged[..., 0].T, decode=staged[..., 1].T, predict=own.transpose(1, 0, 2)
    )


def _batch(
    decoder: Decoder,
    windows: Tokens,
    n_context: int,
    generator: torch.Generator,
    ran: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """[n_layer, n_windows, 2] by stage, [n_layer, n_windows, n_answer] of the rows' own losses.

    Forwards keep only the layers' inputs, backwards compute again.
    """
    gates = torch.ones(len(windows), 2, device=decoder.device, requires_grad=True)
    row_gates = torch.ones(
        len(windows), windows.shape[1] - n_context, 1, device=decoder.device, requires_grad=True
    )
    inputs = [decoder.embed(windows)]
    stage = stages(windows.shape[1], n_context, decoder.device)
    for index in range(decoder.n_layer):
        with torch.no_grad():
            inputs.append(decoder.layer(index)(inputs[-1], gates[:, stage, None]))
        ran(len(windows))
    gradient = torch.zeros_like(inputs[-1])
    last = inputs.pop()
    for window in range(len(windows)):
        gradient[window, n_context:] = _loss_gradient(decoder, last[window, n_context:], generator)
    own = gradient[:, n_context:]
    of_stages, of_rows = [], []
    for index in reversed(range(decoder.n_layer)):
        layer, states = decoder.layer(index), inputs.pop()
        rows = states[:, n_context:].clone().requires_grad_()
        output = layer.apart(rows, row_gates, states[:, :n_context])
        own, of_own = torch.autograd.grad(output, (rows, row_gates), own)
        of_rows.append(of_own.squeeze(-1))
        states.requires_grad_()
        output = layer(states, gates[:, stage, None])
        gradient, of_gates = torch.autograd.grad(output, (states, gates), gradient)
        of_stages.append(of_gates)
        ran(len(windows))
    return torch.stack(of_stages[::-1]), torch.stack(of_rows[::-1])


def stages(n_tokens: int, n_context: int, device: torch.device) -> Tensor:
    """Which gate a row has: 0 prefill, 1 decode."""
    return (torch.arange(n_tokens, device=device) >= n_context).long()


def _loss_gradient(decoder: Decoder, states: Tensor, generator: torch.Generator) -> Tensor:
    """dL/dh of the last layer's output at the answer rows [n_answer, n_embd]."""
    states = states.requires_grad_()
    log_p = decoder.logits(states).log_softmax(-1)
    targets = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    [gradient] = torch.autograd.grad(-log_p.gather(1, targets).sum(), states)
    return gradient


def needed_bytes(
    shape: ModelShape, hyper: Hyper, n_tokens: int, n_answer: int, n_batch: int
) -> int:
    """Memory that `gate_gradients` takes for windows of `n_tokens`, torch itself included."""
    layers = zip(shape.attn_proj_macs, shape.kv_macs, shape.ffn_macs, strict=True)
    # One layer is read while the one before it is still there.
    weights = shape.head_macs + 2 * max(sum(parts) for parts in layers)
    n_head = max(shape.attn_dim) // (hyper.dim_k + hyper.dim_v)
    n_ff = max(shape.ffn_macs) // (3 * shape.n_embd)
    per_token = shape.n_embd * (shape.n_layer + 20) + 6 * n_ff + 5 * n_head * n_tokens
    logits = 5 * n_answer * shape.n_vocab
    return _BASE_BYTES + 4 * (weights + n_batch * n_tokens * per_token + logits)

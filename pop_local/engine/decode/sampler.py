"""Sample tokens with llama.cpp's samplers, in the order of llama_cpp's sampler chain.

Greedy sampling takes the token with the largest logit and uses no sampler chain. A chain would
choose the same token but would first fill an array with {id, logit, p} for the whole vocabulary.
"""

import ctypes
from typing import Any, Protocol

import numpy as np

from pop_converter.gguf.header import Header
from pop_local.config.sampler_options import SAMPLER_OPTIONS, SamplerOptions
from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.context import require_finite

_N_PENALISED = 64  # number of recent tokens that penalties apply to
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
# Sampling is greedy below this temperature, because scaled logits would overflow.
_MIN_TEMPERATURE = 0.01


def recommended(header: Header) -> dict[str, float]:
    """Return the publisher's recommended options, except invalid values and unknown keys."""
    values: dict[str, float] = {}
    for name, option in SAMPLER_OPTIONS.items():
        value = header.get(f"general.sampling.{option.gguf_key}")
        if isinstance(value, int | float) and option.least <= value <= option.most:
            values[name] = option.kind(value)
    return values


class Allowed(Protocol):
    """A constraint on the next token. `allowed` raises PopError if no token is allowed."""

    def allowed(self) -> np.ndarray | None:
        """Return the sorted IDs of the allowed tokens, or None if all tokens are allowed."""

    def accept(self, token: int) -> None:
        """Advance the constraint past a sampled token."""


class Sampler:
    """Samples an answer's tokens from logits."""

    def __init__(
        self, n_vocab: int, options: SamplerOptions, constraint: Allowed | None = None
    ) -> None:
        self._n_vocab, self._constraint = n_vocab, constraint
        self._api = bindings()
        self._chain: Any = None
        self._biased = np.array([token for token, _ in options.logit_bias], np.intp)
        self._biases = np.array([bias for _, bias in options.logit_bias], np.float32)
        penalties = (options.repeat_penalty, options.frequency_penalty, options.presence_penalty)
        self._is_greedy = options.temperature < _MIN_TEMPERATURE
        if not self._is_greedy or penalties != (1.0, 0.0, 0.0):
            self._chain = self._chained(options, penalties)
            self._ids = np.arange(n_vocab, dtype=np.int32)
            self._candidates = np.zeros(len(self._ids), _CANDIDATE)

    def _chained(self, options: SamplerOptions, penalties: tuple[float, float, float]) -> Any:
        api = self._api
        samplers = [api.llama_sampler_init_penalties(self._n_vocab, _N_PENALISED, *penalties)]
        if self._is_greedy:
            samplers.append(api.llama_sampler_init_greedy())
        else:
            seed = api.LLAMA_DEFAULT_SEED if options.seed is None else options.seed
            values = {name: getattr(options, name) for name in SAMPLER_OPTIONS} | {"seed": seed}
            for name, option in SAMPLER_OPTIONS.items():
                if option.sampler:
                    create = getattr(api, f"llama_sampler_init_{option.sampler}")
                    arguments = (values.get(word, word) for word in option.arguments)
                    samplers.append(create(values[name], *arguments))
            samplers += [
                api.llama_sampler_init_temp(options.temperature),
                api.llama_sampler_init_dist(seed),
            ]
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        for sampler in samplers:
            api.llama_sampler_chain_add(chain, sampler)
        return chain

    def sample(self, logits: np.ndarray) -> int:
        """Choose the next token. `logits`: float32 [n_vocab].

        Raises PopError if the constraint allows no token, or if a logit is NaN or infinite.
        """
        ids = None if self._constraint is None else self._constraint.allowed()
        require_finite(logits.max())
        if len(self._biased):
            logits = logits.copy()
            np.add.at(logits, self._biased, self._biases)
        logits = logits if ids is None else logits[ids]
        if self._chain is not None:
            token = self._from_chain(ids, logits)
        else:
            best = logits.argmax()
            token = int(best if ids is None else ids[best])
        if self._constraint is not None:
            self._constraint.accept(token)
        return token

    def _from_chain(self, ids: np.ndarray | None, logits: np.ndarray) -> int:
        candidates = self._candidates[: len(logits)]
        candidates["id"] = self._ids if ids is None else ids
        candidates["logit"] = logits
        data = candidates.ctypes.data_as(ctypes.POINTER(self._api.llama_token_data))
        array = self._api.llama_token_data_array(data, len(logits), -1, False)
        self._api.llama_sampler_apply(self._chain, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        self._api.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        if self._chain is not None:
            self._api.llama_sampler_free(self._chain)
            self._chain = None

    def __del__(self) -> None:
        if hasattr(self, "_chain"):
            self.close()

"""Saved KV states that know under which mode, boundary and conversion they were computed."""

import ctypes
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pop_converter.gguf.header import Header, read_header
from pop_converter.gguf.source import SAMPLED_BYTES, Source
from pop_converter.popfile.format import PopMeta, encode_keys
from pop_converter.projection import TENSOR_MARK, Projection
from pop_local.engine.llama.backend import Mode, bindings
from pop_local.engine.llama.upstream import BaseLlamaCache, LlamaRAMCache, LlamaState

NO_CONVERSION = f"{Projection.OWN} projections"
# Fields of llama_context_params, as `Llama` sets them where nobody says otherwise. With flash
# attention V is stored in another order.
_DEFAULTS = {
    "flash_attn_type": 0,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "rope_scaling_type": -1,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": 1.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_orig_ctx": 0,
}


def conversion(meta: PopMeta | None, base: Source, sidecar: Path | None) -> str:
    """Tells two conversions of one model apart, in words and a fingerprint.

    It covers the keys that pruned K/V depend on, and the table and beginnings of fitted tensors.

    A sidecar and a single file of one fit have the same.
    """
    if meta is None:
        return NO_CONVERSION
    # Where the keys come from, what was measured, and what decided, do not matter.
    keys = replace(meta, source_name="", source_bytes=0, tool="")
    keys = replace(keys, measured=None, refilled=None, recall=None, budget=None)
    digest = hashlib.sha256(b"".join(encode_keys(keys)))
    for header in base.parts if sidecar is None else (read_header(sidecar),):
        _add_tensors(digest, header, are_fitted=True)
    return f"{meta.projection} projections {digest.hexdigest()[:16]}"


def loaded_with(model: Any) -> str:
    """In words, the options of a KvLlama that K/V depend on, where they are not the defaults."""
    found = {name: getattr(model.context_params, name) for name in _DEFAULTS}
    given = [f"{name} {value:g}" for name, value in found.items() if value != _DEFAULTS[name]]
    if model.kv_overrides:
        given.append(f"keys {model.kv_overrides}")
    if model.lora_sha256:
        given.append(f"LoRA {model.lora_sha256[:16]} x {model.lora_scale:g}")
    return "".join(f", {each}" for each in given)


def own_sha256(source: Source) -> str:
    """Tells two models of one shape apart by the beginnings of their tensors.

    A model and its conversion have the same.
    """
    digest = hashlib.sha256()
    for header in source.parts:
        _add_tensors(digest, header, are_fitted=False)
    return digest.hexdigest()


def _add_tensors(digest: Any, header: Header, *, are_fitted: bool) -> None:
    with header.path.open("rb") as file:
        for tensor in header.tensors:
            if (TENSOR_MARK in tensor.name) is are_fitted:
                digest.update(f"{tensor.name} {tensor.dims} {tensor.type}".encode())
                file.seek(header.data_start + tensor.offset)
                digest.update(file.read(min(tensor.size_bytes, SAMPLED_BYTES)))


@dataclass(frozen=True)
class KvKey:
    """What the K/V of a prompt depend on besides its tokens; never to be mixed in one cache."""

    mode: Mode
    boundary: int
    conversion: str = NO_CONVERSION

    def __str__(self) -> str:
        if self.mode is Mode.OFF:
            return "mode OFF"
        return f"mode {self.mode.name}, boundary {self.boundary}, {self.conversion}"


FULL = KvKey(Mode.OFF, 0)


class PopState(LlamaState):
    """A LlamaState, and of each of its tokens whether it ran all layers, and where it stands.

    `positions`: as of CachedRows. `model`: whose it is (KvLlama.model_key), "" if nobody knows.
    """

    def __init__(
        self,
        *,
        key: KvKey,
        is_full: np.ndarray,
        positions: np.ndarray,
        model: str = "",
        **fields: Any,
    ) -> None:
        super().__init__(**fields)
        self.key = key
        self.model = model
        self.is_full = is_full
        self.positions = positions

    @classmethod
    def of(cls, state: LlamaState) -> "PopState":
        """The same of a state that llama_cpp made, which the full model's rows alone are in."""
        if isinstance(state, cls):
            return state
        positions = np.arange(state.n_tokens + 1, dtype=np.int32)
        is_full = np.ones(state.n_tokens, bool)
        return cls(**{**vars(state), "key": FULL, "is_full": is_full, "positions": positions})


def context_state(ctx: Any) -> bytes:
    """All that a llama_context holds."""
    api = bindings()
    buffer = np.empty(api.llama_state_get_size(ctx), dtype=np.uint8)
    return buffer[: api.llama_state_get_data(ctx, _bytes_at(buffer), buffer.size)].tobytes()


def restore_context_state(ctx: Any, state: bytes) -> bool:
    """Whether it could be restored; what the context holds is undefined if not.

    Nothing is no state, though llama.cpp reads 0 bytes of it, as many as there are.
    """
    if not state:
        return False
    buffer = np.frombuffer(state, dtype=np.uint8).copy()
    return bool(bindings().llama_state_set_data(ctx, _bytes_at(buffer), buffer.size) == buffer.size)


def _bytes_at(buffer: np.ndarray) -> Any:
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class PromptCache(LlamaRAMCache):
    """A cache of llama_cpp, but a prompt takes the place of those that it goes on from, and one
    that is too large for it drives no others out. `capacity_bytes` counts llama.cpp's states."""

    def __setitem__(self, tokens: Sequence[int], state: LlamaState) -> None:
        if state.llama_state_size > self.capacity_bytes:
            return
        key = tuple(tokens)
        for other in [one for one in self.cache_state if one == key[: len(one)]]:
            del self.cache_state[other]
        super().__setitem__(key, state)


class KeyedCache(BaseLlamaCache):
    """A prompt cache of llama_cpp in which only states of one key are found."""

    def __init__(self, cache: BaseLlamaCache, key: str) -> None:
        super().__init__(cache.capacity_bytes)
        self.cache = cache
        # A number that is no token, one for each key.
        self._mark = -1 - int.from_bytes(key.encode(), "big")

    @property
    def cache_size(self) -> int:
        return int(self.cache.cache_size)

    def __getitem__(self, tokens: Sequence[int]) -> LlamaState:
        return self.cache[self._keyed(tokens)]

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return self._keyed(tokens) in self.cache

    def __setitem__(self, tokens: Sequence[int], state: LlamaState) -> None:
        self.cache[self._keyed(tokens)] = state

    def _keyed(self, tokens: Sequence[int]) -> list[int]:
        return [self._mark, *tokens]

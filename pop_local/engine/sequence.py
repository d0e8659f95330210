"""A sequence of an engine: reads a prompt into its KV cache and yields sampled tokens."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.depth.refiller import Refiller
from pop_local.engine.llama.interrupt import DisplacedError
from pop_local.engine.prefill.plan import RowRule
from pop_local.engine.prefill.read import OnPrefill, Read, read
from pop_local.engine.prompt.prompt import Prompt


class TokenSource(Protocol):
    """Source of sampled tokens."""

    def sample(self) -> int:
        """Sample the next token from the last logits."""

    def close(self) -> None:
        """Free native resources."""


@dataclass(frozen=True)
class CachedSequence:
    """A KV cache, its refiller and the rule that selects full rows."""

    cache: KvCache
    refiller: Refiller
    rule: RowRule

    def read(self, prompt: Prompt, on_prefill: OnPrefill | None = None) -> Read:
        """Read a prompt into the cache; see prefill.read.read."""
        return read(self.cache, prompt, self.rule, on_prefill)

    def sampled(self, source: TokenSource) -> Generator[int]:
        """Yield tokens endlessly, starting after the cached prompt.

        Raises DisplacedError once another prompt has replaced the cache.
        """
        return self._sampled(source, self.cache.epoch)

    def _sampled(self, source: TokenSource, epoch: int) -> Generator[int]:
        cache = self.cache
        try:
            while True:
                token = source.sample()
                yield token
                if cache.epoch != epoch:
                    raise DisplacedError
                cache.step(token)
                if cache.epoch != epoch:
                    raise DisplacedError
        finally:
            source.close()

"""Figures for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pop_local.engine.turn import TurnStats

# Seconds: from a cached prompt on a GPU to a long one on an old CPU.
_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Of one server; nothing is global."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._ttft = Histogram(
            "pop_ttft_seconds",
            "From the start of a request's prefill to its first token",
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._waited = Histogram(
            "pop_queue_seconds",
            "What a request waited for others",
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._prompt = Counter(
            "pop_prompt_tokens",
            "Prompt tokens that stopped at the boundary, ran all layers, or were cached",
            ["kind"],
            registry=self._registry,
        )
        self._decoded = Counter(
            "pop_decoded_tokens", "Tokens that were generated", registry=self._registry
        )
        self._requests = Counter(
            "pop_requests",
            "Requests by HTTP status; 499: the client hung up",
            ["path", "status"],
            registry=self._registry,
        )
        self._queue = Gauge(
            "pop_queue_length", "Requests that wait for the model", registry=self._registry
        )
        for kind in ("pruned", "exact", "full", "cached"):
            self._prompt.labels(kind)

    def watch_queue(self, n_waiting: Callable[[], int]) -> None:
        """Asked whenever the figures are."""
        self._queue.set_function(n_waiting)

    def began(self, waited_s: float) -> None:
        self._waited.observe(waited_s)

    def answered(self, stats: TurnStats) -> None:
        """An interrupted answer counts with what was done for it."""
        self._prompt.labels("pruned").inc(stats.n_pruned)
        self._prompt.labels("exact").inc(stats.n_exact)
        self._prompt.labels("full").inc(stats.n_full)
        self._prompt.labels("cached").inc(stats.n_cached)
        self._decoded.inc(stats.n_decoded)
        if stats.n_decoded:
            self._ttft.observe(stats.ttft_s)

    def requested(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    @property
    def text(self) -> bytes:
        return generate_latest(self._registry)

"""Prometheus metrics of one server, without the global registry."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pop_local.engine.turn import TurnStats

# Seconds, from a cached prompt on a GPU to a long prompt on an old CPU.
_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        seconds = partial(Histogram, buckets=_BUCKETS, registry=self._registry)
        counter = partial(Counter, registry=self._registry)
        gauge = partial(Gauge, registry=self._registry)
        self._ttft = seconds(
            "pop_ttft_seconds", "Time from the start of prefill to the first token"
        )
        self.queued = seconds("pop_queue_seconds", "Time that requests spent in the queue")
        self._prompt = counter(
            "pop_prompt_tokens",
            "Prompt tokens by kind: stopped at the boundary, ran all layers, or cached",
            ["kind"],
        )
        self._decoded = counter("pop_decoded_tokens", "Generated tokens")
        self._image = counter("pop_image_tokens", "Prompt tokens of images, including cached ones")
        self._encoding = counter(
            "pop_encode_seconds", "Time spent encoding images, which pruning does not reduce"
        )
        self._deep = counter(
            "pop_deep_tokens", "Context tokens that ran all layers because of their spelling"
        )
        self.refilled = counter(
            "pop_refilled_tokens", "Cached tokens that ran the skipped layers between requests"
        )
        self.requests = counter(
            "pop_requests",
            "Requests by path and HTTP status (499: the client disconnected)",
            ["path", "status"],
        )
        self.queue = gauge("pop_queue_length", "Queued requests")
        self.open = gauge("pop_models_open", "Models in memory")
        self.unread = gauge(
            "pop_unread_tokens",
            "Unread tokens of the prompts that are being read",
        )
        self.refillable = gauge(
            "pop_refillable_tokens", "Cached tokens that have not run the skipped layers"
        )
        for kind in ("pruned", "exact", "full", "cached"):
            self._prompt.labels(kind)

    def answered(self, stats: TurnStats) -> None:
        """Count an answer's work, also if it was interrupted."""
        self._prompt.labels("pruned").inc(stats.n_pruned)
        self._prompt.labels("exact").inc(stats.n_skipped_exact)
        self._prompt.labels("full").inc(stats.n_full)
        self._prompt.labels("cached").inc(stats.n_cached)
        self._image.inc(stats.n_image)
        self._encoding.inc(stats.encode_s)
        self._deep.inc(stats.n_deep)
        self._decoded.inc(stats.n_decoded)
        if stats.n_decoded:
            self._ttft.observe(stats.ttft_s)

    @property
    def text(self) -> bytes:
        return generate_latest(self._registry)

"""One server's figures for Prometheus; nothing is global."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pop_local.engine.turn import TurnStats

# Seconds: from a cached prompt on a GPU to a long one on an old CPU.
_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        seconds = partial(Histogram, buckets=_BUCKETS, registry=self._registry)
        counter = partial(Counter, registry=self._registry)
        gauge = partial(Gauge, registry=self._registry)
        self._ttft = seconds(
            "pop_ttft_seconds", "From the start of a request's prefill to its first token"
        )
        self.queued = seconds("pop_queue_seconds", "What a request waited for others")
        self._prompt = counter(
            "pop_prompt_tokens",
            "Prompt tokens that stopped at the boundary, ran all layers, or were cached",
            ["kind"],
        )
        self._decoded = counter("pop_decoded_tokens", "Tokens that were generated")
        self._image = counter(
            "pop_image_tokens", "Prompt tokens that were rows of pictures, cached ones among them"
        )
        self._encoding = counter(
            "pop_encode_seconds", "Spent on making rows of pictures, which pruning does not shorten"
        )
        self._deep = counter(
            "pop_deep_tokens", "Prompt tokens that ran all layers because of their spelling"
        )
        self.refilled = counter(
            "pop_refilled_tokens", "Cached tokens that ran the skipped layers between requests"
        )
        self.requests = counter(
            "pop_requests", "Requests by HTTP status; 499: the client hung up", ["path", "status"]
        )
        self.queue = gauge("pop_queue_length", "Requests that wait for the model")
        self.open = gauge("pop_models_open", "Models in memory")
        self.unread = gauge(
            "pop_unread_tokens",
            "Tokens that are still to be read of the prompts that are being read",
        )
        self.refillable = gauge(
            "pop_refillable_tokens", "Cached tokens that are still to run the skipped layers"
        )
        for kind in ("pruned", "exact", "full", "cached"):
            self._prompt.labels(kind)

    def answered(self, stats: TurnStats) -> None:
        """Count an answer; an interrupted one with the work that was done."""
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

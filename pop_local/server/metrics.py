"""A server's Prometheus metrics."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pop_local.engine.chat_messages import TurnStats

# Upper bounds in seconds: from a cached prompt on a GPU to a long prompt on an old CPU.
_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        seconds = partial(Histogram, buckets=_BUCKETS, registry=self.registry)
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        self._ttft = seconds("pop_ttft_seconds", "Time to first token from the start of prefill")
        self.queued = seconds("pop_queue_seconds", "Time that requests spent in the queue")
        kinds = "Prompt tokens by kind: pruned, skipped without loss, read in full, or cached"
        prompt = counter("pop_prompt_tokens", kinds, ["kind"])
        statuses = "Requests by path and HTTP status (499: the client disconnected)"
        self.requests = counter("pop_requests", statuses, ["path", "status"])
        catching_up = "Cached tokens whose skipped layers were computed between requests"
        self.refilled = counter("pop_refilled_tokens", catching_up)
        self._of_answers = {  # keys are fields of TurnStats
            "n_pruned": prompt.labels("pruned"),
            "n_skipped_exact": prompt.labels("exact"),
            "n_full": prompt.labels("full"),
            "n_cached": prompt.labels("cached"),
            "n_stale": counter(
                "pop_stale_tokens", "Cached tokens whose K/V values were computed before an edit"
            ),
            "n_image": counter(
                "pop_image_tokens", "Image tokens in prompts, including cached tokens"
            ),
            "encode_s": counter("pop_encode_seconds", "Time spent encoding images"),
            "n_deep": counter("pop_deep_tokens", "Prompt tokens processed as deep rows"),
            "n_decoded": counter("pop_decoded_tokens", "Generated tokens"),
        }
        self.queue = gauge("pop_queue_length", "Queued requests")
        self.open = gauge("pop_models_open", "Models in memory")

    def answered(self, stats: TurnStats) -> None:
        """Add a complete or interrupted answer to the metrics."""
        for name, metric in self._of_answers.items():
            metric.inc(getattr(stats, name))
        if stats.n_decoded:
            self._ttft.observe(stats.ttft_s)

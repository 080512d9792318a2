"""What a replica counts. Ray exports it to Prometheus, each name with `ray_` in front."""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge, Histogram

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]
SHARES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99]


class Metrics:
    """Of the generator; `kind` is generate or predict, `result` hit or miss."""

    def __init__(self) -> None:
        self._seconds = Histogram(
            "tina_batch_duration_seconds",
            description="Time of all denoising steps of a model, or of a forward pass.",
            boundaries=SECONDS,
            tag_keys=("kind",),
        )
        # a mean of these over the passes is exact: Ray makes up a histogram's sum from its buckets
        self._requests = Counter(
            "tina_batch_requests_total",
            description="Requests in each model's last denoising step, and in each forward pass.",
            tag_keys=("kind",),
        )
        self._lookups = Counter(
            "tina_cache_lookups_total",
            description="Look-ups in the cache of generated models.",
            tag_keys=("result",),
        )
        self.waiting = Gauge(
            "tina_waiting_requests", description="Prompts that wait for the next denoising step."
        )
        self.familiarity = Histogram(
            "tina_familiarity_ratio",
            description="How well the training classes cover a prompt's least familiar class.",
            boundaries=SHARES,
        )

    def batch(self, kind: str, size: int, seconds: float) -> None:
        """A model has been denoised, or a forward pass has ended."""
        self._seconds.observe(seconds, tags={"kind": kind})
        self._requests.inc(size, tags={"kind": kind})

    def lookup(self, *, hit: bool) -> None:
        """A model was looked up."""
        self._lookups.inc(tags={"result": "hit" if hit else "miss"})

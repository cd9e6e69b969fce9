"""What the server counts and times, as Prometheus reads it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from dropflow_lab.serve.names import Names
from dropflow_lab.serve.reuse import Reuse
from dropflow_lab.serve.waiting import Waiting

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SIZES = (1, 2, 4, 8, 16, 32, 64)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters and histograms of one server, by model name (with its policy); empty where a name is not known."""

    def __init__(self, inside: Callable[[], int], waiting: Callable[[], int]) -> None:
        """`inside` and `waiting` return the numbers of requests in the server, and in line."""
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # memory and CPU time
        model = {"labelnames": ("model",), "registry": self._registry}
        self._requests = Counter(
            "dropflow_requests", "Chat requests that were answered or refused.", ("model", "status"),
            registry=self._registry,
        )  # fmt: skip
        self._prompt_tokens = Counter("dropflow_prompt_tokens", "Tokens of prompts, before dropping.", **model)
        self._answer_tokens = Counter("dropflow_answer_tokens", "Tokens of answers.", **model)
        self._batch = Histogram("dropflow_batch_size", "Requests that were answered at once.", buckets=_SIZES, **model)
        self._first = Histogram(
            "dropflow_time_to_first_token_seconds", "From a request's arrival to its first text.", buckets=_SECONDS,
            **model,
        )  # fmt: skip
        self._whole = Histogram(
            "dropflow_request_seconds", "From a request's arrival to the end of its answer.", buckets=_SECONDS, **model
        )
        for name, text, count in (
            ("dropflow_requests_inside", "Requests in the server.", inside),
            ("dropflow_requests_waiting", "Requests that wait for the model.", waiting),
        ):
            Gauge(name, text, registry=self._registry).set_function(count)

    def follow(self, reuse: Reuse, names: Names) -> None:
        """Tell what requests about the same pictures share."""
        self._registry.register(_Reused(reuse, names))

    def batch(self, model: str, batch: Sequence[Waiting]) -> None:
        """Count a batch that is about to be answered."""
        self._batch.labels(model).observe(len(batch))

    def answered(self, model: str, arrived: float, first: float | None, prompt: int, answer: int) -> None:
        """Count an answer; `arrived` and `first` (its first text, if it had any) are readings of `time.monotonic`."""
        self._prompt_tokens.labels(model).inc(prompt)
        self._answer_tokens.labels(model).inc(answer)
        self._whole.labels(model).observe(time.monotonic() - arrived)
        if first is not None:
            self._first.labels(model).observe(first - arrived)

    def ended(self, model: str, status: int) -> None:
        """Count a request by its HTTP status; 499 where the client left."""
        self._requests.labels(model, str(status)).inc()

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return bytes(generate_latest(self._registry))


class _Reused:
    """Reads the counts of `Reuse` when it is asked for them."""

    def __init__(self, reuse: Reuse, names: Names) -> None:
        self._reuse, self._names = reuse, names

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        counts = {
            "dropflow_prefix_hits": ("Requests whose pictures were not run again.", self._reuse.hits),
            "dropflow_prefixes_made": ("Prefixes that were made.", self._reuse.made),
        }
        for name, (text, by_policy) in counts.items():
            family = CounterMetricFamily(name, text, labels=["model"])
            for policy, count in by_policy.items():
                family.add_metric([self._names.full(policy)], count)
            yield family
        yield GaugeMetricFamily("dropflow_prefix_bytes", "Bytes that prefixes hold.", value=self._reuse.nbytes)

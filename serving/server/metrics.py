"""Prometheus metrics of one server, in a registry of its own: nothing of other libraries, nothing shared in tests."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from serving.driver import Driver

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts what the server does; the gauges ask the driver and its engine at each scrape."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, driver: Driver) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "trivet_requests",
            "Generation requests, by HTTP status (499: left)",
            ["endpoint", "status"],
            registry=registry,
        )
        self._tokens = Counter("trivet_tokens", "Tokens of served requests", ["kind"], registry=registry)
        self._first_token_s = Histogram(
            "trivet_first_token_seconds",
            "From admission to the first token",
            ["endpoint"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._request_s = Histogram(
            "trivet_request_seconds",
            "From admission to the end of the answer",
            ["endpoint"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        engine = driver.engine
        for name, text, read in (
            ("trivet_slots", "Requests that can run at once", lambda: engine.slots),
            ("trivet_running", "Requests that hold a slot", lambda: engine.running),
            ("trivet_waiting", "Requests in the queue", lambda: engine.waiting),
            ("trivet_failed_steps", "Engine steps in a row that failed", lambda: driver.num_failed_steps),
            ("trivet_healthy", "1 when the engine does its work", lambda: int(driver.healthy)),
        ):
            Gauge(name, text, registry=registry).set_function(read)

    def first_token(self, endpoint: str, seconds: float) -> None:
        """Record the time to a request's first token."""
        self._first_token_s.labels(endpoint).observe(seconds)

    def finished(self, endpoint: str, status: int, seconds: float, usage: dict[str, int]) -> None:
        """Record the end of a request that the engine had taken."""
        self._requests.labels(endpoint, str(status)).inc()
        self._request_s.labels(endpoint).observe(seconds)
        self._tokens.labels("prompt").inc(usage["prompt_tokens"])
        self._tokens.labels("completion").inc(usage["completion_tokens"])

    def refused(self, endpoint: str, status: int) -> None:
        """Record a request that never reached the engine."""
        self._requests.labels(endpoint, str(status)).inc()

    def render(self) -> bytes:
        """Return the text that Prometheus scrapes."""
        return generate_latest(self._registry)

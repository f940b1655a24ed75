"""The gateway's Prometheus metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)

# Reasons that alerts look for: they are there from the start, or nobody would see the first of them come.
AWAITED = ("deadline", "no_replica", "queue_full")


class Metrics:
    """Metrics in a registry of its own, so that several gateways in one process do not collide."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kimi_gateway_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"kimi_gateway_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"kimi_gateway_{name}", text, ["lane"], registry=registry, buckets=SECONDS)

        self.requests = counter("requests_total", "Finished requests.", "route", "status", "lane")
        self.queue_seconds = seconds("queue_seconds", "Seconds that admitted prompts waited.")
        self.ttft = seconds("ttft_seconds", "Seconds from a request's first byte to its answer's first token.")
        self.queued = gauge("queued", "Waiting prompts.", "lane")
        self.running = gauge("running", "Requests running at a replica.", "replica")
        self.outstanding = gauge(
            "prefill_tokens_outstanding", "Estimated tokens of prompts without a first token.", "replica", "lane"
        )
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens, as replicas counted them.", "key")
        self.cached_tokens = counter("cached_tokens_total", "Prompt tokens found in a prefix cache.", "key")
        self.completion_tokens = counter("completion_tokens_total", "Tokens generated.", "key")
        self.rejected = counter("rejected_total", "Requests that the gateway refused itself.", "reason")
        for reason in AWAITED:
            self.rejected.labels(reason)
        self.prefills = counter("prefills_total", "Long prompts that a prefill server read, or failed to.", "outcome")
        self.up = gauge("replica_up", "1 if the replica answers its probes, else 0.", "replica")
        self.affinity_misses = counter(
            "sessions_spilled_total", "Prompts sent to a replica other than their session's."
        )

    def text(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self.registry)

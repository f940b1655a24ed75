"""How many states the prefix cache holds, and how many gave way: counted in the engine, shown at /metrics.

    kimi_linear_snapshots_held            gauge: positions whose state of all KDA layers can be found
    kimi_linear_snapshots_evicted_total   counter: those whose blocks were taken for something else

Both carry the labels `model_name` and `engine`, as vLLM's own. All groups of KDA layers keep their states at the same
positions, so one group is counted.
"""

from collections.abc import Mapping, Sequence

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.v1.core.kv_cache_metrics import KVCacheMetricsCollector
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_group_id

HELD, EVICTED = "kimi_linear_snapshots_held", "kimi_linear_snapshots_evicted"


class CheckpointCount:
    """Stands where vLLM's block pool reports to, and passes all on to who stood there before, if anybody did."""

    def __init__(self, group: int, before: KVCacheMetricsCollector | None) -> None:
        self.group = group
        self.before = before
        self.held = self.evicted = 0

    def published(self, states: int) -> None:
        self.held += states

    def on_block_evicted(self, block: KVCacheBlock) -> None:
        if block.block_hash is not None and get_group_id(block.block_hash) == self.group:
            self.held -= 1
            self.evicted += 1
        if self.before:
            self.before.on_block_evicted(block)

    def on_block_allocated(self, block: KVCacheBlock) -> None:
        if self.before:
            self.before.on_block_allocated(block)

    def on_block_accessed(self, block: KVCacheBlock) -> None:
        if self.before:
            self.before.on_block_accessed(block)

    def reset(self) -> None:
        """The prefix cache was emptied by request."""
        self.held = 0
        if self.before:
            self.before.reset()

    def take(self) -> dict[str, int]:
        """What is held now, and what was evicted since this was last called."""
        evicted, self.evicted = self.evicted, 0
        return {HELD: self.held, EVICTED: evicted}


class CheckpointMetrics:
    """Shows the counts of each engine."""

    def __init__(
        self, gauge: type[Gauge], counter: type[Counter], labels_by_engine: Mapping[int, Sequence[object]]
    ) -> None:
        """The classes of metrics that this process uses; each engine's model_name and engine."""
        for collector in list(REGISTRY._collector_to_names):  # as vLLM withdraws its own: of an engine before this one
            if getattr(collector, "_name", None) in (HELD, EVICTED):
                REGISTRY.unregister(collector)
        labels = ["model_name", "engine"]
        # Several API servers share the metrics, and each hears of some steps.
        held = gauge(
            HELD,
            "Positions in prompts for which the prefix cache holds the states of all KDA layers.",
            labelnames=labels,
            multiprocess_mode="mostrecent",
        )
        evicted = counter(EVICTED, "Positions whose states were evicted from the prefix cache.", labelnames=labels)
        self.engines = {
            engine: (held.labels(*values), evicted.labels(*values)) for engine, values in labels_by_engine.items()
        }

    def record(self, counts: Mapping[str, int], engine: int) -> None:
        """Show what `CheckpointCount.take` gave in the process of this engine."""
        held, evicted = self.engines[engine]
        held.set(counts[HELD])
        evicted.inc(counts[EVICTED])

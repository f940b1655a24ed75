"""How many states the prefix cache holds, and how many gave way: counted in the engine, shown at /metrics.

    kimi_linear_snapshots_held            gauge: positions whose state of all KDA layers can be found
    kimi_linear_snapshots_evicted_total   counter: those whose blocks were taken for something else

Both carry the labels `model_name` and `engine`, as vLLM's own. All groups of KDA layers keep their states at the same
positions, so one group is counted.
"""

from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_metrics import KVCacheMetricsCollector
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_group_id
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from vllm_kimi_linear import ARCHITECTURE

HELD, EVICTED = "kimi_linear_snapshots_held", "kimi_linear_snapshots_evicted"


class SnapshotCount:
    """Stands where vLLM's block pool reports to, and passes all on to who stood there before, if anybody did."""

    def __init__(self, group: int, before: KVCacheMetricsCollector | None) -> None:
        self.group = group
        self.before = before
        self.held = self.evicted = 0

    def published(self, snapshots: int) -> None:
        self.held += snapshots

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

    @property
    def stats(self) -> dict[str, int]:
        return {HELD: self.held, EVICTED: self.evicted}


class SnapshotMetrics(AggregateStatLoggerBase):
    """Shows the counts of each engine; entry point `kimi_linear` of the group `vllm.stat_logger_plugins`."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self.model = vllm_config.model_config.served_model_name
        self.seen = dict.fromkeys(engine_indexes, 0)
        self.held: Gauge | None = None
        if vllm_config.model_config.architecture == ARCHITECTURE:
            labels = ["model_name", "engine"]
            self.held = Gauge(HELD, "Positions whose state of all KDA layers is in the prefix cache.", labels)
            self.evicted = Counter(EVICTED, "Positions whose state left the prefix cache for something else.", labels)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        counts: dict[str, Any] = scheduler_stats.waiting_lora_adapters if scheduler_stats else {}
        if self.held is None or HELD not in counts:
            return
        labels = (self.model, str(engine_idx))
        self.held.labels(*labels).set(counts[HELD])
        self.evicted.labels(*labels).inc(counts[EVICTED] - self.seen[engine_idx])
        self.seen[engine_idx] = counts[EVICTED]

    def log_engine_initialized(self) -> None:
        pass

"""Count the states in the prefix cache, and show the counts at /metrics beside vLLM's own."""

import dataclasses
from typing import Any

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.cache import manager as kda
from vllm_kimi_linear.cache.metrics import CheckpointMetrics
from vllm_kimi_linear.patches.patch import Function, Hook, Patch

LOGGER = "vllm.v1.metrics.loggers:PrometheusStatLogger"
FIELD = "kda_checkpoints"  # of SchedulerStats: name of a count -> its number; None in engines of other models


def add_field(stats: Any) -> Any:
    """A field more of a dataclass that is sent from process to process, and its serializer asks for its fields."""
    if FIELD not in stats.__dataclass_fields__:
        field: Any = dataclasses.field(default=None)
        field.name, field.type = FIELD, dict[str, int] | None
        field._field_type = dataclasses._FIELD  # type: ignore[attr-defined]
        stats.__dataclass_fields__[FIELD] = field
        stats.__annotations__[FIELD] = field.type
        setattr(stats, FIELD, None)
    return stats


def count(original: Function) -> Function:
    def make_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
        stats = original(self, *args, **kwargs)
        managers = kda.kda_managers(self.kv_cache_manager.coordinator)
        if stats is not None and managers and managers[0].count is not None:
            setattr(stats, FIELD, managers[0].count.take())
        return stats

    return make_stats


def start(original: Function) -> Function:
    def __init__(self: Any, vllm_config: Any, engine_indexes: Any = None) -> None:
        original(self, vllm_config, engine_indexes)
        self.kimi_linear = None
        if vllm_config.model_config.architecture == ARCHITECTURE:
            self.kimi_linear = CheckpointMetrics(self._gauge_cls, self._counter_cls, self.per_engine_labelvalues)

    return __init__


def show(original: Function) -> Function:
    def record(
        self: Any, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: Any = 0
    ) -> Any:
        original(self, scheduler_stats, iteration_stats, mm_cache_stats=mm_cache_stats, engine_idx=engine_idx)
        counts = getattr(scheduler_stats, FIELD, None)
        if self.kimi_linear is not None and counts is not None:
            self.kimi_linear.record(counts, engine_idx)

    return record


PATCH = Patch(
    symptom="Nothing shows how many states of KDA layers the prefix cache holds, nor how many it evicted. The "
    "interface for this is a plugin of the group `vllm.stat_logger_plugins`, but with one --disable-log-stats is "
    'ignored for every model, and a second `AsyncLLM` in one process ends with "Duplicated timeseries".',
    cause="`SchedulerStats` has no field for what a plugin counts. If such a plugin is installed, `AsyncLLM` turns "
    "logging on before the plugin can say which models it is for. And before vLLM registers metrics again, it "
    "unregisters only those named `vllm:...`.",
    remove_when="a plugin can add to the scheduler's statistics, choose the models it applies to, and unregister "
    "its metrics.",
    hooks=(
        Hook("vllm.v1.metrics.stats:SchedulerStats", "", add_field),
        Hook("vllm.v1.core.sched.scheduler:Scheduler.make_stats", "self ...", count),
        Hook(f"{LOGGER}.__init__", "self vllm_config engine_indexes", start),
        Hook(f"{LOGGER}.record", "self scheduler_stats iteration_stats mm_cache_stats engine_idx", show),
    ),
)

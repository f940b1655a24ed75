"""Show the numbers of `snapshot_metrics.py` at /metrics, beside vLLM's own and wherever those are shown.

Symptom: with a plugin of the group `vllm.stat_logger_plugins`, which is there for this, --disable-log-stats is ignored
    for every model, and a second `AsyncLLM` in one process ends with "Duplicated timeseries".
Cause: `AsyncLLM` takes the presence of such a plugin for a wish to log, before it can say which models it is for; and
    vLLM withdraws only metrics named `vllm:...` from the registry before it registers them again.
Upstream: not reported yet.
Remove when: such a plugin is asked whether it wants a model's statistics, and can withdraw its metrics.
"""

import functools
from collections.abc import Callable

from vllm.v1.metrics.loggers import PrometheusStatLogger

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.snapshot_metrics import SnapshotMetrics


def apply() -> None:
    start: Callable = PrometheusStatLogger.__init__
    record: Callable = PrometheusStatLogger.record
    if hasattr(record, "keeps_kimi_linear"):
        return

    @functools.wraps(start)
    def started(self, vllm_config, engine_indexes=None):
        start(self, vllm_config, engine_indexes)
        self.kimi_linear = None
        if vllm_config.model_config.architecture == ARCHITECTURE:
            self.kimi_linear = SnapshotMetrics(self._gauge_cls, self._counter_cls, self.per_engine_labelvalues)

    @functools.wraps(record)
    def recorded(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0):
        record(self, scheduler_stats, iteration_stats, mm_cache_stats=mm_cache_stats, engine_idx=engine_idx)
        if self.kimi_linear is not None and scheduler_stats is not None:
            self.kimi_linear.record(scheduler_stats.waiting_lora_adapters, engine_idx)

    vars(recorded)["keeps_kimi_linear"] = True
    PrometheusStatLogger.__init__ = started
    PrometheusStatLogger.record = recorded

"""Let the check of states follow what a connector stores and loads."""

from collections.abc import Iterator, Sequence
from typing import Any

from vllm_kimi_linear.cache.check import StateCheck
from vllm_kimi_linear.patches.patch import Function, Hook, Patch


def states(groups: Sequence[Any], blocks: Any) -> Iterator[tuple[StateCheck, int, int]]:
    """(check, block, tokens of its state) of a connector's transfer; groups: those of the cache that it moves."""
    ids = iter(blocks.block_ids.tolist())
    for group, count, first in zip(groups, blocks.group_sizes, blocks.block_indices, strict=True):
        checks = [check for check in StateCheck.all if not check.layers.isdisjoint(group.layer_names)]
        for column in range(first, first + count):
            block = next(ids)
            yield from ((check, block, (column + 1) * check.block) for check in checks)


def moved(worker: Any) -> list[Any]:
    """The groups of the cache that a connector's worker moves."""
    config = worker.kv_cache_config
    return [config.kv_cache_groups[index] for index in config.prefix_cacheable_group_ids]


def check_stores(original: Function) -> Function:
    def handle_preemptions(self: Any, kv_connector_metadata: Any) -> None:
        """What vLLM submits here is all that it stores: what the last step left, and what must not wait."""
        if StateCheck.all:
            last = [source for _, source, _ in self._unsubmitted_store_jobs]
            flushed = kv_connector_metadata.jobs_to_flush or ()
            now = [job.src_spec for name, job in kv_connector_metadata.store_jobs.items() if name in flushed]
            for source in last + now:
                for check, block, position in states(moved(self), source):
                    check.stored(block, position)
        original(self, kv_connector_metadata)

    return handle_preemptions


def note_loads(original: Function) -> Function:
    def start_kv_transfers(self: Any, metadata: Any) -> None:
        if StateCheck.all:
            for job in metadata.load_jobs.values():
                for check, block, position in states(moved(self), job.dst_spec):
                    check.tokens[block] = position
        original(self, metadata)

    return start_kv_transfers


WORKER = "vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker:OffloadingConnectorWorker"
PATCH = Patch(
    symptom="With `check_states` a state that the OffloadingConnector has loaded counts as never written.",
    cause="The check sees the steps of a worker, and not what is copied beside them.",
    remove_when="vLLM tells a metadata builder what was loaded.",
    hooks=(
        Hook(f"{WORKER}.handle_preemptions", "self kv_connector_metadata", check_stores),
        Hook(f"{WORKER}.start_kv_transfers", "self metadata", note_loads),
    ),
)

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


def follow_transfers(original: Function) -> Function:
    def start_kv_transfers(self: Any, metadata: Any) -> None:
        if StateCheck.all:
            config = self.kv_cache_config
            groups = [config.kv_cache_groups[index] for index in config.prefix_cacheable_group_ids]
            for _, source, _ in self._unsubmitted_store_jobs:
                for check, block, position in states(groups, source):
                    check.stored(block, position)
            for job in metadata.load_jobs.values():
                for check, block, position in states(groups, job.dst_spec):
                    check.tokens[block] = position
        original(self, metadata)

    return start_kv_transfers


PATCH = Patch(
    symptom="With `check_states` a state that the OffloadingConnector has loaded counts as never written.",
    cause="The check sees the steps of a worker, and not what is copied beside them.",
    remove_when="vLLM tells a metadata builder what was loaded.",
    hooks=(
        Hook(
            "vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker:OffloadingConnectorWorker.start_kv_transfers",
            "self metadata",
            follow_transfers,
        ),
    ),
)

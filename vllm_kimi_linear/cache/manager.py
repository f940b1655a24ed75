"""The blocks that states along a prompt are kept in for the prefix cache.

vLLM keeps the state of a recurrent layer where a chunk of a prompt happens to end. Here a chunk leaves states behind
at boundaries inside it, too (`policy.py` says at which): `plan_checkpoints` decides when the scheduler cuts the chunk,
`allocate_new_blocks` takes a block for each, `take_checkpoints` sends positions and blocks to the workers with the
step, the prefill kernel, which passes there anyway, writes the states, and the blocks are published like any other.

Kept states may be evicted as soon as the chunk is done; where blocks are scarce only the last few of a chunk are kept.
"""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from vllm_kimi_linear.cache.metrics import CheckpointCount
from vllm_kimi_linear.cache.policy import (
    StateCheckpoints,
    affordable_columns,
    columns_to_keep,
    kept_boundaries,
    own_blocks,
)
from vllm_kimi_linear.cache.spec import KdaSpec


class KdaManager(MambaManager):
    """Blocks of one group of KDA layers."""

    def __init__(self, kv_cache_spec: KdaSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.kept = kept_boundaries(kv_cache_spec.most_blocks)
        self.groups = kv_cache_spec.groups
        self.planned: dict[str, list[int]] = {}  # columns whose states the chunk being scheduled keeps
        self.filled: dict[str, dict[int, int]] = {}  # column -> block, of the step being scheduled
        self.count: CheckpointCount | None = None  # of the first group, for all
        if self.enable_caching and not isinstance(self.block_pool.metrics_collector, CheckpointCount):
            self.count = CheckpointCount(self.kv_cache_group_id, self.block_pool.metrics_collector)
            self.block_pool.metrics_collector = self.count
        # Tokens up to which a request asks nothing of any group (see `note_steady`).
        self.steady_until: dict[str, int] = {}

    def get_num_blocks_to_allocate(
        self, request_id: str, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        needed: int = super().get_num_blocks_to_allocate(
            request_id, *args, apply_admission_cap=apply_admission_cap, **kwargs
        )
        return needed if apply_admission_cap else needed + len(self.planned.get(request_id, ()))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        first = len(blocks)
        added = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        columns = self.planned.pop(request_id, [])
        for column, block in zip(columns, self.block_pool.get_new_blocks(len(columns)), strict=True):
            # Where a draft's block lay before the chunk, the worker's table, which only grows, goes on to name it.
            assert blocks[column].is_null
            blocks[column] = block
            if column >= first:
                added[column - first] = block
        if columns:
            self.filled[request_id] = {column: blocks[column].block_id for column in columns}
        return added

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(request, num_tokens, *args, **kwargs)
        if self.count is not None:
            fresh = self.req_to_blocks[request.request_id][before : self.num_cached_block.get(request.request_id, 0)]
            self.count.published(sum(block.block_hash is not None for block in fresh))

    def columns_if_steady(self, request_id: str) -> int:
        """The columns of a request that holds its running state and no other, all before it published; else 0."""
        columns = len(self.req_to_blocks[request_id])
        before = self.num_cached_block.get(request_id), self._num_retired_blocks.get(request_id, 0)
        return columns if before == (columns - 1, columns - 1) and not self.num_speculative_blocks else 0

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.steady_until.pop(request_id, None)
        self.planned.pop(request_id, None)
        self.filled.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: KVCacheSpec,
        *_: Any,
        reachable_boundaries: Sequence[int] = (),
        **__: Any,
    ) -> list[bool] | None:
        """Publish what was kept on purpose: also while an answer grows, whose every boundary has a state for a step."""
        assert isinstance(kv_cache_spec, KdaSpec)
        kept = kept_boundaries(kv_cache_spec.most_blocks)
        reused = {position // kv_cache_spec.block_size for position in reachable_boundaries}
        return [block + 1 in kept or block + 1 in reused for block in range(start_block, end_block)]


def kda_managers(coordinator: Any) -> list[KdaManager]:
    """The managers of KDA layers among a coordinator's, looked up once."""
    if (found := vars(coordinator).get("kda_managers")) is None:
        found = [manager for manager in coordinator.single_type_managers if isinstance(manager, KdaManager)]
        coordinator.kda_managers = found
    return found


def plan_checkpoints(managers: Sequence[KdaManager], request: Request, start: int, end: int) -> None:
    """Decide which states the next chunk of a request keeps, from `start` to `end` tokens; none if it is empty.

    Besides those along every prompt: the last before its end, where a request that replays this one goes on, and the
    last before the place where another was seen to leave it.
    """
    manager = managers[0]
    columns: list[int] = []
    if manager.mamba_cache_mode == "align" and start < end:
        reused = {at // manager.block_size for at in (request.num_tokens - 1, request.shared_prefix_boundary)}
        # A plan that left the chunk itself too little would be made anew in each step, and the request wait for ever.
        own = own_blocks(
            request.num_computed_tokens, end, manager.block_size, manager.groups, manager.num_speculative_blocks
        )
        affordable = affordable_columns(manager.block_pool.get_num_free_blocks() - own, manager.groups)
        columns = columns_to_keep(start, end, manager.block_size, manager.kept | reused, affordable)
    if columns or request.request_id in manager.planned:  # left behind where there were too few blocks
        for each in managers:
            each.planned[request.request_id] = columns


def take_checkpoints(managers: Sequence[KdaManager]) -> dict[str, StateCheckpoints]:
    """What the step that was just scheduled keeps, by request; once."""
    found = {}
    for request_id, columns in managers[0].filled.items():
        found[request_id] = StateCheckpoints(
            positions=tuple((column + 1) * managers[0].block_size for column in columns),
            blocks={manager.kv_cache_group_id: tuple(manager.filled[request_id].values()) for manager in managers},
        )
    for manager in managers:
        manager.filled.clear()
        manager.planned.clear()  # of a request that got no blocks: its next chunk is another, or comes from a connector
    return found


def note_steady(managers: Sequence[KdaManager], request_id: str) -> None:
    """Note how far a request can go before any group has a block to take, free or publish for it.

    Each step asks every group of every request, and there are many groups: a sequence that decodes has something to
    ask once in a block. Attention layers, whose blocks are of the same tokens, have nothing else to do, either.
    """
    columns = {manager.columns_if_steady(request_id) for manager in managers}
    if len(columns) == 1:
        managers[0].steady_until[request_id] = columns.pop() * managers[0].block_size

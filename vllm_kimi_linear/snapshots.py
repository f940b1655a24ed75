"""Which states along a prompt are kept for the prefix cache, and the blocks they are kept in.

vLLM keeps the state of a recurrent layer where a chunk of a prompt happens to end. Here a chunk leaves states behind
at boundaries of its own choice inside it: the manager puts a block into the table at each, the prefill kernel, which
passes there anyway, writes the state, and the block is published like any other. Nothing else is asked of the
scheduler or the worker: a column of the block table that holds a block is a state to write.

Snapshots may be evicted as soon as the chunk is done; where blocks are scarce only the last few of a chunk are taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_kimi_linear import memory
from vllm_kimi_linear.snapshot_metrics import SnapshotCount

SHARE = 10  # a request that shares P tokens with an earlier one computes at most P / SHARE of them again
SPARE = 4  # snapshots are taken while as many times the blocks that they fill are free


@cache
def kept_blocks(limit: int) -> frozenset[int]:
    """Boundaries, counted in blocks, whose states are kept of a prompt of up to `limit` blocks.

    Every one at first, then in steps that grow with the position: from no position is the way back to the one
    before it longer than a block or a tenth of the position.
    """
    kept, at = set(), 1
    while at <= limit:
        kept.add(at)
        at = max(at + 1, at * SHARE // (SHARE - 1))
    return frozenset(kept)


@dataclass(frozen=True, kw_only=True)
class KdaSpec(MambaSpec):
    """The state of a KDA layer, kept along a prompt as this file says."""

    most_blocks: int = 0  # of the longest sequence
    groups: int = 1  # of KDA layers
    block_multiple: int = 1  # bytes, of which a block of the pool is a multiple

    @classmethod
    def of(cls, spec: KVCacheSpec, max_model_len: int, plan: memory.Plan) -> "KdaSpec":
        assert isinstance(spec, MambaSpec)
        values: dict[str, Any] = {field.name: getattr(spec, field.name) for field in fields(spec)}
        return cls(
            **values,
            most_blocks=cdiv(max_model_len, spec.block_size),
            groups=plan.kda_groups,
            block_multiple=memory.KERNEL_BLOCK * plan.latent_bytes,
        )

    def get_block_stride_alignment(self) -> int:
        return self.block_multiple


class KdaManager(MambaManager):
    """Blocks of one group of KDA layers."""

    def __init__(self, kv_cache_spec: KdaSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.kept = kept_blocks(kv_cache_spec.most_blocks)
        self.groups = kv_cache_spec.groups
        self.reused: dict[str, tuple[int, ...]] = {}  # boundaries where a request is known to be resumed, in blocks
        self.wanted: dict[str, list[int]] = {}  # columns that the next allocation of a request fills
        self.count: SnapshotCount | None = None  # of the first group, for all
        if self.enable_caching and not isinstance(self.block_pool.metrics_collector, SnapshotCount):
            self.count = SnapshotCount(self.kv_cache_group_id, self.block_pool.metrics_collector)
            self.block_pool.metrics_collector = self.count
        self.settled: dict[str, int] = {}  # tokens up to which a request asks nothing of any group (see `settle`)

    def expect_reuse(self, request_id: str, tokens: Sequence[int]) -> None:
        """Keep the states at the last boundaries up to these positions, too."""
        self.reused[request_id] = tuple(position // self.block_size for position in tokens)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        needed = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )
        if self.mamba_cache_mode != "align" or apply_admission_cap:
            return needed
        first = len(new_computed_blocks) + len(self.req_to_blocks[request_id])
        last = cdiv(num_tokens_main_model, self.block_size) - 1  # the running state's
        wanted = [
            column
            for column in range(max(first, cdiv(total_computed_tokens, self.block_size)), last)
            if column + 1 in self.kept or column + 1 in self.reused.get(request_id, ())
        ]
        # All groups are asked before any takes a block, so that they see the same number and choose the same columns.
        affordable = self.block_pool.get_num_free_blocks() // (SPARE * self.groups)
        wanted = wanted[max(0, len(wanted) - affordable) :]
        self.wanted[request_id] = wanted
        return needed + len(wanted)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        first = len(blocks)
        added = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        columns = self.wanted.pop(request_id, [])
        for column, block in zip(columns, self.block_pool.get_new_blocks(len(columns)), strict=True):
            assert blocks[column].is_null
            blocks[column] = added[column - first] = block
        return added

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(request, num_tokens, *args, **kwargs)
        if self.count is not None:
            fresh = self.req_to_blocks[request.request_id][before : self.num_cached_block.get(request.request_id, 0)]
            self.count.published(sum(block.block_hash is not None for block in fresh))

    def columns_if_settled(self, request_id: str) -> int:
        """The columns of a request that holds its running state and no other, all before it published; else 0."""
        columns = len(self.req_to_blocks[request_id])
        before = self.num_cached_block.get(request_id), self._num_retired_blocks.get(request_id, 0)
        return columns if before == (columns - 1, columns - 1) and not self.num_speculative_blocks else 0

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.settled.pop(request_id, None)
        self.reused.pop(request_id, None)
        self.wanted.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: KVCacheSpec,
        use_eagle: bool,
        retention_interval: int | None = None,
        reachable_boundaries: Sequence[int] = (),
        dcp_world_size: int = 1,
        final_segment_end_block: int | None = None,
    ) -> list[bool] | None:
        """Publish what was kept on purpose: also while an answer grows, whose every boundary has a state for a step."""
        assert isinstance(kv_cache_spec, KdaSpec)
        kept = kept_blocks(kv_cache_spec.most_blocks)
        reused = {position // kv_cache_spec.block_size for position in reachable_boundaries}
        return [block + 1 in kept or block + 1 in reused for block in range(start_block, end_block)]


def settle(managers: Sequence[KdaManager], request_id: str) -> None:
    """Note how far a request can go before any group has a block to take, free or publish for it.

    Each step asks every group of every request, and there are many groups: a sequence that decodes has something to
    ask once in a block. Attention layers, whose blocks are of the same tokens, have nothing else to do, either.
    """
    columns = {manager.columns_if_settled(request_id) for manager in managers}
    if len(columns) == 1:
        managers[0].settled[request_id] = columns.pop() * managers[0].block_size


def register() -> None:
    KVCacheSpecRegistry._ensure_registered()  # else registering ours first would keep vLLM's own from being registered
    KVCacheSpecRegistry.register(KdaSpec, KdaManager, MambaSpec)

"""Which states along a prompt are kept for the prefix cache, and the blocks they are kept in.

vLLM keeps the state of a recurrent layer where a chunk of a prompt happens to end. Here a chunk leaves states behind
at boundaries of its own choice inside it: the manager puts a block into the table at each, the prefill kernel, which
passes there anyway, writes the state, and the block is published like any other. Nothing else is asked of the
scheduler or the worker: a column of the block table that holds a block is a state to write.

Snapshots may be evicted as soon as the chunk is done, and none is taken where blocks are scarce.
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

SHARE = 10  # a request that shares P tokens with an earlier one computes at most P / SHARE of them again
SPARE = 64  # snapshots are taken while as many times their number of blocks is free


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

    @classmethod
    def of(cls, spec: KVCacheSpec, max_model_len: int) -> "KdaSpec":
        assert isinstance(spec, MambaSpec)
        values: dict[str, Any] = {field.name: getattr(spec, field.name) for field in fields(spec)}
        return cls(**values, most_blocks=cdiv(max_model_len, spec.block_size))


class KdaManager(MambaManager):
    """Blocks of one group of KDA layers."""

    def __init__(self, kv_cache_spec: KdaSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.kept = kept_blocks(kv_cache_spec.most_blocks)
        self.reused: dict[str, tuple[int, ...]] = {}  # boundaries where a request is known to be resumed, in blocks
        self.wanted: dict[str, list[int]] = {}  # columns that the next allocation of a request fills

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
        if SPARE * len(wanted) > self.block_pool.get_num_free_blocks():
            wanted = []
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

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
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


def register() -> None:
    KVCacheSpecRegistry._ensure_registered()  # else registering ours first would keep vLLM's own from being registered
    KVCacheSpecRegistry.register(KdaSpec, KdaManager, MambaSpec)

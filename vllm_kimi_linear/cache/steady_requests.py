"""Do not ask the groups of layers about a request that stays within its blocks."""

from typing import Any

from vllm_kimi_linear.cache.manager import kda_managers, note_steady
from vllm_kimi_linear.patches.patch import Function, Hook, Patch

COORDINATOR = "vllm.v1.core.kv_cache_coordinator:HybridKVCacheCoordinator"


def steady_until(coordinator: Any, request_id: str) -> int:
    managers = kda_managers(coordinator)
    return managers[0].steady_until.get(request_id, 0) if managers else 0


def no_blocks_needed(original: Function) -> Function:
    def get_num_blocks_to_allocate(self: Any, request_id: Any, num_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        if num_tokens <= steady_until(self, request_id):
            return 0
        return original(self, request_id, num_tokens, *args, **kwargs)

    return get_num_blocks_to_allocate


def no_new_blocks(original: Function) -> Function:
    def allocate_new_blocks(self: Any, request_id: Any, num_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        if num_tokens <= steady_until(self, request_id):
            return tuple([] for _ in self.single_type_managers)
        return original(self, request_id, num_tokens, *args, **kwargs)

    return allocate_new_blocks


def none_to_remove(original: Function) -> Function:
    def remove_skipped_blocks(
        self: Any, request_id: Any, processed_computed_tokens: Any, *args: Any, **kwargs: Any
    ) -> None:
        if processed_computed_tokens > steady_until(self, request_id):
            original(self, request_id, processed_computed_tokens, *args, **kwargs)

    return remove_skipped_blocks


def none_to_cache(original: Function) -> Function:
    def cache_blocks(self: Any, request: Any, num_computed_tokens: Any) -> Any:
        if num_computed_tokens >= steady_until(self, request.request_id):
            original(self, request, num_computed_tokens)
            if managers := kda_managers(self):
                note_steady(managers, request.request_id)

    return cache_blocks


PATCH = Patch(
    symptom="With 21 groups (48B, one rank) a step of the scheduler takes 5 times as long as with 4: 6 ms for 64 "
    "sequences (`benchmarks/cache_blocks.py`).",
    cause="For every request `KVCacheCoordinator` asks each group's manager four times a step, though the answers "
    "change only when the request enters a new block.",
    remove_when="the coordinator asks once for groups of one kind.",
    speed=True,
    hooks=(
        Hook(f"{COORDINATOR}.get_num_blocks_to_allocate", "self request_id num_tokens ...", no_blocks_needed),
        Hook(f"{COORDINATOR}.allocate_new_blocks", "self request_id num_tokens ...", no_new_blocks),
        Hook(f"{COORDINATOR}.remove_skipped_blocks", "self request_id processed_computed_tokens ...", none_to_remove),
        Hook(f"{COORDINATOR}.cache_blocks", "self request num_computed_tokens", none_to_cache),
    ),
)

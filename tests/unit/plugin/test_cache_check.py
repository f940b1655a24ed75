"""The check of states follows blocks from step to step and stops at the first state of other tokens."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_kimi_linear.cache.check import StateCheck
from vllm_kimi_linear.patches.checked_transfers import check_stores, note_loads


def test_chunks_decodes_and_a_hit():
    check = StateCheck(block=4)
    check.step([[7, 8, 9]], [0], [9], [[(4, 7), (8, 8)]])  # 9 tokens in its last column, 4 and 8 on the way
    check.step([[7, 8, 9]], [9], [1])
    check.step([[7, 8, 9], [7, 8, 5]], [10, 8], [1, 2])  # the second found 8 tokens in the cache


def test_a_sequence_with_one_block():
    check = StateCheck(block=0)
    check.step([[3], [4]], [0, 0], [5, 6])
    check.step([[3], [4]], [5, 6], [1, 1])
    with pytest.raises(RuntimeError, match="after 5 tokens, but the state in its block 4 is that of 7"):
        check.step([[4]], [5], [1])


@pytest.mark.parametrize(
    ("row", "context", "found"),
    [
        ([7, 8, 9], 8, "is that of 3 tokens"),
        ([0, 8, 9], 4, "was never written"),
        ([6, 8, 9], 4, "was never written"),
        ([7, 8, 9], 11, "is that of 10 tokens"),
    ],
    ids=["taken by another", "not kept", "never written", "a token ahead"],
)
def test_other_tokens_are_found(row: list[int], context: int, found: str):
    check = StateCheck(block=4)
    check.step([[0, 8, 9]], [0], [10], [[(8, 8)]])
    check.step([[8]], [0], [3])
    with pytest.raises(
        RuntimeError, match=f"after {context} tokens, but the state in its block {row[(context - 1) // 4]} {found};"
    ):
        check.step([row], [context], [1])


def transfer(*blocks: int, first: int, group: int = 1) -> Any:
    """Of so many blocks of one of two groups, the first at a column."""
    sizes, columns = [0, 0], [0, 0]
    sizes[group], columns[group] = len(blocks), first
    return SimpleNamespace(block_ids=np.array(blocks), group_sizes=sizes, block_indices=columns)


def worker(*stores: Any) -> Any:
    groups = [SimpleNamespace(layer_names=["mla.0"]), SimpleNamespace(layer_names=["kda.0"])]
    config = SimpleNamespace(kv_cache_groups=groups, prefix_cacheable_group_ids=(0, 1))
    jobs = [(number, store, None) for number, store in enumerate(stores)]
    return SimpleNamespace(kv_cache_config=config, _unsubmitted_store_jobs=jobs)


def test_a_state_that_was_loaded():
    check, other = StateCheck(block=4, layers=["kda.0"]), StateCheck(block=4, layers=["kda.1"])
    loads = {
        0: SimpleNamespace(dst_spec=transfer(5, first=1)),
        1: SimpleNamespace(dst_spec=transfer(6, 7, first=0, group=0)),
    }
    note_loads(lambda *args: None)(worker(), SimpleNamespace(load_jobs=loads))
    assert (check.tokens, other.tokens) == ({5: 8}, {})
    check.step([[0, 5, 9]], [8], [3])


def test_a_state_that_is_stored():
    check = StateCheck(block=4, layers=["kda.0"])
    check.step([[7, 8, 9]], [0], [9], [[(4, 7), (8, 8)]])
    store = check_stores(lambda *args: None)
    nothing = SimpleNamespace(store_jobs={}, jobs_to_flush=None)
    store(worker(transfer(8, first=1), transfer(3, 4, first=0, group=0)), nothing)
    wrong = "offloaded as that after 12 tokens, but the state in its block 8 is that of 8"
    with pytest.raises(RuntimeError, match=wrong):
        store(worker(transfer(8, first=2)), nothing)
    job = SimpleNamespace(src_spec=transfer(8, first=2))
    store(worker(), SimpleNamespace(store_jobs={1: job}, jobs_to_flush={2}))  # later
    with pytest.raises(RuntimeError, match=wrong):
        store(worker(), SimpleNamespace(store_jobs={1: job}, jobs_to_flush={1}))

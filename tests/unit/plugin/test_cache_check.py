"""The check of states follows blocks from step to step and stops at the first state of other tokens."""

import pytest

from vllm_kimi_linear.cache.check import StateCheck


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

"""Which states are kept along a prompt."""

from itertools import pairwise
from math import ceil

import pytest

from vllm_kimi_linear.cache.policy import affordable_columns, columns_to_keep, kept_boundaries, own_blocks

MILLION = 1 << 20


@pytest.mark.parametrize("block", [128, 256, 1920])
def test_the_way_back_is_short_from_everywhere(block: int):
    kept = sorted(kept_boundaries(ceil(MILLION / block)))
    assert kept[0] == 1
    for before, after in pairwise(kept):
        position = after * block - 1  # the last that falls back to `before`
        assert position - before * block < max(block, position / 10 + 1)


def test_few_are_kept():
    """For a document of 4K, 100K and a million tokens, in blocks of 256."""
    counts = [len(kept_boundaries(tokens // 256)) for tokens in (4096, 100 * 1024, MILLION)]
    assert counts == [16, 49, 71]


def test_a_longer_prompt_keeps_what_a_shorter_one_keeps():
    assert kept_boundaries(100) == {at for at in kept_boundaries(5000) if at <= 100}


@pytest.mark.parametrize(
    ("start", "end", "affordable", "columns"),
    [
        (0, 1024, 9, [0, 1, 2]),  # the state at the end lies in the running column
        (0, 1025, 9, [0, 1, 2, 3]),
        (256, 1280, 9, [1, 2, 3]),
        (256, 512, 9, []),
        (300, 512, 9, []),  # a block larger than a step
        (0, 256 * 14, 9, [1, 3, 5, 6, 7, 8, 9, 10, 12]),  # 12 is not kept along a prompt, 13 is
        (0, 256 * 14, 2, [10, 12]),
        (0, 256 * 14, 0, []),
    ],
)
def test_a_chunk_keeps_the_boundaries_inside_it(start: int, end: int, affordable: int, columns: list[int]):
    kept = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13} if end < 3000 else {2, 4, 6, 7, 8, 9, 10, 11, 13}
    assert columns_to_keep(start, end, 256, kept, affordable) == columns


def test_kept_states_leave_most_of_the_free_blocks():
    assert [affordable_columns(free, 21) for free in (-9, 0, 83, 84, 1000)] == [0, 0, 0, 1, 11]


def test_what_a_chunk_takes_itself():
    """Blocks of 16: latents of 40 tokens or of the last 8, two states of each of three groups, and a spare."""
    assert own_blocks(0, 40, 16, groups=3) == 3 + 6 + 1
    assert own_blocks(32, 40, 16, groups=3, drafts=2) == 1 + 12 + 1

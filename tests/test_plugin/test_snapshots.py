"""Which states are kept along a prompt."""

from itertools import pairwise
from math import ceil

import pytest

from vllm_kimi_linear.snapshots import kept_blocks

MILLION = 1 << 20


@pytest.mark.parametrize("block", [128, 256, 1920])
def test_the_way_back_is_short_from_everywhere(block: int):
    kept = sorted(kept_blocks(ceil(MILLION / block)))
    assert kept[0] == 1
    for before, after in pairwise(kept):
        position = after * block - 1  # the last that falls back to `before`
        assert position - before * block < max(block, position / 10 + 1)


def test_few_are_kept():
    """For a document of 4K, 100K and a million tokens, in blocks of 256."""
    counts = [len(kept_blocks(tokens // 256)) for tokens in (4096, 100 * 1024, MILLION)]
    assert counts == [16, 49, 71]


def test_a_longer_prompt_keeps_what_a_shorter_one_keeps():
    assert kept_blocks(100) == {at for at in kept_blocks(5000) if at <= 100}

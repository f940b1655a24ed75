"""What the benchmarks of the kernels try, and their floors."""

import pytest

from bench import expert_tiles


def test_tiles_worth_trying_fit_a_hopper():
    shape = expert_tiles.Shape(experts=256, width=1024, hidden=2304, chosen=8)
    for tokens in expert_tiles.TOKENS:
        tiles = list(expert_tiles.candidates(shape, tokens))
        assert 10 < len(tiles) < 50
        assert all(
            (t["BLOCK_SIZE_M"] + t["BLOCK_SIZE_N"]) * t["BLOCK_SIZE_K"] * 2 * t["num_stages"] < 1 << 18 for t in tiles
        )
    assert expert_tiles.floor(shape, 1, 4.8e12) == pytest.approx(8 * 3 * 1024 * 2304 * 2 / 4.8e6)

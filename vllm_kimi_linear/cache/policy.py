"""Which states along a prompt are kept for the prefix cache, decided without vLLM.

A chunk of a prompt passes block boundaries; at each the prefill kernel can store the state as well. A boundary is
counted in blocks: boundary b of a request lies behind its first b blocks, and its state belongs to column b - 1.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

SHARE = 10  # a request that shares P tokens with an earlier one computes at most P / SHARE of them again
SPARE = 4  # states are kept while as many times the blocks that they fill are free


@dataclass(frozen=True)
class StateCheckpoints:
    """States of one request to keep in one step: after positions[i] of its tokens, in blocks[group][i]."""

    positions: tuple[int, ...]  # tokens from the request's start, ascending, each inside the step's chunk
    blocks: dict[int, tuple[int, ...]]  # KV cache group of KDA layers -> blocks of the pool


@cache
def kept_boundaries(limit: int) -> frozenset[int]:
    """Boundaries whose states are kept of a prompt of up to `limit` blocks.

    Every one at first, then in steps that grow with the position: behind each boundary the one before it is at most
    a block or a tenth of the position away.
    """
    kept, at = set(), 1
    while at <= limit:
        kept.add(at)
        at = max(at + 1, at * SHARE // (SHARE - 1))
    return frozenset(kept)


def columns_to_keep(start: int, end: int, block: int, kept: Collection[int], affordable: int) -> list[int]:
    """Columns whose states a chunk keeps of the boundaries that it passes, ascending.

    Args:
        start, end: tokens of the request before the chunk and behind it. The state at the end is not among them:
            it lies in the running column.
        block: tokens between two boundaries.
        kept: boundaries wanted.
        affordable: columns at most; the last ones are taken.
    """
    inside = range(-(-start // block), -(-end // block) - 1)
    wanted = [column for column in inside if column + 1 in kept]
    return wanted[max(0, len(wanted) - affordable) :]


def affordable_columns(free_blocks: int, groups: int) -> int:
    """Columns that a chunk may keep if it leaves so many free: each takes a block of every group of KDA layers."""
    return max(0, free_blocks) // (SPARE * groups)


def own_blocks(held: int, end: int, block: int, groups: int, drafts: int = 0) -> int:
    """Blocks at most that a chunk takes which ends at `end` tokens, of a request that holds the blocks of `held`.

    Latents; and of each group of KDA layers the state that it goes on from, the running one, and one for each draft.
    """
    return -(-end // block) - held // block + 1 + groups * (2 + drafts)

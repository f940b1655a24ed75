"""A check for those who change how states are kept: a state that is read at a position was written at that position.

`--additional-config '{"check_states": true}'` turns it on. It follows one group of KDA layers through the steps of a
worker and ends the engine at the first state that holds other tokens than the request that goes on from it, be it a
request's own or one found in the prefix cache, or than the place under which it is offloaded. It costs a copy of the
block table each step.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar
from weakref import WeakSet


class StateCheck:
    """`block` is the number of tokens between two columns of the block table, or 0 if it has one column."""

    all: ClassVar["WeakSet[StateCheck]"] = WeakSet()  # of this worker

    def __init__(self, block: int, layers: Iterable[str] = ()) -> None:
        """layers: the names of those whose states it follows."""
        self.block, self.layers = block, frozenset(layers)
        self.tokens: dict[int, int] = {}  # block -> tokens that its state holds
        StateCheck.all.add(self)

    def step(
        self,
        table: Sequence[Sequence[int]],
        contexts: Sequence[int],
        lengths: Sequence[int],
        kept: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> None:
        """Request i goes on from contexts[i] tokens with lengths[i] more; raises RuntimeError if its state does not.

        kept[i]: (tokens, block) of the states that it leaves behind inside this step.
        """
        for request, (row, context, length) in enumerate(zip(table, contexts, lengths, strict=False)):
            if context and length:
                source = row[self._column(context)]
                self._expect(source, context, f"request {request} of this step continues after {context} tokens")
        for row, context, length in zip(table, contexts, lengths, strict=False):
            end = context + length
            if length:
                self.tokens[row[self._column(end)]] = end
        self.tokens.update((block, position) for states in kept for position, block in states)

    def stored(self, block: int, position: int) -> None:
        """Raises RuntimeError if the state that is offloaded as that after `position` tokens is another."""
        self._expect(block, position, f"a state is offloaded as that after {position} tokens")

    def _expect(self, block: int, tokens: int, use: str) -> None:
        if (held := self.tokens.get(block)) != tokens:
            found = "was never written" if held is None else f"is that of {held} tokens"
            raise RuntimeError(
                f"check_states: {use}, but the state in its block {block} {found}; the prefix cache or the scheduler "
                "is wrong"
            )

    def _column(self, tokens: int) -> int:
        return (tokens - 1) // self.block if self.block else 0

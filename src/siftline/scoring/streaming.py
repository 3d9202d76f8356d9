"""What an engine gives that takes new draws while others are under way."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from siftline.scoring.engines import Failed, Generation, Sampling
from siftline.scoring.recorder import REFUSED

Ask = tuple[Any, Sequence[int], int]
"""One draw to make: what its maker calls it, the prompt's token ids, the seed."""
Pull = Callable[[int, bool], list[Ask]]
"""Takes free slots and whether nothing of the engine's is under way; gives at most so many draws.
Nothing to do while nothing is under way ends the stream."""


@runtime_checkable
class Streaming(Protocol):
    """An engine that takes new draws while others are under way."""

    @property
    def slots(self) -> int:
        """Draws that it works on at a time."""
        ...

    def stream(self, pull: Pull, sampling: Sampling) -> Iterator[tuple[Any, "Generation | Failed"]]:
        """Yields each draw that `pull` gave as it ends, with its name.

        Raises:
            ValueError: if a draw is refused before it begins; those under way are dropped.
        """
        ...


def fitting(asked: list[Ask], max_length: int) -> tuple[list[Ask], list[tuple[Any, Failed]]]:
    """The draws whose prompts leave room for a token, and the others as refused."""
    fits = [ask for ask in asked if 0 < len(ask[1]) < max_length]
    others = [ask for ask in asked if not 0 < len(ask[1]) < max_length]
    return fits, [(name, Failed(REFUSED)) for name, _, _ in others]

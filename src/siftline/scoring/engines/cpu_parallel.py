"""Forwards side by side on a CPU, each in a thread of its own.

A pass that all cores share stops at every operation until the slowest of them is done, and on small
matrices they wait for each other longer than they work. Independent passes do not wait at all: on
two cores 512 tokens a pass and a thread each took half the time of 2,048 tokens and two threads
(docs/log.md). Where there are as many passes as cores each runs in one thread, so its bytes don't
depend on how many cores there are.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")

CHANGING_ROTARY = ("dynamic", "longrope")
"""Kinds of rotary positions whose module is changed by the length of what passes through it."""


def side_by_side(run: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """Runs independent passes, the threads that torch has in this one shared out among them.

    Args:
        run: One pass; called from several threads at a time.
        parts: Their inputs; longer ones are best put first.

    Returns:
        One result a part, in their order.
    """
    threads = torch.get_num_threads()
    lanes = min(threads, len(parts))
    if lanes < 2:
        return [run(part) for part in parts]

    def start() -> None:
        torch.get_num_threads()  # a thread's first call takes the number that was set last
        torch.set_num_threads(threads // lanes)

    with ThreadPoolExecutor(lanes, "forward", initializer=start) as pool:
        everyone = Barrier(lanes + 1)
        for _ in range(lanes):
            pool.submit(everyone.wait)
        everyone.wait()
        torch.set_num_threads(threads)  # for threads of others that begin later
        return list(pool.map(run, parts))


def can_share(model: Any) -> bool:
    """Whether several threads may run a model at once: no pass changes it.

    Args:
        model: A transformers model.
    """
    kinds = [str(getattr(module, "rope_type", "")) for module in model.modules()]
    return not any(changing in kind for kind in kinds for changing in CHANGING_ROTARY)

"""Which torch device a specification means.

Forwards side by side on a CPU, each in a thread of its own.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch


def torch_device(name: str) -> torch.device:
    """The device of a name: "auto" takes CUDA if there is a device, else the CPU.

    Raises:
        ValueError: if CUDA is asked for and torch sees none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r} but torch sees no CUDA device: use cpu or auto")
    return torch.device(name)


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

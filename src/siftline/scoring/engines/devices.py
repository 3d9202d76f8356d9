"""Which torch device a specification means."""

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

"""Which files of a model folder may be loaded: weights that hold numbers and no code."""

from pathlib import Path

PICKLED = ("pytorch_model", "adapter_model", "model", "consolidated")
"""Beginnings of the names of weights that are pickles; `training_args.bin` is none."""


def refuse_pickles(folder: Path) -> None:
    """Refuses a model, or an adapter, whose weights are there as pickles alone.

    Raises:
        ValueError: naming the file and what to do.
    """
    pickled = [p for end in ("*.bin", "*.pt", "*.pth") for p in sorted(folder.glob(end))]
    weights = [p for p in pickled if p.name.startswith(PICKLED)]
    if weights and not any(folder.glob("*.safetensors")):
        what = "an adapter" if weights[0].name.startswith("adapter") else "a model"
        raise ValueError(
            f"{str(weights[0])!r} is {what} as a pickle, which may run code when it is loaded: "
            "convert to safetensors (load it where you trust it, save_pretrained it again)"
        )

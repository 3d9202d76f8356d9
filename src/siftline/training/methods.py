"""Models to train, by method: all weights, LoRA, LoRA over 4 bits, or any adapter of peft."""

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siftline.kernels.draws import hash64
from siftline.training.sft import LORA_SCALE, FineTune


def load_model(base: Path, config: FineTune, seed: int) -> Any:
    """The model to train: float32 weights, or a frozen base in its own type on a GPU.

    Raises:
        ValueError: if the method asks for a library that is not there, or for an adapter that peft
            does not know, refuses, or can't merge.
    """
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    frozen = config.method != "full" and torch.cuda.is_available()
    options: dict[str, Any] = {"dtype": "auto" if frozen else torch.float32}
    if config.method == "qlora":
        options = _four_bits()
    model: Any = AutoModelForCausalLM.from_pretrained(str(base), local_files_only=True, **options)
    if config.method == "full":
        return model
    from peft import get_peft_model, prepare_model_for_kbit_training

    if config.method == "qlora":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=config.gradient_checkpointing
        )
    set_seed(hash64(seed, "finetune adapter") % 2**32)
    adapter = adapter_config(config)
    try:
        return get_peft_model(model, adapter)
    except (ValueError, TypeError) as error:
        raise ValueError(f"peft refuses {adapter.peft_type.value}: {error}") from error


def _four_bits() -> dict[str, Any]:
    """NF4 with double quantisation, as QLoRA (arXiv 2305.14314) has it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("method qlora needs bitsandbytes, which is not installed: use lora")
    import torch
    from transformers import BitsAndBytesConfig

    half = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {
        "dtype": half,
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=half,
        ),
        "device_map": {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
    }


def adapter_config(config: FineTune) -> Any:
    """The peft configuration of a method.

    Raises:
        ValueError: for a type or an option that peft does not know, or an adapter that can't be
            merged into the weights.
    """
    from peft import LoraConfig

    if config.method != "peft":
        return LoraConfig(
            r=config.lora_rank,
            lora_alpha=LORA_SCALE * config.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    return _any_config(config.peft)


def _any_config(options: Mapping[str, Any]) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    kinds = {kind.value: kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    mergeable = {
        name
        for name, kind in kinds.items()
        if hasattr(PEFT_TYPE_TO_TUNER_MAPPING[kind], "merge_and_unload")
    }
    name = str(options["type"]).upper()
    if name not in kinds:
        raise ValueError(f"peft type {name!r} is unknown: choose {', '.join(sorted(mergeable))}")
    if name not in mergeable:
        raise ValueError(
            f"peft type {name!r} can't be merged into the weights, so no engine could run the "
            f"result: choose {', '.join(sorted(mergeable))}"
        )
    rest = {key: value for key, value in options.items() if key != "type"}
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[kinds[name]](task_type="CAUSAL_LM", **rest)
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft type {name}: {error}") from error


def _shifts_base(model: Any) -> bool:
    """Whether an adapter was started by moving a part of the base's weights into it (PiSSA, …).

    Such an adapter is of no use beside the base itself.
    """
    start = getattr(model.active_peft_config, "init_lora_weights", True)
    return isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva")


def _merged(model: Any, adapter: Path, base: Path) -> Any:
    """The full weights with an adapter merged into them, in float32.

    Args:
        model: The peft model.
        adapter: Where it was saved.
        base: Directory of the model it started from: read again where the model's own copy is
            rounded or sharded, since merging in half precision loses the adapter's last digits.

    Raises:
        ValueError: if this kind of adapter can't be merged into this base.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = model.get_base_model().dtype == torch.float32 and not _sharded_or_quantised(model)
    try:
        if plain or _shifts_base(model):
            return model.merge_and_unload()
        whole = AutoModelForCausalLM.from_pretrained(
            str(base), local_files_only=True, dtype=torch.float32
        )
        return PeftModel.from_pretrained(whole, str(adapter)).merge_and_unload()
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"the adapter can't be merged into the weights: {error}") from error


def _sharded_or_quantised(model: Any) -> bool:
    from torch.distributed.tensor import DTensor

    quantised = getattr(model, "is_loaded_in_4bit", False)
    return quantised or any(isinstance(part, DTensor) for part in model.parameters())


def export(trainer: Any, tokenizer: Any, base: Path, out: Path) -> None:
    """Writes what was trained: weights, in the type the base is stored in, and the tokenizer.

    Args:
        trainer: After training; all processes call this, one of them writes.
        tokenizer: With the chat template in force.
        base: Directory of the model it started from.
        out: The model directory.
    """
    from peft import PeftModel
    from transformers import AutoConfig

    model = trainer.accelerator.unwrap_model(trainer.model)
    # Sharded weights are gathered by all processes together; then one of them writes.
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if not trainer.is_world_process_zero():
        return
    if isinstance(model, PeftModel):
        model.save_pretrained(str(out / "adapter"), state_dict=state)
        alone = _shifts_base(model)
        model, state = _merged(model, out / "adapter", base), None
        if alone:
            shutil.rmtree(out / "adapter")
    stored = AutoConfig.from_pretrained(str(base), local_files_only=True)
    model.config.use_cache = stored.use_cache  # training switches it off, generation wants it
    dtype = stored.dtype or model.dtype
    if state is None:
        model.to(dtype).save_pretrained(out)
    else:
        state = {name: part.to(dtype) for name, part in state.items()}
        model.config.dtype = dtype
        model.save_pretrained(out, state_dict=state)
    tokenizer.save_pretrained(out)

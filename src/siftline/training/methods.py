"""Models to train, by method: all weights, LoRA, LoRA over 4 bits, or an adapter of peft.

Of peft's adapters those are accepted whose whole mechanism is a forward pass and weights that can
be merged, and AdaLoRA, whose ranks are allocated here at every step. Those that want more of the
training (another loss, task ids, statistics of the data, a callback) are refused: they would train,
and not be what they are called.
"""

import copy
import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siftline.kernels.draws import hash64
from siftline.training.sft import FineTune, allocates_ranks

ADAPTERS = frozenset(
    {
        "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD",
        "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS",
        "OFT", "OSF", "PEANUT", "PSOFT", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA",
        "UNILORA", "VBLORA", "VERA", "WAVEFT",
    }
)  # fmt: skip
"""Types of peft that do here what they are called; a test trains each."""
_UNMERGED = "can't be merged into the weights, so no engine could run the result"
REFUSED = {
    "POLY": "mixes skills by the task of a row, and rows here have no task",
    "XLORA": "gates adapters that were trained before, and its gates can't be merged",
    "PVERA": "learns a distribution of weights, of which merging would keep the mean alone",
    "TRAINABLE_TOKENS": "trains added tokens alone, and no token is added here",
    "LILY": _UNMERGED,
    "SHADOW": _UNMERGED,
}
"""Why a type is refused; of all others it is that they can't be merged, or are not tried."""
STARTS = ("gaussian", "orthogonal", "olora", "pissa", "mica")
"""Starts of a LoRA that need its weights alone; `pissa_niter_N` and true are others."""
UNSERVED = {
    "use_asa": "needs a callback of its own",
    "loftq_config": "starts from a base in 4 bits: method qlora has one",
    "eva_config": "starts from activations of the data, which are not gathered here",
    "corda_config": "starts from covariances of the data, which are not gathered here",
    "lora_ga_config": "starts from gradients of the data, which are not gathered here",
    "velora_config": "compresses activations of a backward pass, which is not tried here",
    "kasa_config": "adds to the loss, and the loss here is the objective alone",
    "monteclora_config": "adds to the loss, and the loss here is the objective alone",
    "arrow_config": "routes between adapters that were trained before",
    "alora_invocation_tokens": "switches itself on inside a text, so it can't be merged",
    "use_qalora": "needs a GPTQ base",
    "use_bdlora": "is for sharded serving of adapters, and the result here is merged",
    "layer_replication": "changes the layers of the model, and the result here has the base's",
    "megatron_config": "needs Megatron",
    "trainable_token_indices": "trains added tokens, and no token is added here",
    "inference_mode": "trains nothing",
    "task_type": "is causal language modelling here",
}
"""Options of adapters that ask for what is not done here, and why."""


def load_model(base: Path, config: FineTune, seed: int, steps: int | None = None) -> Any:
    """The model to train: float32 weights, or a frozen base in its own type on a GPU.

    Args:
        base: Directory of the model.
        config: How to train.
        seed: Of the adapter's first weights.
        steps: Optimizer steps of the run, which AdaLoRA's schedule is laid over.

    Raises:
        ValueError: if the method asks for a library that is not there, or for an adapter that is
            not accepted, that peft refuses, that has nothing to train or can't be merged.
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
    adapter = adapter_config(config, steps)
    try:
        model = get_peft_model(model, adapter)
    except (ValueError, TypeError) as error:
        raise ValueError(f"peft refuses {adapter.peft_type.value}: {error}") from error
    if config.method == "peft":
        _check_trains(model, adapter.peft_type.value)
    return model


def _check_trains(model: Any, name: str) -> None:
    """Refuses, before training, an adapter without weights or one that this base can't take in.

    Raises:
        ValueError: naming the type.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not any(part.requires_grad for part in model.parameters()):
        raise ValueError(f"peft type {name} has nothing to train in this model: give its modules")
    one_each = {type(part): part for part in model.modules() if isinstance(part, BaseTunerLayer)}
    for layer in one_each.values():
        try:
            copy.deepcopy(layer).merge()
        except (AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"peft type {name} can't be merged into this model: {error}"
            ) from error


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


def adapter_config(config: FineTune, steps: int | None = None) -> Any:
    """The peft configuration of a method.

    Args:
        config: How to train.
        steps: Optimizer steps of the run, for AdaLoRA.

    Raises:
        ValueError: for a type or an option that is unknown or not accepted.
    """
    from peft import LoraConfig

    if config.method != "peft":
        return LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    return _any_config(config.peft, steps)


def _any_config(options: Mapping[str, Any], steps: int | None) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {kind.value: kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    name = str(options["type"]).upper()
    choose = f"choose {', '.join(sorted(ADAPTERS & set(kinds)))}"
    if name not in kinds:
        raise ValueError(f"peft type {name!r} is unknown: {choose}")
    if name not in ADAPTERS:
        raise ValueError(f"peft type {name!r} {REFUSED.get(name, _UNMERGED)}: {choose}")
    rest = {key: value for key, value in options.items() if key != "type"}
    for key, why in UNSERVED.items():
        if rest.get(key):
            raise ValueError(f"peft option {key} of {name} {why}: leave it out")
    if name == "LORA":
        _check_start(rest.get("init_lora_weights", True))
    if allocates_ranks(options):
        rest = _rank_schedule(rest, steps)
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[kinds[name]](task_type="CAUSAL_LM", **rest)
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft type {name}: {error}") from error


def _check_start(start: Any) -> None:
    """Refuses starts of a LoRA that the data or a quantised base would have to give."""
    if isinstance(start, str) and start not in STARTS and not start.startswith("pissa_niter_"):
        raise ValueError(
            f"init_lora_weights is {start!r}, which needs what is not made here (statistics of the "
            f"data, or a base in 4 bits): choose true, {', '.join(STARTS)} or pissa_niter_N"
        )


def _rank_schedule(options: Mapping[str, Any], steps: int | None) -> dict[str, Any]:
    """AdaLoRA's options over the steps of this run; they are counted by the plan, not the user.

    Raises:
        ValueError: if another number of steps is given, or no rank could fall.
    """
    total = steps if steps is not None else options.get("total_step")
    if options.get("total_step", total) != total:
        raise ValueError(
            f"total_step is {options['total_step']}, and the run has {total} steps: leave it out"
        )
    first, last = options.get("init_r", 12), options.get("target_r", 8)
    if not 1 <= last < first:
        raise ValueError(
            f"init_r is {first} and target_r {last}: AdaLoRA's ranks fall from one to the other, "
            "so target_r must be 1 or more and below init_r"
        )
    return {**options, "total_step": total}


def _shifts_base(model: Any) -> bool:
    """Whether an adapter was started by moving a part of the base's weights into it (PiSSA, …).

    Such an adapter is of no use beside the base itself.
    """
    start = getattr(model.active_peft_config, "init_lora_weights", True)
    return isinstance(start, str) and start not in ("gaussian", "orthogonal", "mica")


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

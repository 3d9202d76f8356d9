"""How to fine-tune: the options of a run, and what they are to TRL.

SFTTrainer would tokenise, mask, cut, shuffle and drop rows by itself. Here it does none of it: one
item of its dataset is the number of one planned forward pass (see `schedule`), dealt in sequence.

Models to train, by method: all weights, LoRA, LoRA over 4 bits, or any adapter of peft.
"""

import copy
import importlib.util
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from siftline.kernels.draws import hash64
from siftline.rows.published import LISTED, confirm_outputs
from siftline.rows.verified import AlteredError, UnhashedError
from siftline.training.schedule import Phase

logger = logging.getLogger(__name__)

Method = Literal["full", "lora", "qlora", "peft"]
Kind = Literal["sft", "sft_kl", "dft", "asft", "poft"]
Report = Literal["none", "tensorboard", "wandb"]


LORA_SCALE = 2
"""Alpha of a LoRA adapter over its rank, as in TRL's defaults, 32 and 16."""


@dataclass(frozen=True)
class FineTune:
    """How to fine-tune. Defaults are TRL 1.16's unless another source is named.

    Attributes:
        method: `full`; `lora` on all linear layers but the head; `qlora`, the same over a base in
            4 bits; or `peft`, an adapter of that library that can be merged.
        peft: For `peft`: its `type` (LOHA, IA3, ADALORA, …) and the options of that type's
            configuration; one that would not do here what it is called is refused.
        objective: The loss; see the table of objectives in docs/training.md.
        kl_weight: Weight of the divergence from the start in `sft_kl` and `asft`; 0.05 as in ASFT's
            published runs.
        mask_rate: Share of response tokens that masked thought swaps in the input, reached after
            two thirds of the steps; 0 is off, 0.4 the paper's for mathematics.
        prompt_weight: Loss weight of prompt tokens; those of the response have 1.
        source_balance: 0 leaves sources their share of the loss, 1 gives all the same.
        weight_column: Column with the loss weight of each row, above 0, read where the data has it;
            rows without one weigh 1, null weighs all alike. `siftline dedup --rehydrate` writes
            sift_weight: a row of weight 3 moves the loss as three such rows would.
        reference_column: Column with the mean log-probability of each row's response under the
            reference models, for `poft`.
        lora_rank: Rank; 16 and alpha 32 as in the QLoRA family of recipes (alpha = 2 x rank).
        learning_rate: Peak rate; LoRA wants about ten times that of full tuning.
        epochs: Passes over the rows, used when no budget of loss tokens is given.
        phases: Sources in the order of the run; empty mixes all from the start.
            With phases `epochs` counts the loss tokens of the run, not how often a row is seen.
        loss_tokens: Budget of loss tokens; needs `steps`, so that arms of a comparison share both.
        steps: Optimizer steps that share the budget.
        batch_rows: Rows of one optimizer step over all devices (mean, when `steps` is not given).
        accumulation: Forward passes an optimizer step is cut into on each device.
        max_length: Longest row in tokens; longer ones are skipped as `too_long`.
        warmup_ratio: Share of steps with rising rate; 0.03 as in Alpaca and Tulu.
        schedule: What follows the warm-up.
        weight_decay: Weight decay of AdamW.
        gradient_checkpointing: Trades a second forward pass for memory.
        bf16: bfloat16 autocast; None takes it on a CUDA device that has it.
        packing: Rows of a forward pass end to end, without padding, where the model allows it.
        save_steps: Steps between checkpoints.
        eval_steps: Steps between looks at the dev rows, where there are any.
        keep: The weights of the last step, or those with the best dev loss.
        report_to: Who else is told of every step; TensorBoard's files are in runs/.
    """

    method: Method = "full"
    peft: dict[str, Any] = field(default_factory=dict)
    objective: Kind = "sft"
    kl_weight: float = 0.05
    mask_rate: float = 0.0
    prompt_weight: float = 0.0
    source_balance: float = 0.0
    weight_column: str | None = "sift_weight"
    reference_column: str = "mean_ref_logprob"
    lora_rank: int = 16
    learning_rate: float = 2e-5
    epochs: float = 3.0
    phases: tuple[Phase, ...] = ()
    loss_tokens: int | None = None
    steps: int | None = None
    batch_rows: int = 16
    accumulation: int = 1
    max_length: int = 2048
    warmup_ratio: float = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    gradient_checkpointing: bool = False
    bf16: bool | None = None
    packing: bool = True
    save_steps: int = 500
    eval_steps: int = 100
    keep: Literal["last", "best"] = "last"
    report_to: Report = "none"

    def __post_init__(self) -> None:
        choices = {
            "method": get_args(Method),
            "objective": get_args(Kind),
            "schedule": ("cosine", "linear", "constant"),
            "keep": ("last", "best"),
            "report_to": get_args(Report),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {', '.join(known)}")
        counts = "lora_rank batch_rows accumulation save_steps eval_steps"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("mask_rate", "prompt_weight", "source_balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie in [0, 1]")
        self._check_rates()
        self._check_budget()
        if self.objective == "poft" and self.prompt_weight:
            raise ValueError(f"poft scores responses alone: prompt_weight is {self.prompt_weight}")
        if (self.method == "peft") != ("type" in self.peft):
            raise ValueError(
                f"method is {self.method!r}, peft is {self.peft}: method peft, and it alone, "
                "takes peft: {type: LOHA, …}"
            )
        if allocates_ranks(self.peft) and self.keep == "best":
            raise ValueError(
                "keep is 'best' with AdaLoRA, whose early steps have ranks it will not keep: take "
                "keep: last"
            )

    def _check_rates(self) -> None:
        if not self.epochs > 0 or not self.learning_rate > 0 or self.max_length < 2:
            raise ValueError(
                f"epochs {self.epochs} and learning_rate {self.learning_rate} must be above 0, "
                f"max_length {self.max_length} at least 2"
            )
        if not 0 <= self.warmup_ratio < 1 or self.weight_decay < 0:
            raise ValueError(
                f"warmup_ratio {self.warmup_ratio} must lie in [0, 1), "
                f"weight_decay {self.weight_decay} must not be negative"
            )
        if not 0 <= self.kl_weight < float("inf"):
            raise ValueError(f"kl_weight is {self.kl_weight}: it must be finite, 0 or above")

    def _check_budget(self) -> None:
        if (self.loss_tokens is None) != (self.steps is None):
            raise ValueError(
                f"loss_tokens is {self.loss_tokens}, steps is {self.steps}: an equal budget "
                "fixes both, epochs needs neither"
            )
        if self.steps is not None and (self.steps < 1 or (self.loss_tokens or 0) < 1):
            raise ValueError(f"loss_tokens {self.loss_tokens} and steps {self.steps}: 1 or more")


def allocates_ranks(peft: Mapping[str, Any]) -> bool:
    """Whether an adapter's ranks fall while it trains: then only a whole run means anything."""
    return str(peft.get("type", "")).upper() == "ADALORA"


def sft_arguments(config: FineTune, checkpoints: Path, seed: int, dev: bool = False) -> Any:
    """The SFTConfig of a run: no preparation, no shuffling, no network.

    Raises:
        ValueError: if the library of `report_to` is not installed, or one process sees several
            GPUs, which TRL refuses once the model is loaded.
    """
    import torch
    from trl import SFTConfig

    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise ValueError(
            f"report_to is {config.report_to!r}: install {config.report_to}, or set it to none"
        )

    cuda = torch.cuda.is_available()
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"{torch.cuda.device_count()} GPUs are visible to one process: set "
            "CUDA_VISIBLE_DEVICES=0 to train on one, or start it with accelerate launch or torchrun"
        )
    bf16 = cuda and torch.cuda.is_bf16_supported() if config.bf16 is None else config.bf16
    return SFTConfig(
        output_dir=str(checkpoints),
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup"
        if config.schedule == "constant"
        else config.schedule,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        num_train_epochs=1,  # the schedule holds all epochs
        per_device_train_batch_size=1,  # one item is one planned forward pass
        gradient_accumulation_steps=config.accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=bf16,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
        use_cpu=not cuda,
        # peft can't load an AdaLoRA back into training, so a killed run starts again.
        save_strategy="no" if allocates_ranks(config.peft) else "steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if dev else "no",
        eval_steps=config.eval_steps,
        metric_for_best_model="loss" if dev else None,
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a run that diverges must show it
        report_to="wandb" if config.report_to == "wandb" else "none",
        push_to_hub=False,
        disable_tqdm=True,
        seed=hash64(seed, "finetune") % 2**32,
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is what the trainer wrote.

    The list of its hashes is its last file, so one that was cut off has none. A damaged one is told
    and passed over; on one CPU an earlier one leads to the same weights.
    """
    there = [path.parent for path in folder.glob(f"checkpoint-*/{LISTED}")]
    for path in sorted(there, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            confirm_outputs(path, "passed over, training goes on from an earlier checkpoint")
        except (AlteredError, UnhashedError) as error:
            logger.warning("%s", error)
        else:
            return path
    return None


def check_sharding(config: FineTune) -> None:
    """Refuses sharded loading where the frozen start would be copied from empty weights.

    With accelerate's RAM-efficient loading only the first process reads the weights; the others
    hold empty ones until the model is sharded, and the start that `sft_kl` and `asft` hold on to
    is copied before that.

    Raises:
        ValueError: if both are asked for.
    """

    def on(name: str) -> bool:
        return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")

    if config.method != "full" or config.objective not in ("sft_kl", "asft"):
        return
    if on("ACCELERATE_USE_FSDP") and on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            f"objective {config.objective} keeps a copy of the start, which FSDP's "
            "cpu_ram_efficient_loading leaves empty on all processes but the first: set "
            "fsdp_cpu_ram_efficient_loading to false, or take method lora"
        )


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
            lora_alpha=LORA_SCALE * config.lora_rank,
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

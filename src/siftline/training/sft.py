"""The side of fine-tuning that talks to TRL and peft: its configuration, model and trainer.

SFTTrainer would tokenise, mask, cut, shuffle and drop rows by itself. Here it does none of it: one
item of its dataset is the number of one planned forward pass (see `schedule`), dealt in sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from siftline.kernels.draws import hash64
from siftline.training.schedule import Schedule


@dataclass(frozen=True)
class FineTune:
    """How to fine-tune. Defaults are TRL 1.16's unless another source is named.

    Attributes:
        method: `full`, or `lora` on all linear layers but the head.
        lora_rank: Rank; 16 and alpha 32 as in the QLoRA family of recipes (alpha = 2 x rank).
        lora_alpha: Scale of the adapter, times 1 / rank.
        learning_rate: Peak rate; LoRA wants about ten times that of full tuning.
        epochs: Passes over the rows, used when no budget of loss tokens is given.
        loss_tokens: Budget of loss tokens; needs `steps`, so that arms of a comparison share both.
        steps: Optimizer steps that share the budget.
        batch_rows: Rows of one optimizer step over all devices (mean, when `steps` is not given).
        accumulation: Forward passes an optimizer step is cut into on each device.
        max_length: Longest row in tokens; longer ones are skipped as `too_long`.
        warmup_ratio: Share of steps with rising rate; 0.03 as in Alpaca and Tulu.
        schedule: What follows the warm-up.
        weight_decay: AdamW's.
        gradient_checkpointing: Trades a second forward pass for memory.
        bf16: bfloat16 autocast; None takes it on a CUDA device that has it.
        save_steps: Steps between checkpoints.
    """

    method: Literal["full", "lora"] = "full"
    lora_rank: int = 16
    lora_alpha: int = 32
    learning_rate: float = 2e-5
    epochs: float = 3.0
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
    save_steps: int = 500

    def __post_init__(self) -> None:
        if self.method not in ("full", "lora"):
            raise ValueError(f"method is {self.method!r}: choose full or lora")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(f"schedule is {self.schedule!r}: choose cosine, linear or constant")
        for name in ("lora_rank", "lora_alpha", "batch_rows", "accumulation", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
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
        if (self.loss_tokens is None) != (self.steps is None):
            raise ValueError(
                f"loss_tokens is {self.loss_tokens}, steps is {self.steps}: an equal budget "
                "fixes both, epochs needs neither"
            )
        if self.steps is not None and (self.steps < 1 or (self.loss_tokens or 0) < 1):
            raise ValueError(f"loss_tokens {self.loss_tokens} and steps {self.steps}: 1 or more")


def sft_arguments(config: FineTune, checkpoints: Path, seed: int) -> Any:
    """The SFTConfig of a run: no preparation, no shuffling, no reports, no network."""
    import torch
    from trl import SFTConfig

    cuda = torch.cuda.is_available()
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
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a run that diverges must show it
        report_to="none",
        push_to_hub=False,
        disable_tqdm=True,
        seed=hash64(seed, "finetune") % 2**32,
    )


def load_model(base: Path, config: FineTune, seed: int) -> Any:
    """The model to train: float32 weights, or a frozen base in its own type under LoRA on a GPU."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    frozen = config.method == "lora" and torch.cuda.is_available()
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(base), local_files_only=True, dtype="auto" if frozen else torch.float32
    )
    if config.method == "lora":
        from peft import LoraConfig, get_peft_model

        set_seed(hash64(seed, "finetune adapter") % 2**32)
        model = get_peft_model(
            model,
            LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    return model


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; the trainer writes trainer_state.json as its last file."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def make_trainer(
    model: Any,
    tokenizer: Any,
    arguments: Any,
    schedule: Schedule,
    progress: Callable[[int, int], None],
) -> Any:
    """An SFTTrainer that walks through `schedule` as it is."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collate = DataCollatorForLanguageModeling(pad_token_id=pad)

    def collate_pass(items: list[dict[str, int]]) -> dict[str, Any]:
        (item,) = items
        return dict(collate(schedule[item["number"]]))

    class Report(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress(state.global_step, state.max_steps)

    trainer = SFTTrainer(
        model=model,
        args=arguments,
        # SFTTrainer insists on a datasets.Dataset: it gets the numbers of the passes.
        train_dataset=Dataset.from_dict({"number": range(len(schedule))}),
        processing_class=tokenizer,
        data_collator=collate_pass,
        callbacks=[Report()],
    )
    trainer.remove_callback(PrinterCallback)  # it prints every loss to stdout
    return trainer

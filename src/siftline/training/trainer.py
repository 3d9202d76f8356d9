"""TRL's SFTTrainer on planned passes, with objectives and means that are exact.

A loss is a sum over the tokens (or rows) of a whole optimizer step divided by their weight in that
step, which the plan knows beforehand. So devices and accumulation take part in a sum and nothing
else, and two processes give the update of one with twice the rows.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import SFTTrainer

from siftline.rows.published import confirm_outputs, record_outputs
from siftline.scoring.fingerprint import RETRAIN
from siftline.training.material import Passes
from siftline.training.objectives import (
    ANCHORED,
    Lesson,
    Objective,
    States,
    TokenScores,
    read_tokens,
    token_scores,
)
from siftline.training.packing import Row, check_head, choose, length_groups, packed, padded


class PlannedTrainer(SFTTrainer):
    """An SFTTrainer that walks through `Passes` as they are."""

    loss_is_scaled_for_ga: Any = True
    objective: Objective

    def __init__(
        self,
        *,
        model: Any,
        arguments: Any,
        tokenizer: Any,
        passes: Passes,
        objective: Objective,
        packing: bool,
        dev: Passes | None,
        keep_best: bool,
        progress: Callable[[int, int], None],
    ) -> None:
        """Takes the model over; `finetune` says what the arguments are."""
        self.passes, self.objective, self.dev, self.keep_best = passes, objective, dev, keep_best
        self._denominators = [torch.tensor(of) for of in passes.denominators()]
        self._sums: dict[str, float | torch.Tensor] = {}
        self._rate = 0.0
        pad = tokenizer.pad_token_id
        self._pad = tokenizer.eos_token_id if pad is None else pad
        super().__init__(
            model=model,
            args=arguments,
            # SFTTrainer insists on a datasets.Dataset: it gets the numbers of the passes.
            train_dataset=_numbers(len(passes)),
            eval_dataset=None if dev is None else _numbers(len(dev)),
            processing_class=tokenizer,
            data_collator=self._collate,
            callbacks=[_Report(progress), _LastEvaluation(dev is not None), _Listed()],
        )
        self.remove_callback(PrinterCallback)  # it prints every loss to stdout
        self.allocating = getattr(model, "base_model", None)
        if not hasattr(self.allocating, "rankallocator"):
            self.allocating = None
        elif self.is_fsdp_enabled:
            raise ValueError("AdaLoRA under FSDP: its importance needs whole gradients; use DDP")
        else:
            self.add_callback(_Allocation(self.allocating))
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        read_tokens(inner)
        check_head(model)
        self.unpacked_because = choose(model) if packing else "packing is off"
        self.reference = None
        if objective.kind in ANCHORED and not hasattr(model, "disable_adapter"):
            self.reference = self._frozen(inner)

    def _frozen(self, model: Any) -> Any:
        """A second copy of the start, which no optimizer sees."""
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        if frozen.is_gradient_checkpointing:
            frozen.gradient_checkpointing_disable()
        return self.accelerator.prepare_model(frozen, evaluation_mode=True)

    # ---- what a pass holds -------------------------------------------------------------------

    def _collate(self, items: list[dict[str, int]]) -> dict[str, Any]:
        (item,) = items
        return self.batch(self.passes, item["number"])

    def batch(self, passes: Passes, number: int) -> dict[str, Any]:
        """Tensors of one pass: the model's arguments, in one or several groups, and the lesson."""
        positions = passes.schedule.passes[number]
        made = [passes.row(number, int(position)) for position in positions]
        lengths = [len(tokens) for tokens, _, _ in made]
        plain = self.unpacked_because is None
        groups = [list(range(len(made)))] if plain else length_groups(lengths)
        order = [i for group in groups for i in group]
        rows = [Row(torch.from_numpy(made[i][0]), torch.from_numpy(made[i][1])) for i in order]
        arguments, start = [], 0
        for group in groups:
            part = rows[start : start + len(group)]
            arguments.append(packed(part) if plain else padded(part, self._pad))
            start += len(group)
        sizes = torch.tensor([len(made[i][2]) for i in order])
        weights = torch.cat([torch.from_numpy(made[i][2]) for i in order]).float()
        seen = positions[order]
        lesson = {
            "weights": weights,
            "rows": torch.repeat_interleave(torch.arange(len(order)), sizes),
            "row_weights": torch.from_numpy(passes.row_weights[seen]).float(),
        }
        if passes.references is not None:
            lesson["references"] = torch.from_numpy(passes.references[seen]).float()
        return {"number": number, "groups": arguments, "lesson": lesson}

    # ---- the loss ----------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """This device's share of the step's loss, as DDP, which averages, wants it."""
        number, lesson = inputs["number"], Lesson(**inputs["lesson"])
        told = [self._score(model, arguments) for arguments in inputs["groups"]]
        scores = _joined([scores for scores, _ in told])
        balances = [balance for _, balance in told if balance is not None]
        outcome = self.objective(scores, lesson)
        by_token, by_row = (float(of[self.passes.step_of(number)]) for of in self._denominators)
        of_loss = by_row if self.objective.by_row else by_token
        for name, value in outcome.sums.items():
            share = value / (of_loss if name == "mean_weight" else by_token)
            self._sums[name] = self._sums.get(name, 0.0) + share
        self._rate = self.passes.rate(number)
        loss = outcome.loss / of_loss * self.accelerator.num_processes
        if balances:  # a mean of passes, as the mixture's own recipe has it
            parts = len(balances) * self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * torch.stack(balances).sum() / parts
        if self.allocating is not None:
            penalty = orthogonality(self.allocating)
            loss = loss + penalty / self.current_gradient_accumulation_steps
        return loss

    def _score(self, model: Any, arguments: dict[str, Any]) -> tuple[TokenScores, Any]:
        """Scores of one group's labelled tokens, and the load-balancing loss of a mixture."""
        anchor = None
        if self.objective.kind in ANCHORED:
            with torch.no_grad(), self._as_started(model) as start:
                anchor = start(**arguments, reader=lambda states: states)

        def read(states: States) -> tuple[TokenScores, Any]:
            return token_scores(states, anchor), states.balance

        scored: tuple[TokenScores, Any] = model(**arguments, reader=read)
        return scored

    @contextmanager
    def _as_started(self, model: Any) -> Iterator[Any]:
        """The frozen start: the second copy, or the model with its adapter switched off."""
        if self.reference is not None:
            yield self.reference
            return
        bare = self.accelerator.unwrap_model(model)
        bare.eval()  # no dropout
        with bare.disable_adapter():
            yield model
        bare.train()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the objective reports to the line of a step; stops where it diverged."""
        if "loss" in logs:
            names = sorted(self._sums)
            if names:
                sums = torch.stack([torch.as_tensor(self._sums[name]) for name in names])
                sums = self.accelerator.reduce(sums.to(self.accelerator.device), "sum")
                logs.update(dict(zip(names, sums.tolist(), strict=True)))
                self._sums.clear()
            if self.passes.corruption is not None:
                logs["mask_rate"] = self._rate
            self._check_finite(logs)
        super().log(logs, start_time)

    def _check_finite(self, logs: dict[str, float]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                kept = "no checkpoint had been written"
                folders = sorted(
                    path.name for path in Path(str(self.args.output_dir)).glob("checkpoint-*")
                )
                if folders:
                    kept = f"kept in {self.args.output_dir}: {', '.join(folders)}"
                raise ValueError(
                    f"{name} is {logs[name]} at step {self.state.global_step}: lower learning_rate "
                    f"({self.args.learning_rate}) or raise warmup_ratio; {kept}"
                )

    # ---- the dev set -------------------------------------------------------------------------

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Cross-entropy per response token of the dev rows; passes are dealt to the devices."""
        assert self.dev is not None
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        model = self.model_wrapped
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        model.eval()
        for turn in range(-(-len(self.dev) // world)):
            number = turn * world + rank
            # Every device makes as many passes: sharded weights are gathered by all together.
            inputs = self._prepare_inputs(self.batch(self.dev, min(number, len(self.dev) - 1)))
            with torch.no_grad(), self.compute_loss_context_manager():
                for arguments in inputs["groups"]:
                    scores = model(**arguments, reader=token_scores)
                    if number < len(self.dev):
                        total -= scores.logprobs.double().sum()
        model.train()
        total = self.accelerator.reduce(total, "sum")
        metrics = {f"{metric_key_prefix}_loss": float(total) / self.dev.denominators()[0].sum()}
        self.log(metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better = bool(super()._determine_best_metric(metrics=metrics, trial=trial))
        if better and self.keep_best:
            self.control.should_save = True
        return better

    def keep(self) -> int:
        """Takes the weights with the best dev loss where they are asked for; says their step."""
        best = self.state.best_global_step
        if not self.keep_best or best is None or best == self.state.global_step:
            return self.state.global_step
        confirm_outputs(Path(str(self.state.best_model_checkpoint)), RETRAIN)
        self._load_best_model()
        return best

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: nothing reads it."""
        return 0


def _numbers(count: int) -> Dataset:
    return Dataset.from_dict({"number": range(count)})


def _joined(scores: list[TokenScores]) -> TokenScores:
    kl = [each.kl for each in scores if each.kl is not None]
    logprobs = torch.cat([each.logprobs for each in scores])
    return TokenScores(logprobs, torch.cat(kl) if kl else None)


def orthogonality(tuner: Any) -> torch.Tensor:
    """AdaLoRA's penalty: how far its singular vectors are from orthonormal (arXiv 2303.10512).

    The mean over all P and Q of the Frobenius norm of P'P - 1, times `orth_reg_weight`. peft adds
    it to a loss that a model computes itself, which is not the loss here.
    """
    norms = []
    for name, part in tuner.model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            gram = part @ part.T if ".lora_A." in name else part.T @ part
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
    weight = tuner.peft_config[tuner.trainable_adapter_name].orth_reg_weight
    return weight * torch.stack(norms).mean()


class _Allocation(TrainerCallback):
    """Lets AdaLoRA's ranks fall: after every step of the optimizer, while gradients are there."""

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tuner.update_and_allocate(state.global_step + 1)


class _Report(TrainerCallback):
    """Passes progress on."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(state.global_step, state.max_steps)


class _Listed(TrainerCallback):
    """Lists the hashes of a checkpoint's files once all processes have written theirs."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            record_outputs(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class _LastEvaluation(TrainerCallback):
    """The last step is evaluated too, whatever `eval_steps` is."""

    def __init__(self, there: bool) -> None:
        self.there = there

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.there and state.global_step == state.max_steps:
            control.should_evaluate = True

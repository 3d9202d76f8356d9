"""A model that is drawn from within limits, and everything its draws were worth."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from siftline.scoring.recorder import Recorder
from siftline.stages.rejection_sampling.drawing import Draw, run_campaign
from siftline.stages.rejection_sampling.options import JUDGE, RejectionSampling
from siftline.stages.rejection_sampling.preview import Preview, preview
from siftline.stages.rejection_sampling.problems import (
    FAULTS,
    JUDGED,
    UNJUDGED,
    Grader,
    Judgement,
    Problem,
    fault_of,
    judge_draw,
)
from siftline.stages.rejection_sampling.trials import Campaign, Outcome, Rule, words_of

SILENCE = 32
"""Draws without any verdict after which a verifier is taken to be out of order."""


@dataclass
class Limits:
    """Draws and tokens that are left; None is no limit.

    A draw's tokens are known when it has ended, so before it each counts as its longest.
    """

    draws: int | None
    tokens: int | None
    longest: int

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self.draws is not None or self.tokens is not None

    def left(self) -> int | None:
        """Draws that can be made whatever their length."""
        if self.tokens is None:
            return self.draws
        fits = self.tokens // self.longest
        return fits if self.draws is None else min(self.draws, fits)

    def charge(self, draws: int, tokens: int) -> None:
        """Takes off what was drawn."""
        if self.draws is not None:
            self.draws -= draws
        if self.tokens is not None:
            self.tokens -= tokens


@dataclass
class Sampler:
    """Draws answers to problems from the copies of one model, and judges them.

    Attributes:
        options: How to draw, to verify, and how much.
        problems: By prompt id.
        recorders: One for each copy of the model.
        emit: Takes lines of progress.
        grade: Verifies draws.
        limits: What may still be drawn; samplers that share a budget share it.
        lines: Judgements of all draws that were read, by prompt and draw.
        seconds_per_token: Speed of the pilot; None where none of it was drawn now.
        heard: Whether the verifier said something of a draw.
        errors: How it failed on the draws before that.
    """

    options: RejectionSampling
    problems: Mapping[str, Problem]
    recorders: Sequence[Recorder]
    emit: Callable[[str], None]
    grade: Grader
    limits: Limits
    lines: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    seconds_per_token: float | None = None
    heard: bool = False
    errors: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        options: RejectionSampling,
        problems: Mapping[str, Problem],
        recorders: Sequence[Recorder],
        emit: Callable[[str], None],
        grade: Grader,
        limits: Limits | None = None,
    ) -> "Sampler":
        """A sampler with the options' limits, or with those it shares with another."""
        own = Limits(options.max_draws, options.max_tokens, options.max_new_tokens)
        if options.verifier == JUDGE:  # one copy: the judge may be the same model, and not twice
            recorders = recorders[:1]
        return cls(options, problems, recorders, emit, grade, limits or own)

    def pilot(self) -> None:
        """Makes the pilot's draws of every prompt.

        Raises:
            ValueError: if the budget ends before the pilot does.
            RuntimeError: if the verifier gave no verdict on any draw.
        """
        n = self.options.k if self.options.target == "vanilla" else self.options.pilot
        n = min(n, self.options.pilot)
        needed, left = n * len(self.problems), self.limits.draws
        if left is not None and left < needed:
            raise ValueError(
                f"max_draws leaves {left:,} draws and the pilot of {len(self.problems):,} prompts "
                f"takes {needed:,}: raise it, or set a smaller pilot"
            )
        campaign = Campaign.of(dict.fromkeys(self.problems, n), Rule(cap=n, pilot=n))
        began = time.monotonic()
        computed, tokens = self.run(campaign)
        if computed == n * len(self.problems) and tokens:
            self.seconds_per_token = (time.monotonic() - began) / tokens
        self._give_up_unless_heard()
        starved = campaign.open()
        if starved:
            raise ValueError(
                f"max_tokens ended the pilot with {len(starved)} of {len(self.problems)} prompts "
                "unmeasured: raise it, or set a smaller pilot; what was drawn is kept"
            )

    def trials(self, targets: Mapping[str, int], rule: Rule) -> Campaign:
        """Trials that have read what was drawn so far."""
        campaign = Campaign.of(targets, rule)
        for (prompt, draw), line in sorted(self.lines.items()):
            if prompt in targets:
                campaign.feed(prompt, draw, _outcome(line, rule))
        return campaign

    def preview(self, campaign: Campaign) -> Preview:
        """What finishing the trials will cost."""
        drawn: dict[str, tuple[int, int]] = {}
        for (prompt, _), line in self.lines.items():
            made, tokens = drawn.get(prompt, (0, 0))
            drawn[prompt] = made + 1, tokens + line["n_tokens"]
        said = preview(campaign.trials, drawn, self.seconds_per_token)
        return replace(said, limit=self.limits.left())

    def finish(self, campaign: Campaign) -> None:
        """Runs trials until each has stopped, for its own reasons or for want of budget."""
        self.run(campaign)
        campaign.stop()

    def run(self, campaign: Campaign) -> tuple[int, int]:
        """Runs a campaign within the limits, and charges them.

        Without limits, idle slots are filled with draws that may turn out not to be needed. Under
        limits only draws that are sure to be read are made, of the trials that `Campaign.within`
        has room for: so the limits hold, and what is spent does not depend on which draw ends
        first. A stream gains room as draws end; an engine that runs batches takes a turn for it.

        Returns:
            Draws and tokens that a model made now.

        Raises:
            RuntimeError: as `run_campaign`, or if a campaign neither draws nor ends.
        """
        computed = tokens = 0
        homes = {prompt: problem.home for prompt, problem in self.problems.items()}

        def judge(batch: Sequence[Draw]) -> list[Outcome]:
            lines = self._judge(batch)
            read = {(line["prompt_id"], line["draw"]): line for line in lines}
            new = [line for key, line in read.items() if key not in self.lines]
            self.lines |= read
            self._listen(new)
            self.limits.charge(len(new), sum(line["n_tokens"] for line in new))
            return [_outcome(line, campaign.trials[line["prompt_id"]].rule) for line in lines]

        while waiting := campaign.open():
            limits = self.limits
            if limits.limited and not campaign.within(limits.draws, limits.tokens, limits.longest):
                break
            made = run_campaign(
                self.recorders, campaign, homes, self.options.sampling, self.options.seed, judge,
                guess=not limits.limited, stream=self.options.verifier != JUDGE,
            )  # fmt: skip
            computed, tokens = computed + made.computed, tokens + made.tokens
            self._say(made.lost)
            if not (made.computed or made.found) and campaign.open() == waiting:
                raise RuntimeError(
                    f"{len(waiting)} prompts are open, first {waiting[0]}, and no draw was made "
                    "for them: a fault of the campaign; what was drawn is kept"
                )
        return computed, tokens

    def _listen(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Stops where the verifier failed on many draws, and never said anything.

        Otherwise all prompts would be given up as unsolved, for no fault of theirs.
        """
        asked = [line["error"] for line in lines if line["reason"] not in FAULTS]
        self.heard |= None in asked
        self.errors += [error for error in asked if error is not None and not self.heard]
        if len(self.errors) >= SILENCE:
            self._give_up_unless_heard()

    def _give_up_unless_heard(self) -> None:
        if self.errors and not self.heard:
            raise RuntimeError(
                f"verifier {self.options.verifier!r} gave no verdict on any of {len(self.errors)} "
                f"draws, first: {self.errors[0]}: mend it and run again, what was drawn is kept"
            )

    def _judge(self, batch: Sequence[Draw]) -> list[dict[str, Any]]:
        """Lines of `JUDGED`; what has a fault is not put to the verifier."""
        problems = [self.problems[prompt] for prompt, _, _ in batch]
        screen = self.options.screen
        faults = [
            fault_of(problem, text, screen=screen)
            for problem, (_, _, text) in zip(problems, batch, strict=True)
        ]
        sound = [i for i, fault in enumerate(faults) if fault is None]
        verdicts = dict(
            zip(sound, self.grade([(problems[i], batch[i][2]) for i in sound]), strict=True)
        )
        return [
            judge_draw(problems[i], draw, text, faults[i], verdicts.get(i, UNJUDGED))
            for i, (_, draw, text) in enumerate(batch)
        ]

    def judged(self, campaign: Campaign | None = None) -> Judgement:
        """The draws that a campaign's trials read, or all where none is given; and the trials."""
        trials = campaign.trials if campaign else {}
        lines = [
            line
            for (prompt, draw), line in sorted(self.lines.items())
            if campaign is None or (prompt in trials and draw < trials[prompt].used)
        ]
        for i, line in enumerate(lines):
            same = trials[line["prompt_id"]].same if campaign else {}
            if line["draw"] in same:
                lines[i] = {**line, "dedup_key": same[line["draw"]]}
        stand = [(p, t.target, t.status) for p, t in trials.items()]
        columns = {"prompt_id": pl.String, "target": pl.Int64, "status": pl.String}
        targets = pl.DataFrame(stand, schema=columns, orient="row")
        return Judgement(pl.DataFrame(lines, schema=JUDGED), targets)

    def _say(self, lost: Mapping[str, str]) -> None:
        right = sum(line["correct"] for line in self.lines.values())
        refused = f", {len(lost)} prompts refused" if lost else ""
        new = sum(line["n_tokens"] for line in self.lines.values())
        self.emit(
            f"rejection_sampling: {len(self.lines):,} draws so far, {right:,} correct, {new:,} new "
            f"tokens{refused}"
        )


def _outcome(line: Mapping[str, Any], rule: Rule) -> Outcome:
    compared = line["correct"] and rule.max_similarity < 1
    words = words_of(line["text"]) if compared else frozenset()
    return Outcome(line["correct"], line["dedup_key"], words)

"""What rejection sampling will cost, from the pilot, before anything more is drawn.

A trial that misses r answers draws until the r-th success of a Bernoulli process whose rate p has
the posterior Beta of the pilot, or until it is given up. How long it goes on is followed draw by
draw over the answers found, exactly, and integrated over p by quantiles of the Beta; trials are
independent given the prior, so their sums are close to normal. What the interval leaves out: the
prior's own error, and that an answer found before is less likely to be new.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from siftline.stages.rejection_sampling.trials import Rule, Trial

NODES = 64
"""Quantiles of a posterior that stand for it."""
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A number to be expected, with a 95 % interval."""

    mean: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Estimate":
        """All three times a positive factor."""
        return Estimate(self.mean * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Preview:
    """The cost of what is left after the pilot.

    Attributes:
        prompts: Prompts whose trials are open.
        draws: Draws to make.
        tokens: Tokens to generate.
        seconds: Time it takes at the pilot's speed; None where no draw of the pilot was made now.
        met: Prompts, of all, whose target will be met.
        limit: Draws that may still be made; the other numbers don't know of it. None is no limit.
        answers: Verified answers that are aimed at, of all prompts.
        room: About how many of them the recipe's budget can keep; None where nothing spends it.
    """

    prompts: int
    draws: Estimate
    tokens: Estimate
    seconds: Estimate | None
    met: Estimate
    limit: int | None = None
    answers: int = 0
    room: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{_said(self.draws)} draws", f"{_said(self.tokens)} new tokens"]
        if self.seconds is not None:
            parts.append(f"{_said(self.seconds)} s")
        said = f"{self.prompts:,} prompts open: {', '.join(parts)}; {_said(self.met)} targets met"
        if self.limit is not None and self.limit < self.draws.high:
            said = f"{said}; but {self.limit:,} draws may be made"
        if self.room is not None and self.room < self.answers:
            said = (
                f"{said}; but the budget keeps about {self.room:,} of {self.answers:,} answers: "
                "raise it, or lower k"
            )
        return said


def preview(
    trials: Mapping[str, Trial],
    tokens: Mapping[str, tuple[int, int]],
    seconds_per_token: float | None = None,
) -> Preview:
    """Expected cost of finishing trials.

    Memory: a few numbers for each distinct state of a trial, and `NODES` times the answers missing;
    time: that times the cap, for each distinct state.

    Args:
        trials: Trials after the pilot, by prompt id.
        tokens: Draws made and tokens they took, by prompt id.
        seconds_per_token: Speed of the pilot.
    """
    total, variance, words, met, met_variance = 0.0, 0.0, 0.0, 0.0, 0.0
    states = {p: _state(t) for p, t in trials.items() if t.status == "open"}
    one_of = {state: prompt for prompt, state in states.items()}
    known = {state: _cost(trials[prompt].rule, *state) for state, prompt in one_of.items()}
    for prompt, state in states.items():
        mean, spread, share = known[state]
        drawn, took = tokens[prompt]
        total, variance = total + mean, variance + spread
        words += mean * took / drawn
        met, met_variance = met + share, met_variance + share * (1 - share)
    met += sum(t.status == "met" for t in trials.values())
    draws = _interval(total, variance)
    used = draws.scaled(words / total) if total else draws
    seconds = None if seconds_per_token is None else used.scaled(seconds_per_token)
    aimed = sum(trial.target for trial in trials.values())
    return Preview(len(states), draws, used, seconds, _interval(met, met_variance), answers=aimed)


_State = tuple[int, int, int]


def _state(trial: Trial) -> _State:
    """What the future of a trial depends on."""
    return trial.used, trial.distinct, trial.target


def _cost(rule: Rule, used: int, distinct: int, target: int) -> tuple[float, float, float]:
    """Mean and variance of the draws still to come, and the chance that the target is met."""
    from scipy.stats import beta

    missing = max(target - distinct, 0)
    a, b = rule.prior.a + distinct, rule.prior.b + used - distinct
    p = beta.ppf((np.arange(NODES) + 0.5) / NODES, a, b)
    # Chance of a trial that still draws to have found so many answers; the last row has them all.
    going = np.zeros((missing + 1, NODES))
    going[0] = 1.0
    first, second = np.zeros(NODES), np.zeros(NODES)
    # Draws at which a trial with so many answers is given up.
    ends = np.array([rule.given_up(found, target) for found in range(distinct, target)])
    for n in range(used, rule.cap):
        drawing = going[: missing if n >= rule.pilot else None].sum(axis=0)
        if not drawing.any():
            break
        first += drawing
        second += (2 * (n - used) + 1) * drawing
        step = going[:-1] * p
        going[:-1] -= step
        going[1:] += step
        going[:-1][ends <= n + 1] = 0.0
    mean = float(first.mean())
    return mean, max(float(second.mean()) - mean**2, 0.0), float(going[-1].mean())


def _interval(mean: float, variance: float) -> Estimate:
    half = _Z * variance**0.5
    return Estimate(mean, max(mean - half, 0.0), mean + half)


def _said(estimate: Estimate) -> str:
    return f"{estimate.mean:,.0f} ({estimate.low:,.0f} to {estimate.high:,.0f})"

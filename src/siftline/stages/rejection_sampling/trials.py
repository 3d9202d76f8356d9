"""How many draws a prompt deserves: the posterior of its pass rate, and a stopping rule.

A prompt's trial reads its draws in draw order and stops at a draw that depends on those before it
and on nothing else: the target is met, the cap is reached, or the cost to be expected passes the
cap, whether it was solved before or not. So whichever draws come back first, from whichever device,
the same ones count; what was drawn beyond the stop is waste.

The pass rate of a prompt has a Beta prior that is fitted to the pilot of all prompts (Griffin &
Krishnamoorthy's moment estimator of the beta-binomial), weak enough that a few draws of its own
outvote it. Missing r answers at posterior mean p costs r / p draws (the negative binomial's mean at
a known p; the mean over the posterior has no finite value before the second success).
"""

from dataclasses import dataclass, field
from math import ceil
from typing import Literal

import numpy as np

WEAK, STRONG = 0.5, 2.0
"""Bounds of a prior's weight in draws."""
Status = Literal["open", "met", "capped", "unsolved", "out_of_budget", "failed"]
"""How a trial stands: target met; stopped at the cap with some answers; given up because its
expected cost passes the cap, or at the cap without an answer; stopped for want of draws or tokens;
stopped because the engine refused the prompt."""


@dataclass(frozen=True)
class Beta:
    """A Beta distribution of a pass rate.

    Attributes:
        a: Successes it stands for.
        b: Failures it stands for.
    """

    a: float = 1.0
    b: float = 1.0

    def mean(self, successes: int = 0, trials: int = 0) -> float:
        """Mean after that many more draws."""
        return (self.a + successes) / (self.a + self.b + trials)


def fit_prior(successes: np.ndarray, trials: np.ndarray) -> Beta:
    """The prior of a prompt's pass rate from the pilot of all prompts.

    Args:
        successes: Verified draws of each prompt, shape (n,).
        trials: Draws of each prompt, at least one, shape (n,).

    Returns:
        A Beta with the pool's pass rate (Laplace's rule keeps it inside (0, 1)) as mean and a
        weight of `WEAK` to `STRONG` draws: the more alike the prompts, the heavier.
    """
    k, n = np.asarray(successes, dtype=np.int64), np.asarray(trials, dtype=np.int64)
    mean = (int(k.sum()) + 1) / (int(n.sum()) + 2)
    weight = STRONG
    if len(k) > 1 and n.max() > 1:
        each = float(n.mean())
        # E[(k/n - m)^2] = m (1 - m) (1/n + (1 - 1/n) rho), and rho = 1 / (1 + weight).
        spread = float(np.mean((k / n - k.sum() / n.sum()) ** 2)) / (mean * (1 - mean))
        rho = (spread - 1 / each) / (1 - 1 / each)
        weight = 1 / rho - 1 if rho > 0 else STRONG
    weight = min(max(weight, WEAK), STRONG)
    return Beta(mean * weight, (1 - mean) * weight)


@dataclass(frozen=True)
class Outcome:
    """What a draw was worth.

    Attributes:
        correct: Whether it is whole and verified.
        key: What makes two answers the same.
        words: Its distinct words, where near copies are to count as the same.
    """

    correct: bool
    key: str
    words: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Rule:
    """When a trial stops.

    Attributes:
        cap: Most draws, the pilot's included.
        pilot: Draws that are made whatever they show.
        prior: Of the pass rate.
        unsolved_cap: Most draws without one success; None leaves it to the expected cost, by which
            a prompt with a success goes in any case.
        max_similarity: Jaccard similarity of words from which a verified answer counts as a copy
            of an earlier one; 1 compares keys alone.
    """

    cap: int
    pilot: int = 0
    prior: Beta = field(default_factory=Beta)
    unsolved_cap: int | None = None
    max_similarity: float = 1.0

    def given_up(self, distinct: int, target: int) -> int:
        """Draws at which a trial with so many answers is given up; the cap where it is not before.

        More draws without an answer never help, and at an equal number of draws nor do fewer
        answers, but for the first where `unsolved_cap` is set.
        """
        least, missing = max(self.pilot, 1), target - distinct
        if missing <= 0:
            return self.cap
        if self.unsolved_cap is not None and not distinct:
            return min(max(least, self.unsolved_cap), self.cap)
        # used + missing / mean > cap, solved for used; rounding may put it one off.
        weight, found = self.prior.a + self.prior.b, self.prior.a + distinct
        used = max(int((self.cap * found - missing * weight) / (found + missing)) - 1, least)
        while used < self.cap and used + missing / self.prior.mean(distinct, used) <= self.cap:
            used += 1
        return used


class Trial:
    """One prompt's draws, read in draw order.

    Attributes:
        used: Draws read so far; none after the stop is ever read.
        correct: Of them verified.
        status: "open" until it stops.
        allowed: Draws that there is room for under a limit, at most the rule's cap.
    """

    def __init__(self, target: int, rule: Rule) -> None:
        self.target, self.rule = target, rule
        self.used = self.correct = 0
        self.allowed = rule.cap
        self.status: Status = "open"
        self.same: dict[int, str] = {}
        self._kept: dict[str, frozenset[str]] = {}
        self._early: dict[int, Outcome | None] = {}
        self._mark()
        self._settle()

    @property
    def missing(self) -> int:
        """Distinct verified answers still wanted."""
        return max(self.target - len(self._kept), 0)

    @property
    def distinct(self) -> int:
        """Distinct verified answers found, those beyond the target included."""
        return len(self._kept)

    def feed(self, draw: int, outcome: Outcome | None) -> None:
        """Takes in a draw, in any order; draws beyond the stop change nothing.

        None is a draw that will never come: the trial fails if it gets there.
        """
        self._early[draw] = outcome
        while self.status == "open" and self.used in self._early:
            found = self._early.pop(self.used)
            if found is None:
                self.status = "failed"
                return
            self._read(self.used, found)
            self._settle()

    def known(self) -> int:
        """Draws that were read, and those in a row behind them that came in early."""
        end = self.used
        while end in self._early:
            end += 1
        return end

    def has(self, draw: int) -> bool:
        """Whether a draw was read, or came in early."""
        return draw < self.used or draw in self._early

    def wanted(self) -> int:
        """Draws that it is expected to need still, rounded up; 0 when it has stopped."""
        if self.status != "open":
            return 0
        rate = self.rule.prior.mean(self.distinct, self.used)
        need = ceil(round(self.missing / rate, 9))
        return min(max(need, self.rule.pilot - self.used), self._latest - self.used)

    def certain(self) -> int:
        """Draws that it will read whatever they show, as far as it is allowed.

        No sequence stops it earlier: nothing but successes meets the target first, and at any
        number of draws the fewest answers are the most hopeless.
        """
        if self.status != "open":
            return 0
        return max(min(self._sure(), self.allowed - self.used), 0)

    def most(self) -> int:
        """Draws that it may still need to be given, whatever they show."""
        if self.status != "open":
            return 0
        end = self._latest
        return end - self.used - sum(draw < end for draw in self._early)

    def reach(self, room: int) -> int:
        """Where it is certain to get to if so many draws are made that have not come in."""
        end, last = self.used, self.used + self._sure()
        while end < last:
            if end not in self._early:
                if room <= 0:
                    break
                room -= 1
            end += 1
        return end

    def until_hopeless(self) -> int:
        """Draws after which it may first be given up, if they show the worst."""
        return max(self._soonest - self.used, 1)

    def _sure(self) -> int:
        return min(max(self.missing, self.rule.pilot - self.used), self.until_hopeless())

    def _mark(self) -> None:
        """Notes where a trial with the answers found so far is given up.

        That is `_hopeless`, at the earliest `_soonest` if more are found, and `_latest` is where it
        has stopped whatever comes: with one answer missing it goes on for longest.
        """
        at, rule = self.distinct, self.rule
        self._hopeless = self._soonest = rule.given_up(at, self.target)
        if rule.unsolved_cap is not None:  # a late first success may cost more than none
            self._soonest = min(self._hopeless, rule.given_up(max(at, 1), self.target))
        self._latest = rule.pilot
        if self.missing:
            self._latest = max(self._hopeless, rule.given_up(self.target - 1, self.target))

    def _read(self, draw: int, outcome: Outcome) -> None:
        self.used += 1
        if not outcome.correct:
            return
        self.correct += 1
        key = self._copy_of(outcome)
        if key is None:
            self._kept[outcome.key] = outcome.words
            self._mark()
        elif key != outcome.key:
            self.same[draw] = key

    def _copy_of(self, outcome: Outcome) -> str | None:
        """Key of the first answer that this one repeats."""
        if outcome.key in self._kept:
            return outcome.key
        if self.rule.max_similarity < 1:
            for key, words in self._kept.items():
                shared = len(words & outcome.words)
                union = len(words) + len(outcome.words) - shared
                if union and shared >= self.rule.max_similarity * union:
                    return key
        return None

    def _settle(self) -> None:
        if self.used < self.rule.pilot:
            return
        if not self.missing:
            self.status = "met"
        elif self.used >= self.rule.cap:
            self.status = "capped" if self.correct else "unsolved"
        elif self.used >= self._hopeless:
            self.status = "unsolved"


def words_of(text: str) -> frozenset[str]:
    """Distinct lower-case words of a text."""
    return frozenset(text.lower().split())

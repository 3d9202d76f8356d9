"""How many draws a prompt deserves: the posterior of its pass rate, a stopping rule, a queue.

A prompt's trial reads its draws in draw order and stops at a draw that depends on those before it
and on nothing else: the target is met, the cap is reached, or the cost to be expected passes the
cap. So whichever draws come back first, from whichever device, the same ones count; what was drawn
beyond the stop is waste.

The pass rate of a prompt has a Beta prior that is fitted to the pilot of all prompts (Griffin &
Krishnamoorthy's moment estimator of the beta-binomial), weak enough that a few draws of its own
outvote it. Missing r answers at posterior mean p costs r / p draws (the negative binomial's mean at
a known p; the mean over the posterior has no finite value before the second success).
"""

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

import numpy as np

WEAK, STRONG = 0.5, 2.0
"""Bounds of a prior's weight in draws."""
Status = Literal["open", "met", "capped", "unsolved", "out_of_budget", "failed"]
"""How a trial stands: target met; stopped at the cap with some answers; given up without one;
stopped for want of draws or tokens; stopped because the engine refused the prompt."""


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
        unsolved_cap: Most draws without one success; None leaves it to the expected cost.
        max_similarity: Jaccard similarity of words from which a verified answer counts as a copy
            of an earlier one; 1 compares keys alone.
    """

    cap: int
    pilot: int = 0
    prior: Beta = field(default_factory=Beta)
    unsolved_cap: int | None = None
    max_similarity: float = 1.0


class Trial:
    """One prompt's draws, read in draw order.

    Attributes:
        used: Draws read so far; none after the stop is ever read.
        correct: Of them verified.
        status: "open" until it stops.
        allowed: Draws it may make until the next grant, at most the rule's cap.
    """

    def __init__(self, target: int, rule: Rule) -> None:
        self.target, self.rule = target, rule
        self.used = self.correct = 0
        self.allowed = rule.cap
        self.status: Status = "open"
        self.same: dict[int, str] = {}
        self._kept: dict[str, frozenset[str]] = {}
        self._early: dict[int, Outcome | None] = {}
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

    def wanted(self) -> int:
        """Draws that it is expected to need still, rounded up; 0 when it has stopped."""
        if self.status != "open":
            return 0
        need = ceil(round(self.missing / self._rate(), 9)) if self.missing else 0
        return min(max(need, self.rule.pilot - self.used), self.rule.cap - self.used)

    def certain(self) -> int:
        """Draws that it will read whatever they show, as far as it is allowed."""
        if self.status != "open":
            return 0
        sure = max(self.missing, self.rule.pilot - self.used)
        if not self.correct:
            sure = min(sure, self.until_hopeless())
        return min(sure, self.allowed - self.used)

    def _read(self, draw: int, outcome: Outcome) -> None:
        self.used += 1
        if not outcome.correct:
            return
        self.correct += 1
        key = self._copy_of(outcome)
        if key is None:
            self._kept[outcome.key] = outcome.words
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

    def _rate(self, failures: int = 0) -> float:
        """Posterior mean of the rate of new answers, after that many further failures."""
        return self.rule.prior.mean(len(self._kept), self.used + failures)

    def _hopeless(self, failures: int = 0) -> bool:
        """Whether a prompt without a success would be given up after further failures."""
        used = self.used + failures
        if used < max(self.rule.pilot, 1):
            return False
        if self.rule.unsolved_cap is not None:
            return used >= self.rule.unsolved_cap
        return used + self.missing / self._rate(failures) > self.rule.cap

    def until_hopeless(self) -> int:
        """Failures in a row that a prompt without a success survives, and the one after."""
        low, high = 1, max(self.rule.cap - self.used, 1)
        while low < high:  # once hopeless, more failures never help
            middle = (low + high) // 2
            low, high = (low, middle) if self._hopeless(middle) else (middle + 1, high)
        return low

    def _settle(self) -> None:
        if self.used < self.rule.pilot:
            return
        if not self.missing:
            self.status = "met"
        elif self.used >= self.rule.cap:
            self.status = "capped" if self.correct else "unsolved"
        elif not self.correct and self._hopeless():
            self.status = "unsolved"


class Campaign:
    """The trials of many prompts, and which draws to make next.

    Attributes:
        trials: By prompt id.
    """

    def __init__(self, trials: Mapping[str, Trial]) -> None:
        self.trials = {prompt: trials[prompt] for prompt in sorted(trials)}
        self._asked = {prompt: trial.used for prompt, trial in self.trials.items()}
        self._stale: set[str] = set(self.trials)
        self._certain: list[tuple[int, str]] = []
        self._guesses: list[tuple[int, str]] = []

    @classmethod
    def of(cls, targets: Mapping[str, int], rule: Rule) -> "Campaign":
        """New trials for distinct verified answers wanted by prompt id."""
        return cls({prompt: Trial(target, rule) for prompt, target in targets.items()})

    def part(self, prompts: Iterable[str]) -> "Campaign":
        """The same trials of some prompts, with a queue of their own."""
        return Campaign({prompt: self.trials[prompt] for prompt in prompts})

    def feed(self, prompt: str, draw: int, outcome: Outcome | None) -> None:
        """Takes in one draw, or None for one that will never come."""
        trial = self.trials[prompt]
        trial.feed(draw, outcome)
        # Not draw + 1: a draw before it may be missing, and would never be asked for.
        self._asked[prompt] = max(self._asked[prompt], trial.known())
        self._stale.add(prompt)

    def open(self) -> list[str]:
        """Prompts whose trials have not stopped, sorted."""
        return [p for p, trial in self.trials.items() if trial.status == "open"]

    def take(self, slots: int, *, guess: bool) -> list[tuple[str, int]]:
        """The next draws, the longest trials first, so that none is left alone at the end.

        Args:
            slots: Most draws to return.
            guess: Also take draws that the trials are expected to need, where those they are
                certain to read don't fill the slots.

        Returns:
            Prompt and draw index. Each draw is returned once.
        """
        for prompt in sorted(self._stale):
            self._queue(prompt)
        self._stale.clear()
        out = self._pop(self._certain, slots, Trial.certain)
        if guess and len(out) < slots:
            out += self._pop(self._guesses, slots - len(out), Trial.wanted)
        return out

    def grant(self, draws: int) -> int:
        """Shares out a number of draws among the open trials, those cheapest to finish first.

        Every trial's allowance is set to what it has used and its share.

        Returns:
            Draws shared out.
        """
        left = draws
        queue = sorted((t.wanted(), p) for p, t in self.trials.items() if t.status == "open")
        for wanted, prompt in queue:
            share = min(wanted, left)
            trial = self.trials[prompt]
            trial.allowed = trial.used + share
            left -= share
            self._stale.add(prompt)
        return draws - left

    def stop(self) -> None:
        """Ends every open trial for want of budget."""
        for prompt in self.open():
            self.trials[prompt].status = "out_of_budget"

    def _queue(self, prompt: str) -> None:
        trial = self.trials[prompt]
        ahead = self._asked[prompt] - trial.used
        entry = (-trial.wanted(), prompt)
        if trial.certain() > ahead:
            heapq.heappush(self._certain, entry)
        if trial.wanted() > ahead:
            heapq.heappush(self._guesses, entry)

    def _pop(
        self, queue: list[tuple[int, str]], slots: int, due: Callable[[Trial], int]
    ) -> list[tuple[str, int]]:
        out: list[tuple[str, int]] = []
        while queue and len(out) < slots:
            _, prompt = heapq.heappop(queue)
            trial, first = self.trials[prompt], self._asked[prompt]
            n = min(due(trial) - (first - trial.used), slots - len(out))
            if n <= 0:  # an entry from before the last draws came in
                continue
            out += [(prompt, first + i) for i in range(n)]
            self._asked[prompt] = first + n
            self._stale.add(prompt)
        return out


def words_of(text: str) -> frozenset[str]:
    """Distinct lower-case words of a text."""
    return frozenset(text.lower().split())


def run(
    campaign: Campaign,
    draw: Callable[[list[tuple[str, int]]], Iterable[tuple[str, int, Outcome | None]]],
    slots: int,
    *,
    guess: bool = True,
) -> int:
    """Runs a campaign in batches to its end; the plain loop beside the streaming ones.

    Args:
        campaign: What to run.
        draw: Makes draws and says what they were worth.
        slots: Most draws of one batch.
        guess: See `Campaign.take`.

    Returns:
        Draws made, waste included.
    """
    made = 0
    while batch := campaign.take(slots, guess=guess):
        made += len(batch)
        for prompt, index, outcome in draw(batch):
            campaign.feed(prompt, index, outcome)
    return made

"""How many draws a prompt deserves: the posterior of its pass rate, and a stopping rule.

A prompt's trial reads its draws in draw order and stops at a draw that depends on those before it
and on nothing else: the target is met, the cap is reached, or the cost to be expected passes the
cap, whether it was solved before or not. So whichever draws come back first, from whichever device,
the same ones count; what was drawn beyond the stop is waste.

The pass rate of a prompt has a Beta prior that is fitted to the pilot of all prompts (Griffin &
Krishnamoorthy's moment estimator of the beta-binomial), weak enough that a few draws of its own
outvote it. Missing r answers at posterior mean p costs r / p draws (the negative binomial's mean at
a known p; the mean over the posterior has no finite value before the second success).

The trials of many prompts: which draws to make next, and which of them a limit has room for.
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


_NO_LIMIT = 1 << 62


class Budget:
    """How far trials may go under a limit of draws, of tokens, or of both.

    A beginning of the trials' order has all that it may need; the first trial behind it takes what
    still fits, and those behind that one wait.

    Args:
        trials: Open trials by prompt id, in the order in which the budget is theirs.
        draws: Draws that may be made; None is no limit.
        tokens: Tokens that may be drawn; None is no limit.
        longest: Tokens that a draw counts as until it has ended.
    """

    def __init__(
        self, trials: Mapping[str, Trial], draws: int | None, tokens: int | None, longest: int
    ) -> None:
        self._draws = _NO_LIMIT if draws is None else draws
        self._tokens = _NO_LIMIT if tokens is None else tokens
        self._longest = longest
        self._trials = trials
        self._waiting = list(trials)[::-1]
        self._made = dict.fromkeys(trials, (0, 0))  # draws that have ended, and their tokens
        self._held: dict[str, tuple[int, int]] = {}
        for trial in trials.values():
            trial.allowed = trial.used

    def ended(self, prompt: str, tokens: int | None, flying: int) -> None:
        """Takes in that a draw has ended.

        Args:
            prompt: Whose draw it is.
            tokens: What it took; None for a draw that will never come.
            flying: Draws of this prompt that have not ended.
        """
        if tokens is not None:
            draws, before = self._made[prompt]
            self._made[prompt] = draws + 1, before + tokens
        if prompt in self._held:
            draws, before = self._held[prompt]
            now = self._held[prompt] = self._most(prompt, flying)
            self._draws += draws - now[0]
            self._tokens += before - now[1]

    def admit(self, flying: Callable[[str], int]) -> list[str]:
        """Lets trials go as far as there is room for.

        Args:
            flying: Draws of a prompt that have not ended.

        Returns:
            Prompts whose trials may go further than before.
        """
        changed = []
        while self._waiting:
            prompt = self._waiting[-1]
            trial = self._trials[prompt]
            most = self._most(prompt, flying(prompt))
            fits = most[0] <= self._draws and most[1] <= self._tokens
            if fits:
                self._waiting.pop()
                self._held[prompt] = most
                self._draws -= most[0]
                self._tokens -= most[1]
                allowed = trial.rule.cap
            else:
                draws, tokens = self._made[prompt]
                room = min(self._draws - draws, (self._tokens - tokens) // self._longest)
                allowed = trial.reach(room)
            if allowed > trial.allowed:
                trial.allowed = allowed
                changed.append(prompt)
            if not fits:
                break
        return changed

    def _most(self, prompt: str, flying: int) -> tuple[int, int]:
        """The most draws and tokens that a trial takes of this budget in all."""
        draws, tokens = self._made[prompt]
        # A trial that failed no longer needs those under way, and they are made all the same.
        rest = max(self._trials[prompt].most(), flying)
        return draws + rest, tokens + rest * self._longest


class Campaign:
    """The trials of many prompts, and which draws to make next.

    Attributes:
        trials: By prompt id.
    """

    def __init__(self, trials: Mapping[str, Trial]) -> None:
        self.trials = {prompt: trials[prompt] for prompt in sorted(trials)}
        self._asked = {prompt: trial.used for prompt, trial in self.trials.items()}
        self._flying: dict[str, set[int]] = {prompt: set() for prompt in self.trials}
        self._stale: set[str] = set(self.trials)
        self._certain: list[tuple[int, str]] = []
        self._guesses: list[tuple[int, str]] = []
        self._order: list[str] | None = None
        self._budget: Budget | None = None

    @classmethod
    def of(cls, targets: Mapping[str, int], rule: Rule) -> "Campaign":
        """New trials for distinct verified answers wanted by prompt id."""
        return cls({prompt: Trial(target, rule) for prompt, target in targets.items()})

    def part(self, prompts: Iterable[str]) -> "Campaign":
        """The same trials of some prompts, with a queue of their own.

        A part goes as far as the trials are allowed when it runs; it gains no room by what ends.
        """
        return Campaign({prompt: self.trials[prompt] for prompt in prompts})

    def within(self, draws: int | None, tokens: int | None, longest: int) -> bool:
        """Holds what is drawn from now on within limits, and what is drawn is sure to be read.

        The order in which the budget is spent is that of the first call: by draws wanted, then by
        prompt id. None of the campaign's draws may be under way.

        Args:
            draws: Draws that may be made; None is no limit.
            tokens: Tokens that may be drawn; None is no limit.
            longest: Tokens that a draw counts as until it has ended.

        Returns:
            Whether there is room for a draw.
        """
        assert not any(self._flying.values())
        if self._order is None:
            self._order = [p for _, p in sorted((self.trials[p].wanted(), p) for p in self.open())]
        going = {p: self.trials[p] for p in self._order if self.trials[p].status == "open"}
        self._budget = Budget(going, draws, tokens, longest)
        self._stale.update(going)
        return any(self.trials[prompt].certain() > 0 for prompt in self._admit())

    def feed(self, prompt: str, draw: int, outcome: Outcome | None, tokens: int = 0) -> None:
        """Takes in one draw, or None for one that will never come.

        Args:
            prompt: Whose draw it is.
            draw: Its index.
            outcome: What it was worth.
            tokens: What it took of the budget, where there is one.
        """
        trial = self.trials[prompt]
        trial.feed(draw, outcome)
        # Not draw + 1: a draw before it may be missing, and would never be asked for.
        self._asked[prompt] = max(self._asked[prompt], trial.known())
        self._flying[prompt].discard(draw)
        self._stale.add(prompt)
        if self._budget is not None:
            took = None if outcome is None else tokens
            self._budget.ended(prompt, took, len(self._flying[prompt]))
            self._admit()

    def open(self) -> list[str]:
        """Prompts whose trials have not stopped, sorted."""
        return [p for p, trial in self.trials.items() if trial.status == "open"]

    def take(self, slots: int, *, guess: bool) -> list[tuple[str, int]]:
        """The next draws, the longest trials first, so that none is left alone at the end.

        Args:
            slots: Most draws to return.
            guess: Also take draws that the trials are expected to need, where those they are
                certain to read don't fill the slots; never under a limit.

        Returns:
            Prompt and draw index. Each draw is returned once.
        """
        for prompt in sorted(self._stale):
            self._queue(prompt)
        self._stale.clear()
        out = self._pop(self._certain, slots, Trial.certain)
        if guess and self._budget is None and len(out) < slots:
            out += self._pop(self._guesses, slots - len(out), Trial.wanted)
        return out

    def stop(self) -> None:
        """Ends every open trial for want of budget."""
        for prompt in self.open():
            self.trials[prompt].status = "out_of_budget"

    def _admit(self) -> list[str]:
        assert self._budget is not None
        changed = self._budget.admit(lambda prompt: len(self._flying[prompt]))
        self._stale.update(changed)
        return changed

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
            new = [draw for draw in range(first, first + n) if not trial.has(draw)]
            out += [(prompt, draw) for draw in new]
            self._flying[prompt].update(new)
            self._asked[prompt] = first + n
            self._stale.add(prompt)
        return out


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

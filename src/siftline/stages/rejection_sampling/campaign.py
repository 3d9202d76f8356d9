"""The trials of many prompts: which draws to make next, and which of them a limit has room for.

Under a limit the trials are spent on in an order that is fixed when they begin, those cheapest to
finish first, and what is drawn is what it would be if each ran to its stop before the next began,
until the budget ends. So that draws need not wait for one another, a draw may start as soon as its
trial is certain to read it and it fits even if every trial before it takes the most that it may
still take, each draw at its greatest length. What has ended counts as what it took, so room is only
ever gained; a stretch at the end of a budget is drawn by few trials at a time.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping

from siftline.stages.rejection_sampling.trials import Outcome, Rule, Trial

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

"""Under a limit the draws that are read are those of one trial after another, however they end."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.kernels.draws import hash64
from siftline.stages.rejection_sampling.trials import Beta, Campaign, Outcome, Rule, Trial, run

LONGEST = 8


class World:
    """What every draw of a pool is worth, and how many tokens it takes."""

    def __init__(self, prompts, target, rule, seed):
        self.rates = {f"p{i:03d}": hash64(seed, "rate", i) / 2**63 for i in range(prompts)}
        self.targets = {p: 1 + hash64(seed, "target", p) % target for p in self.rates}
        self.rule, self.seed = rule, seed

    def outcome(self, prompt, draw):
        return Outcome(hash64(self.seed, prompt, draw) / 2**63 < self.rates[prompt], f"{draw % 5}")

    def tokens(self, prompt, draw):
        return 1 + hash64(self.seed, "tokens", prompt, draw) % LONGEST

    def campaign(self):
        """Trials that have read their pilots."""
        campaign = Campaign.of(self.targets, self.rule)
        for prompt in campaign.trials:
            for draw in range(self.rule.pilot):
                campaign.feed(prompt, draw, self.outcome(prompt, draw))
        return campaign

    def one_after_another(self, draws, tokens):
        """The reference: each trial runs to its stop before the next begins, in a plain loop."""
        trials = self.campaign().trials
        spent = 0
        for _, prompt in sorted((t.wanted(), p) for p, t in trials.items() if t.status == "open"):
            trial = trials[prompt]
            while trial.status == "open":
                if (draws is not None and draws < 1) or (
                    tokens is not None and tokens - spent < LONGEST
                ):
                    return standing(trials), spent
                draws = None if draws is None else draws - 1
                spent += self.tokens(prompt, trial.used)
                trial.feed(trial.used, self.outcome(prompt, trial.used))
        return standing(trials), spent


def standing(trials):
    return {p: (t.used, t.correct, t.status) for p, t in trials.items()}


def stream(world, campaign, draws, tokens, slots, seed):
    """Slots that are filled as draws end, in a random order; draws made, tokens, counts in use."""
    dice, flying, made, spent, busy = random.Random(seed), [], [], 0, []
    while True:
        flying += (taken := campaign.take(slots - len(flying), guess=True))
        made += taken
        busy.append(len(flying))
        assert draws is None or len(made) <= draws
        assert tokens is None or spent + LONGEST * len(flying) <= tokens
        if not flying:
            return made, spent, busy
        prompt, draw = flying.pop(dice.randrange(len(flying)))
        took = world.tokens(prompt, draw)
        spent += took
        campaign.feed(prompt, draw, world.outcome(prompt, draw), took)


def turns(world, campaign, draws, tokens, slots):
    """Batches of parts of the campaign, which gain room when all of them have ended."""
    made, spent, prompts = 0, 0, list(campaign.trials)

    def draw(batch):
        nonlocal made, spent
        made += len(batch)
        spent += sum(world.tokens(*name) for name in batch)
        return [(p, j, world.outcome(p, j)) for p, j in batch]

    while campaign.within(
        None if draws is None else draws - made,
        None if tokens is None else tokens - spent,
        LONGEST,
    ):
        for bucket in range(3):
            run(campaign.part(prompts[bucket::3]), draw, slots, guess=False)
        assert draws is None or made <= draws
        assert tokens is None or spent <= tokens
    return made, spent


RULES = st.builds(
    lambda cap, pilot, a, b, unsolved: Rule(
        cap, min(pilot, cap), Beta(a, b), None if unsolved is None else min(unsolved, cap)
    ),
    st.integers(1, 20),
    st.integers(0, 4),
    st.floats(0.2, 3),
    st.floats(0.2, 3),
    st.none() | st.integers(1, 12),
)


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 6),
    RULES,
    st.integers(0, 10**6),
    st.none() | st.integers(0, 120),
    st.none() | st.integers(0, 400),
    st.integers(1, 12),
)
def test_what_is_read_under_a_limit_is_the_plain_loop_whatever_ends_first(
    prompts, target, rule, seed, draws, tokens, slots
):
    world = World(prompts, target, rule, seed)
    expected, spent = world.one_after_another(draws, tokens)
    before = sum(t.used for t in world.campaign().trials.values())
    for order in range(3):
        campaign = world.campaign()
        campaign.within(draws, tokens, LONGEST)
        made, took, _ = stream(world, campaign, draws, tokens, slots + order, order)
        assert standing(campaign.trials) == expected
        assert took == spent
        assert len(made) == len(set(made)) == sum(u for u, _, _ in expected.values()) - before
        assert not campaign.within(  # nothing was left that fits
            None if draws is None else draws - len(made),
            None if tokens is None else tokens - took,
            LONGEST,
        )
    campaign = world.campaign()
    assert turns(world, campaign, draws, tokens, slots)[1] == spent
    assert standing(campaign.trials) == expected


def test_a_generous_limit_is_no_barrier():
    """The slots are as full at every moment as without one."""
    world = World(300, 4, Rule(24, 2, Beta(0.5, 0.5)), 3)
    plain, limited = world.campaign(), world.campaign()

    def sure(campaign):
        return [t.certain() for t in campaign.trials.values()]

    assert limited.within(10_000, 100_000, LONGEST)
    assert sure(plain) == sure(limited)
    dice, seen = (random.Random(1), random.Random(1)), ([], [])
    for campaign, order, counts in zip((plain, limited), dice, seen, strict=True):
        flying = []
        while True:
            flying += campaign.take(16 - len(flying), guess=False)
            counts.append(len(flying))
            if not flying:
                break
            prompt, draw = flying.pop(order.randrange(len(flying)))
            campaign.feed(prompt, draw, world.outcome(prompt, draw), 5)
    assert seen[0] == seen[1]
    assert seen[1].count(16) > 0.9 * len(seen[1])


@pytest.mark.parametrize(("draws", "tokens"), [(600, None), (None, 2700)])
def test_only_the_last_stretch_of_a_budget_narrows(draws, tokens):
    world = World(300, 4, Rule(24, 2, Beta(0.5, 0.5)), 3)
    campaign = world.campaign()
    campaign.within(draws, tokens, LONGEST)
    made, took, busy = stream(world, campaign, draws, tokens, 16, 0)
    assert campaign.open()
    assert len(made) == draws if draws else tokens - took < LONGEST
    full = busy.index(next(n for n in busy if n < 16))
    assert full > 0.6 * len(busy)


def test_the_cheapest_are_finished_and_the_one_that_the_budget_ends_in_takes_what_fits():
    rule = Rule(cap=100, pilot=2, prior=Beta(1, 1))
    campaign = Campaign.of({"a": 3, "b": 3, "c": 3}, rule)
    pilots = {"a": (False, True), "b": (True, True), "c": (False, True)}
    for prompt, outcomes in pilots.items():
        for draw, right in enumerate(outcomes):
            campaign.feed(prompt, draw, Outcome(right, str(draw)))
    # b wants 2 draws, a and c 4 each; all further draws of a and c fail.
    assert campaign.within(6, None, LONGEST)
    made = []
    while batch := campaign.take(8, guess=True):
        made += batch
        for prompt, draw in batch:
            campaign.feed(prompt, draw, Outcome(prompt == "b", str(draw)))
    campaign.stop()
    assert sorted(made) == [("a", 2), ("a", 3), ("a", 4), ("a", 5), ("a", 6), ("b", 2)]
    found = {p: (t.status, t.used) for p, t in campaign.trials.items()}
    assert found == {"a": ("out_of_budget", 7), "b": ("met", 3), "c": ("out_of_budget", 2)}


@pytest.mark.parametrize("slots", [1, 4, 16])
def test_a_prompt_that_is_refused_gives_its_room_back(slots):
    rule = Rule(cap=10, pilot=4)
    for seed in range(5):
        campaign = Campaign.of({"a": 4, "b": 4, "c": 4}, rule)
        assert campaign.within(9, None, 1)
        dice, flying, made = random.Random(seed), [], 0
        while True:
            flying += campaign.take(slots - len(flying), guess=True)
            if not flying:
                break
            prompt, draw = flying.pop(dice.randrange(len(flying)))
            refused = prompt == "a" and draw == 1
            made += not refused
            campaign.feed(prompt, draw, None if refused else Outcome(True, str(draw)))
        assert made == 9
        stands = {p: (t.status, t.used) for p, t in campaign.trials.items()}
        assert stands["a"] == ("failed", 1)
        assert stands["b"] == ("met", 4)
        assert stands["c"][0] == ("met" if stands["c"][1] == 4 else "open")


def test_a_trial_reaches_past_what_came_in_early():
    trial = Trial(6, Rule(cap=20, pilot=6))
    for draw in (1, 2, 5):
        trial.feed(draw, Outcome(True, str(draw)))
    assert [trial.reach(room) for room in range(5)] == [0, 3, 4, 6, 6]
    # Missing three: with one missing, n + (n + 2) / 6 passes 20 at the 17th draw.
    assert (trial.most(), trial.has(1), trial.has(3)) == (17 - 3, True, False)

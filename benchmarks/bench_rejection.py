"""Verified answers for the draws spent: this sampler beside the pass-based one of DART-Math.

    siftline demo --root DIR
    .venv/bin/python benchmarks/bench_rejection.py --root DIR [--seeds 3] [--vllm 60]

Prompts, their (partly wrong) independent answers and the small base model are the demo's. For each
seed every prompt is drawn up to the cap once; all samplers then spend the same recorded draws, each
in its own order, so nothing differs but the order and when a prompt stops.

    passes          the released scheduler: passes over all unfinished prompts, one draw each, until
                    a prompt has more than k right answers; copies count
    passes, exact   the same, put right: exactly k, copies do not count
    siftline        trials by posterior, cheapest to finish first, hopeless ones given up

The share of targets met counts prompts with k distinct verified answers; the budgets are shares of
what the exact passes need to end, and what siftline needs without a limit. With --vllm N, N prompts
are also drawn for on vLLM, once in passes with a barrier behind each and once as a stream.
"""

import argparse
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from siftline.ingest.pool import Pool
from siftline.recipe.parse import find
from siftline.scoring.engines.base import Sampling
from siftline.scoring.measures.samples import seed_of
from siftline.scoring.recorder import Ask, Pull, Recorder
from siftline.stages.context import by_store_bucket
from siftline.stages.models import engines, model_spec
from siftline.stages.rejection_sampling.drawing import Prompt, run_campaign
from siftline.stages.rejection_sampling.options import RejectionSampling
from siftline.stages.rejection_sampling.problems import by_verifier, problems_of
from siftline.stages.rejection_sampling.sampler import Sampler
from siftline.stages.rejection_sampling.trials import Campaign, Outcome, Rule, fit_prior, run
from siftline.workspace import Workspace

PILOT = 4
SHARES = (0.15, 0.25, 0.5, 0.75, 1.0)
Facts = Mapping[tuple[str, int], tuple[bool, str]]


Spent = tuple[int, int, int]
"""Draws made, distinct verified answers up to the targets, targets met."""


def passes(
    facts: Facts, targets: Mapping[str, int], cap: int, budget: int, *, exact: bool
) -> Spent:
    """One draw for every unfinished prompt, again and again."""
    found: dict[str, list[str]] = {p: [] for p in targets}
    made = 0
    for draw in range(cap):
        for prompt, k in targets.items():
            have = found[prompt]
            if len(set(have)) >= k if exact else len(have) > k:
                continue
            if made == budget:
                return made, *tally(found, targets)
            made += 1
            right, key = facts[prompt, draw]
            if right:
                have.append(key)
    return made, *tally(found, targets)


def needed(facts: Facts, targets: Mapping[str, int], cap: int) -> int:
    """Draws that the exact passes make before they end."""
    total = 0
    for prompt, k in targets.items():
        keys: set[str] = set()
        for draw in range(cap):
            if len(keys) >= k:
                break
            total += 1
            right, key = facts[prompt, draw]
            keys |= {key} if right else set()
    return total


def tally(found: Mapping[str, list[str]], targets: Mapping[str, int]) -> tuple[int, int]:
    """Distinct verified answers up to each target, and targets met."""
    distinct = {p: min(len(set(keys)), targets[p]) for p, keys in found.items()}
    return sum(distinct.values()), sum(distinct[p] >= k for p, k in targets.items())


def trials(facts: Facts, targets: Mapping[str, int], cap: int, budget: int) -> Spent:
    """The stage's own spending: pilot, then as far as the rest of the budget has room."""
    made = PILOT * len(targets)
    firsts = [[facts[p, j][0] for j in range(PILOT)] for p in targets]
    prior = fit_prior([sum(f) for f in firsts], [PILOT] * len(firsts))
    campaign = Campaign.of(targets, Rule(cap, PILOT, prior))

    def draw(batch: list[tuple[str, int]]) -> list[tuple[str, int, Outcome]]:
        return [(p, j, Outcome(*facts[p, j])) for p, j in batch]

    for prompt in targets:
        for j in range(PILOT):
            campaign.feed(prompt, j, Outcome(*facts[prompt, j]))
    if campaign.within(budget - made, None, 1):
        made += run(campaign, draw, 256, guess=False)
    assert made <= budget
    found = {
        p: [facts[p, j][1] for j in range(t.used) if facts[p, j][0]]
        for p, t in campaign.trials.items()
    }
    return made, *tally(found, targets)


def recorded(root: Path, seed: int, cap: int) -> tuple[Facts, dict[str, Prompt], Any]:
    """All draws of all prompts up to the cap: right or not, and what makes two the same."""
    workspace, recipe = Workspace(root.absolute()), find("demo")
    stage = next(s for s in recipe.stages if s.kind == "rejection_sampling")
    assert isinstance(stage.options, RejectionSampling)
    options = replace(stage.options, seed=seed, max_draws=None, max_tokens=None)
    pool = Pool(workspace.pool(recipe.pool.name))
    with engines() as opened:
        spec = model_spec(workspace, recipe, "sampler")
        recorder = opened.recorder(spec, workspace.store)
        problems, _ = problems_of(recorder, by_store_bucket(pool.rows, pool.buckets), "math")
        sampler = Sampler.of(options, problems, [recorder], lambda line: None, by_verifier("math"))
        sampler.run(Campaign.of(dict.fromkeys(problems, cap), Rule(cap=cap, pilot=cap)))
    facts = {name: (line["correct"], line["dedup_key"]) for name, line in sampler.lines.items()}
    return facts, {p: problem.home for p, problem in problems.items()}, (spec, options, workspace)


def whole(facts: Facts, prompts: Iterable[str], cap: int) -> list[str]:
    """Prompts with all their draws; of one that the model refused at some draw there are fewer."""
    return sorted(p for p in prompts if all((p, draw) in facts for draw in range(cap)))


def compare(facts: Facts, prompts: list[str], k: int, cap: int) -> list[tuple[float, Any]]:
    """(answers, targets met) of the three samplers at each budget, and the budget."""
    targets = dict.fromkeys(prompts, k)
    everything = needed(facts, targets, cap)
    lines = []
    own, *_ = trials(facts, targets, cap, cap * len(prompts))
    for share in sorted([*SHARES, own / everything]):
        budget = max(round(share * everything), PILOT * len(prompts))
        found = {
            "passes": passes(facts, targets, cap, budget, exact=False),
            "passes, exact": passes(facts, targets, cap, budget, exact=True),
            "siftline": trials(facts, targets, cap, budget),
        }
        lines.append((share, (budget, found)))
    return lines


class Watched:
    """A streaming engine that notes how many draws are under way, each time it asks for more."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.slots = engine, int(engine.slots)
        self.busy: list[tuple[float, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def stream(self, pull: Pull, sampling: Sampling) -> Iterator[tuple[Any, Any]]:
        def watching(free: int, idle: bool) -> list[Ask]:
            given = pull(free, idle)
            self.busy.append((time.perf_counter(), self.slots - free + len(given)))
            return given

        yield from self.engine.stream(watching, sampling)

    def occupancy(self) -> float:
        """Mean share of the slots in use, by time."""
        whole = self.busy[-1][0] - self.busy[0][0]
        used = sum(n * (end - at) for (at, n), (end, _) in pairwise(self.busy))
        return used / whole / self.slots


def timed(homes: dict[str, Prompt], setting: Any, count: int, k: int) -> dict[str, float]:
    """Seconds on vLLM for the same draws: in passes with a barrier, and as a stream.

    Prints how full the stream kept the engine's slots.
    """
    import tempfile

    spec, options, _ = setting
    chosen = {p: homes[p] for p in sorted(homes)[:count]}
    seconds: dict[str, list[float]] = {}
    with engines() as opened:
        engine = opened.get(replace(spec, engine="vllm"))
        rows = [list(h.tokens) for h in chosen.values()]
        engine.generate(rows[:4], [[1]] * 4, options.sampling)  # warm
        for name in ("passes", "stream", "stream", "passes"):
            began = time.perf_counter()
            if name == "passes":
                for draw in range(k):
                    seeds = [[seed_of(0, prompt, draw)] for prompt in chosen]
                    engine.generate(rows, seeds, options.sampling)
            else:
                with tempfile.TemporaryDirectory() as root:
                    watched = Watched(engine)
                    recorder = Recorder(watched, replace(spec, engine="vllm"), Path(root))
                    campaign = Campaign.of(dict.fromkeys(chosen, k), Rule(cap=k, pilot=k))
                    run_campaign(
                        [recorder], campaign, chosen, options.sampling, 0,
                        lambda ended: [Outcome(True, str(j)) for _, j, _ in ended], guess=False,
                    )  # fmt: skip
                print(f"stream: {watched.occupancy():.0%} of {watched.slots} slots in use")
            seconds.setdefault(name, []).append(time.perf_counter() - began)
    return {name: statistics.median(all_) for name, all_ in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="root of a finished demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cap", type=int, default=48)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--vllm", type=int, default=0, help="prompts to time on vLLM")
    asked = parser.parse_args()
    runs: list[list[tuple[float, Any]]] = []
    counts: list[int] = []
    for seed in range(asked.seeds):
        facts, homes, setting = recorded(asked.root, seed, asked.cap)
        prompts = whole(facts, homes, asked.cap)
        if len(prompts) < len(homes):
            print(f"seed {seed}: {len(homes) - len(prompts)} prompts lack draws and are left out")
        counts.append(len(prompts))
        runs.append(compare(facts, prompts, asked.k, asked.cap))
    count = min(counts)
    print(f"{count} prompts, k {asked.k}, cap {asked.cap}, medians over {asked.seeds} seeds")
    print(f"{'budget':>13}  {'sampler':<14} {'made':>7} {'per 1000':>9} {'targets met':>12}")
    for i in range(len(SHARES) + 1):
        share = statistics.median(lines[i][0] for lines in runs)
        met: dict[str, float] = {}
        budget = statistics.median(lines[i][1][0] for lines in runs)
        for name in ("passes", "passes, exact", "siftline"):
            spent = [lines[i][1][1][name] for lines in runs]
            made = statistics.median(s[0] for s in spent)
            per = statistics.median(1000 * s[1] / s[0] for s in spent)
            met[name] = statistics.median(s[2] / n for s, n in zip(spent, counts, strict=True))
            where = f"{share:>5.0%} {budget:>7,.0f}"
            print(f"{where}  {name:<14} {made:>7,.0f} {per:>9.0f} {met[name]:>11.1%}")
    if asked.vllm:
        took = timed(homes, setting, asked.vllm, 8)
        print(
            f"vLLM, {asked.vllm} prompts x 8 draws: "
            + ", ".join(f"{name} {s:.1f} s" for name, s in sorted(took.items()))
        )


if __name__ == "__main__":
    main()

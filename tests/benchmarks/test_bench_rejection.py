"""benchmarks/bench_rejection.py: what it does without some draws, and how it counts slots."""

import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_rejection

    return bench_rejection


def test_prompts_that_lack_draws_are_left_out(bench):
    cap = 8
    facts = {
        (prompt, draw): (draw % 2 == 0, str(draw))
        for prompt in ("a", "b", "c")
        for draw in range(cap)
        if (prompt, draw) != ("b", 5)
    }
    prompts = bench.whole(facts, ["c", "b", "a", "d"], cap)
    assert prompts == ["a", "c"]
    lines = bench.compare(facts, prompts, 2, cap)
    assert len(lines) == len(bench.SHARES) + 1
    _, (_, found) = lines[-1]
    assert found["siftline"][2] == found["passes, exact"][2] == 2


def test_occupancy_is_the_share_of_slots_by_time(bench):
    class Two:
        slots = 2

        def fingerprint(self):
            return "two"

        def stream(self, pull, sampling):
            assert len(pull(2, True)) == 2
            time.sleep(0.2)
            pull(1, False)
            time.sleep(0.2)
            yield from ()
            pull(2, True)

    given = [["x", "y"], [], []]
    watched = bench.Watched(Two())
    assert not list(watched.stream(lambda free, idle: given.pop(0), None))
    assert watched.fingerprint() == "two"
    assert watched.occupancy() == pytest.approx(0.75, abs=0.1)

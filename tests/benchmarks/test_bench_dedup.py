"""How quality is counted in the benchmark of deduplication."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

from siftline.kernels.sets.jaccard import jaccard_reference
from siftline.kernels.text.words_reference import words_reference

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("bench_dedup", FOLDER / "bench_dedup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("dedup_peers", None)


def test_pairs_are_those_of_comparing_all_with_all(bench):
    draw = random.Random(0)
    sets = [[f"w{draw.randrange(30)}" for _ in range(draw.randint(1, 40))] for _ in range(70)]
    sets += [sets[3], [*sets[5], "more"], ["alone"]]
    left, right, value = bench.near_pairs(sets, 0.5, block=16)
    wanted = [
        (i, j, jaccard_reference(set(sets[i]), set(sets[j])))
        for i in range(len(sets))
        for j in range(i + 1, len(sets))
    ]
    found = list(zip(left.tolist(), right.tolist(), value.tolist(), strict=True))
    assert found == [pair for pair in wanted if pair[2] >= 0.5]
    assert (3, 70, 1.0) in found


def test_words_are_those_of_the_reference(bench):
    text = "It's 3.5 x\u0301y, caf\u00e9!\n\n\u6f22\u5b57 next\tB-c \u3000 end\u200bless"
    assert bench.own_words(text) == words_reference(text)
    assert bench.own_words("(2 +\n3) * 4 - 5") == words_reference("(2 + 3) * 4 - 5")
    assert bench.own_words("") == []

"""Forwards side by side: the same numbers, the cores shared out, and nothing left behind."""

import threading

import numpy as np
import pytest
import torch

from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.engines.devices import can_share, side_by_side
from siftline.scoring.engines.transformers_engine import TransformersEngine


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_are_shared_out_and_given_back(threads):
    threads(5)
    gate = threading.Barrier(2)

    def run(part: int) -> tuple[int, int, str]:
        gate.wait(20)  # both at once, or this never ends
        return part, torch.get_num_threads(), threading.current_thread().name

    found = side_by_side(run, [3, 1])
    assert [part for part, _, _ in found] == [3, 1]
    assert [count for _, count, _ in found] == [2, 2]
    assert len({name for _, _, name in found}) == 2
    assert torch.get_num_threads() == 5
    later: list[int] = []
    other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert later == [5], "a thread of somebody else's begins with a lane's share"


def test_one_part_has_all_threads(threads):
    threads(3)
    assert side_by_side(lambda part: torch.get_num_threads(), ["a"]) == [3]
    assert side_by_side(lambda part: part, []) == []


def test_a_failing_part_fails_the_call(threads):
    threads(2)
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda part: 1 // part, [1, 0, 1])


def test_bytes_do_not_depend_on_the_cores_where_passes_suffice(tiny_model, threads):
    engine = TransformersEngine(ModelSpec(str(tiny_model), device="cpu"))
    rng = np.random.default_rng(3)
    rows = [rng.integers(3, 250, int(n)).tolist() for n in rng.integers(3, 120, 60)]
    spans = [(1, len(row)) for row in rows]
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append([line.tobytes() for line in engine.score(rows, spans)])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("kind", ["dynamic", "default"])
def test_a_model_that_lengths_change_runs_alone(kind):
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": kind, "rope_theta": 10_000.0}
    if kind == "dynamic":
        rope |= {"factor": 2.0, "original_max_position_embeddings": 64}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 259}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, rope_parameters=rope))
    assert can_share(model) == (kind == "default")

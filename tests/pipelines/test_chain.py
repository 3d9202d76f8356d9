"""The whole chain on the mini recipe: accounting, equal bytes, nothing twice, kills, failures."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from siftline.ingest.pool import Pool
from siftline.rows.ledger import FAILED, KEPT, REMOVED
from siftline.stages.run import outputs, run_stage
from siftline.workspace import Workspace

# Everything that a run needs and that costs time, without what a run decides.
MADE = ("inputs", "models")


def quiet(line): ...


def ids_with(output, outcome):
    decided = output.all_decisions()
    return decided.filter(pl.col("outcome") == outcome)["id"].to_list()


@pytest.fixture
def done(finished, mini):
    """Stages and outputs of the finished run."""
    return outputs(Workspace(finished.root), mini())


# ---- every row is accounted for --------------------------------------------------------------


def test_accounting_closes_in_every_stage(done):
    assert len(done) == 12
    before = None
    for stage, output in done:
        counts = output.accounting
        decided = output.all_decisions()
        assert counts.rows_in + counts.added == counts.kept + counts.removed + counts.failed
        assert decided.height == counts.rows_in + counts.added, stage.name
        assert decided["id"].is_unique().all()
        came_in = set(decided.filter(~pl.col("added"))["id"].to_list())
        if before is not None:
            assert came_in == set(ids_with(before, KEPT)), stage.name
        before = output
    removed = {stage.name: output.accounting.removed for stage, output in done}
    # Planted rows are there to be caught: a gate that lets all through would pass the sums.
    assert min(removed[name] for name in ("duplicates", "decontamination", "verify")) > 0
    assert {s.name: o.accounting.added for s, o in done}["rejection_sampling"] > 0


def test_published_rows_are_those_the_last_stage_kept(finished, done):
    folder = finished.root / "curated" / "mini" / "latest" / "data"
    published = pl.read_parquet(folder / "*.parquet")["id"].to_list()
    assert sorted(published) == sorted(ids_with(done[-1][1], KEPT))


def test_removed_rows_say_why_and_losers_name_a_kept_row(finished, done):
    everything = 0
    for stage, output in done:
        gone = output.all_decisions().filter(pl.col("outcome") == REMOVED)
        everything += gone.height
        assert gone["reason"].null_count() == 0, stage.name
        if stage.kind == "duplicates" and gone.height:
            assert gone["matched_id"].null_count() == 0
            assert set(gone["matched_id"].to_list()) <= set(ids_with(output, KEPT))
    listed = finished.root / "curated" / "mini" / "latest" / "removed"
    assert pl.read_parquet(listed / "*.parquet").height == everything


# ---- the truth stays closed ------------------------------------------------------------------


def test_no_process_of_the_run_opened_the_truth(finished, guarded):
    assert (finished.truth / "mini" / "rows.jsonl").exists()
    assert not (finished.root / "truth").exists()  # gone before the run, never asked for
    assert not guarded.caught.exists()


def test_the_guard_catches_a_reader(finished, guarded, tmp_path):
    environment = guarded.environment | {"SIFTLINE_TEST_CAUGHT": str(tmp_path / "caught")}
    path = finished.truth / "mini" / "rows.jsonl"
    reader = [sys.executable, "-c", f"open({str(path)!r})"]
    said = subprocess.run(reader, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert "off limits" in said.stderr
    assert (tmp_path / "caught").read_text() == f"{path}\n"


# ---- nothing twice ---------------------------------------------------------------------------


def computed_in_last_run(root, monkeypatch):
    """The `computed` metadata of every asset in the newest run of an instance."""
    import dagster as dg

    monkeypatch.setenv("DAGSTER_HOME", str(root / ".dagster"))
    with dg.DagsterInstance.get() as instance:
        (run,) = instance.get_runs(limit=1)
        found = {}
        for record in instance.get_records_for_run(run.run_id).records:
            event = record.event_log_entry.dagster_event
            if event and event.event_type_value == "ASSET_MATERIALIZATION":
                made = event.event_specific_data.materialization
                if "computed" in made.metadata:
                    found[made.asset_key.to_user_string()] = made.metadata["computed"].value
    return found


def test_second_run_touches_no_file_and_asks_no_model(finished, mini_tools, monkeypatch):
    before = mini_tools.snapshot(finished.root)
    said = mini_tools.siftline("run", "mini", "--root", finished.root, "--json")
    assert said.returncode == 0, said.stderr[-4000:]
    assert mini_tools.snapshot(finished.root) == before
    assert json.loads(said.stdout) == json.loads(finished.said.stdout.splitlines()[-1])
    computed = computed_in_last_run(finished.root, monkeypatch)
    assert len(computed) == 17  # inputs, scores, twelve stages, curated, model, evaluation
    assert not any(computed.values()), computed


@pytest.fixture
def expected(finished, mini_tools):
    return mini_tools.tree_bytes(finished.root / "curated")


def test_fresh_root_gives_the_same_bytes(finished, expected, mini, mini_tools, tmp_path):
    # Nothing is shared with the first run, and all of it happens in one process instead of two
    # workers' many.
    mini_tools.run_chain(tmp_path / "root", mini())
    assert mini_tools.tree_bytes(tmp_path / "root" / "curated") == expected


@pytest.mark.parametrize("buckets", [1, 16])
def test_buckets_change_no_byte_and_ask_nothing(
    buckets, finished, expected, mini, mini_tools, forwards, tmp_path
):
    root = mini_tools.copy_root(finished.root, tmp_path / "root", *MADE, "store")
    mini_tools.run_chain(root, mini(f"pool.buckets={buckets}"))
    assert Pool(root / "pool" / "mini").buckets == buckets
    assert mini_tools.tree_bytes(root / "curated") == expected
    assert forwards == {}


def test_order_and_files_of_the_input_change_no_byte(
    finished, expected, mini, mini_tools, forwards, tmp_path
):
    root = mini_tools.copy_root(finished.root, tmp_path / "root", *MADE, "store")
    pool = root / "inputs" / "mini" / "pool.jsonl"
    lines = pool.read_text(encoding="utf-8").splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    pool.unlink()
    for part in range(3):
        text = "".join(lines[part::3])
        pool.with_name(f"pool-{part}.jsonl").write_text(text, encoding="utf-8")
    mini_tools.run_chain(root, mini())
    assert mini_tools.tree_bytes(root / "curated") == expected
    assert forwards == {}


def test_a_moved_threshold_asks_no_model(finished, mini, mini_tools, forwards, tmp_path):
    root = mini_tools.copy_root(finished.root, tmp_path / "root")
    changed = ["stages.confidence.threshold=absolute", "stages.confidence.cut=0.5"]
    ran = mini_tools.run_chain(root, mini(*changed), until="confidence")
    fresh = {name: computed for name, _, computed in ran}
    assert [name for name, computed in fresh.items() if computed] == ["confidence"]
    was = outputs(Workspace(root), mini())[5][1].accounting
    assert ran[-1][1].accounting.removed > was.removed
    assert forwards == {}


def test_added_rows_are_the_only_ones_scored(finished, mini, mini_tools, forwards, tmp_path):
    from siftline.assets.shared import build, score

    root = mini_tools.copy_root(finished.root, tmp_path / "root")
    with (root / "inputs" / "mini" / "pool.jsonl").open("a", encoding="utf-8") as file:
        for i in range(5):
            row = {"question": f"Which number is {i} plus 40?", "response": f"#### {40 + i}"}
            file.write(json.dumps({**row, "answer": str(40 + i), "source": "new"}) + "\n")
    workspace, recipe = Workspace(root), mini()
    old = build(workspace, recipe, "mini_test", quiet).version
    pool = build(workspace, recipe, "mini", quiet)
    manifest, fresh = score(workspace, recipe, quiet)
    assert fresh
    # Each row once with its prompt; the responses alone differ too, all of one shape.
    assert forwards == {"inspect": manifest.info["computed"]} == {"inspect": 10}
    assert manifest.info["scored"] == pool.manifest.rows("rows")
    assert Pool(root / "pool" / "mini_test").version == old


# ---- killed runs -----------------------------------------------------------------------------

KILLED = """
import os, sys, time
from pathlib import Path
import siftline.stages.models as models
from siftline.assets.shared import score
from siftline.recipe.parse import find
from siftline.scoring.engines.transformers_engine import TransformersEngine
from siftline.workspace import Workspace

root, log, rounds = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
real = TransformersEngine._inspect
out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def counted(self, tokens, spans, wanted):
    os.write(out, f"{len(tokens):5}\\n".encode())  # before the pass: a killed one counts
    time.sleep(0.02)
    return real(self, tokens, spans, wanted)

TransformersEngine._inspect = counted
workspace, recipe = Workspace(root), find("mini", ["models.tiny.batch_tokens=800"])

def passes():
    return os.path.getsize(log) // 6

for wanted in map(int, rounds):
    child = os.fork()
    if not child:
        score(workspace, recipe, lambda line: None)
        os._exit(0)
    start = time.monotonic()
    while passes() < wanted and os.waitpid(child, os.WNOHANG) == (0, 0):
        assert time.monotonic() - start < 120
        time.sleep(0.001)
    os.kill(child, 9)
    os.waitpid(child, 0)
manifest, fresh = score(workspace, recipe, lambda line: None)
print(manifest.info["computed"], manifest.info["found"], manifest.version)
"""
"""Scores the pool again and again, killed after so many passes, then once to the end."""


def test_killed_scoring_repeats_at_most_a_batch(finished, mini, mini_tools, tmp_path):
    root = mini_tools.copy_root(finished.root, tmp_path / "root", *MADE, "pool")
    dice, kills = random.Random(5), []
    for _ in range(5):
        kills.append((kills[-1] if kills else 15) + dice.randint(5, 20))
    log = tmp_path / "passes"
    said = subprocess.run(
        [sys.executable, "-c", KILLED, str(root), str(log), *map(str, kills)],
        env=mini_tools.mini_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    computed, found, version = said.stdout.split()
    passes = [int(line) for line in log.read_text().split()]
    assert len(passes) > kills[-1] > 20
    asked = int(computed) + int(found)
    assert int(found) > 0
    assert int(computed) > 0
    # A kill repeats the batch it hit and no more: five kills, five batches.
    assert asked <= sum(passes) <= asked + 5 * max(passes)
    # The same bits as without a kill: resumed batches are the planned ones.
    from siftline.assets.shared import score

    calm = mini_tools.copy_root(finished.root, tmp_path / "calm", *MADE, "pool")
    manifest, _ = score(Workspace(calm), mini("models.tiny.batch_tokens=800"), quiet)
    assert manifest.version == version


def table_of(root):
    """Manifest of the score table of a root."""
    path = root / "scores" / "mini" / "tiny" / "likelihood" / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else None


def descendants(pid):
    """Process ids below a process, by /proc."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(after[1]), []).append(int(stat.parent.name))
    found, open_ = [], [pid]
    while open_:
        here = children.get(open_.pop(), [])
        found += here
        open_ += here
    return found


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_killed_run_leaves_no_process_and_blocks_nobody(finished, mini_tools, tmp_path):
    root = mini_tools.copy_root(finished.root, tmp_path / "root", *MADE, "pool")
    command = ["run", "mini", "--root", str(root), "--set", "models.tiny.batch_tokens=400"]
    command += ["--select", "scores/mini/tiny/likelihood"]
    run = subprocess.Popen(
        [sys.executable, "-m", "siftline.cli", *command],
        env=mini_tools.mini_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not any(p.stat().st_size for p in root.glob("store/likelihood-*/journals/*")):
            assert run.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        below = descendants(run.pid)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert below
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in below):
        assert time.monotonic() < deadline, [p for p in below if alive(p)]
        time.sleep(0.1)
    assert table_of(root) is None, "the kill came too late to test anything"
    # It held the slot of pool gpu; without care the next run would wait for it for good.
    again = mini_tools.siftline(*command, timeout=120)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "was killed: marked failed, its slots freed" in again.stderr
    assert table_of(root)["info"]["found"] > 0
    assert table_of(root)["info"]["scored"] == table_of(finished.root)["info"]["scored"]


# ---- rows that fail --------------------------------------------------------------------------


def test_rows_too_long_fail_go_no_further_and_are_tried_again(
    finished, mini, mini_tools, forwards, tmp_path
):
    root = mini_tools.copy_root(
        finished.root, tmp_path / "root", "inputs", "models", "pool", "store"
    )
    recipe = mini("models.tiny.max_length=150")
    ran = mini_tools.run_chain(root, recipe, until="diversity")
    (_, gate, _), (_, later, _) = ran[-2:]
    failed = gate.all_decisions().filter(pl.col("outcome") == FAILED)
    assert gate.accounting.failed == failed.height > 0
    assert set(failed["reason"].to_list()) == {"too_long"}
    assert gate.accounting.closes
    passed = set(later.all_decisions()["id"].to_list())
    assert passed == set(ids_with(gate, KEPT))
    assert passed.isdisjoint(failed["id"].to_list())
    before = mini_tools.snapshot(root / "stages")
    _, fresh = run_stage(Workspace(root), recipe, "likelihood", quiet)
    assert fresh, "an output with failed rows must be tried again"
    assert mini_tools.snapshot(root / "stages") == before  # with the same end, the same files
    assert "inspect" not in forwards  # and what was scored is not asked again

"""What runs leave behind has a bound, also where they are killed."""

import json
import os
import platform
import random
import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa

from siftline.disk import scratch_folder, sweep, unfinished
from siftline.pipelines import execute as retention
from siftline.pipelines.execute import prepare_home, tidy
from siftline.rows.shards import building
from siftline.workspace import Workspace


@dg.asset
def fine():
    return 1


@dg.asset(check_specs=[dg.AssetCheckSpec("whole", asset="once")])
def once():
    return dg.MaterializeResult(check_results=[dg.AssetCheckResult(passed=True)])


def checks(instance):
    with instance.event_log_storage.index_connection() as connection:
        told = sa.text("select count(*) from asset_check_executions")
        return connection.execute(told).scalar()


@dg.asset
def broken():
    raise ValueError("no")


@pytest.fixture
def home(tmp_path):
    return prepare_home(Workspace(tmp_path / "root"))


def shards(home):
    return {path.stem for path in (home / "history" / "runs").glob("*-*.db")}


def logs(home):
    return {path.name for path in (home / "storage").glob("*-*")}


def kept(instance):
    return {run.run_id for run in instance.get_runs()}


def test_old_runs_go_with_their_files_and_the_newest_stay(home, monkeypatch):
    monkeypatch.setattr(retention, "KEPT_ENDED", 2)
    monkeypatch.setattr(retention, "KEPT_BROKEN", 1)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        first = dg.materialize([once], instance=instance).run_id
        made = [dg.materialize([fine], instance=instance).run_id for _ in range(4)]
        failed = [
            dg.materialize([broken], instance=instance, raise_on_error=False).run_id
            for _ in range(3)
        ]
        for run in (first, *made, *failed):
            (home / "storage" / run).mkdir(parents=True, exist_ok=True)
        events = instance.event_log_storage.get_asset_records([dg.AssetKey("once")])
        said = []
        tidy(Workspace(home.parent), instance, said.append)
        # The first run made what `once` shows now.
        left = {first, *made[-2:], failed[-1]}
        assert kept(instance) == shards(home) == left
        assert logs(home) == left
        assert said == ["Dagster's records of 4 old runs were deleted (see docs/integrity.md)"]
        again = instance.event_log_storage.get_asset_records([dg.AssetKey("once")])
        assert again[0].asset_entry == events[0].asset_entry
        assert instance.get_latest_materialization_event(dg.AssetKey("fine")).run_id == made[-1]
        assert retention.forget_runs(instance, home) == []


def test_a_run_that_goes_on_stays_and_files_of_no_run_go(home, monkeypatch):
    monkeypatch.setattr(retention, "KEPT_ENDED", 0)
    monkeypatch.setattr(retention, "KEPT_BROKEN", 0)
    nobody = "01234567-89ab-cdef-0123-456789abcdef"
    with dg.DagsterInstance.from_config(str(home)) as instance:
        run = dg.materialize([broken], instance=instance, raise_on_error=False).run_id
        job = dg.Definitions([fine]).resolve_implicit_global_asset_job_def()
        going = instance.create_run_for_job(job)
        for name in (nobody, going.run_id):
            (home / "storage" / name).mkdir(parents=True)
            os.utime(home / "storage" / name, (0, 0))
        recent = home / "history" / "runs" / f"{nobody[:-1]}0.db"
        recent.touch()
        assert retention.forget_runs(instance, home) == [run]
        assert kept(instance) == {going.run_id}
        assert logs(home) == {going.run_id}
        assert recent.exists()


def test_of_checks_the_last_word_stays(home, monkeypatch):
    monkeypatch.setattr(retention, "KEPT_ENDED", 1)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        for _ in range(3):
            last = dg.materialize([once], instance=instance).run_id
        assert checks(instance) == 3
        monkeypatch.setattr(retention, "_shown", lambda instance: set())
        assert len(retention.forget_runs(instance, home)) == 2
        assert checks(instance) == 1
        monkeypatch.setattr(retention, "KEPT_ENDED", 0)
        assert retention.forget_runs(instance, home) == [last]
        assert checks(instance) == 1


def test_a_run_that_was_killed_before_its_first_step_is_buried(home):
    from siftline.pipelines.execute import BORN_TAG, HOST_TAG, PID_TAG, bury_dead_runs

    child = subprocess.Popen(["true"])
    child.wait()
    tags = {HOST_TAG: platform.node(), PID_TAG: str(child.pid), BORN_TAG: "1"}
    job = dg.Definitions([fine]).resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.from_config(str(home)) as instance:
        dead = instance.create_run_for_job(job, tags=tags).run_id
        other = instance.create_run_for_job(job).run_id
        assert bury_dead_runs(instance) == [dead]
        assert instance.get_run_by_id(dead).is_failure
        assert not instance.get_run_by_id(other).is_finished


def test_what_killed_processes_were_writing_goes_and_nothing_else(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    node, dead = platform.node(), child.pid
    left = [
        f".a.parquet.{node}.{dead}",
        f".decisions-3-.{node}.{dead}.parquet",
        f"..decisions-3-.{node}.{dead}.parquet.{node}.{dead}",
        f".latest.{node}.{dead}",
        f".publish.{node}.{dead}.0123",
    ]
    stay = [
        ".lock",
        "a.parquet",
        f"a.{node}.{dead}",
        f".a.other.{dead}",
        unfinished("mine"),
        ".b.7",
    ]
    for folder in (tmp_path, tmp_path / "deep" / "er"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*left, *stay):
            (folder / name).write_text("x")
    model = tmp_path / f".model.{node}.{dead}"
    (model / "inner").mkdir(parents=True)
    (model / "inner" / f".x.{node}.{dead}").write_text("x")
    assert sweep(tmp_path) == 2 * len(left) + 1
    for folder in (tmp_path, tmp_path / "deep" / "er"):
        assert {path.name for path in folder.iterdir() if path.is_file()} == set(stay)
    with building(tmp_path / "made") as folder, scratch_folder(tmp_path, "s"):
        (folder / "x").write_text("x")
        assert sweep(tmp_path) == 0


KILLED = """
import json, os, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[4])
import chaos_hook
import siftline.pipelines.compose, siftline.stages.publish, siftline.stages.reporting
from siftline.recipe.parse import find
from siftline.pipelines.execute import run_recipe
from siftline.workspace import Workspace

root, kills, count = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])

def size(path):
    found = [p.lstat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink()]
    return [sum(found), len(found)]

for at in kills:
    child = os.fork()
    if not child:
        os.setsid()
        count.unlink(missing_ok=True)
        chaos_hook.arm({"root": str(root), "at": at, "act": "kill", "keep": 0, "count": str(count)})
        try:
            run_recipe(Workspace(root), find("mini", ()), (), lambda line: None)
        finally:
            os._exit(0)
    killed = os.waitpid(child, 0)[1] == 9
    print(json.dumps([killed, *size(root / ".dagster"), *size(root)]), flush=True)
"""
"""Runs a recipe that is done already, killed at the given event; sizes after each."""


@pytest.mark.slow
def test_fifty_killed_runs_leave_a_root_of_bounded_size(finished, mini_tools, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(finished.root, root, symlinks=True)
    for name in ("stages", "reports"):  # something to do again, without a model
        shutil.rmtree(root / name)
    dice = random.Random(17)
    kills = [dice.randint(5, 400) for _ in range(50)]
    places = [str(Path(__file__).parents[1])]
    arguments = [root, json.dumps(kills), tmp_path / "count", json.dumps(places)]
    said = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        env=mini_tools.mini_environment(), capture_output=True, text=True, timeout=1500,
        check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr[-3000:]
    found = [json.loads(line) for line in said.stdout.splitlines()]
    for at in (0, 9, 19, 29, 39, 49):
        print(f"after {at + 1} runs: killed, bytes and files of .dagster, of the root: {found[at]}")
    assert sum(killed for killed, *_ in found) > 40
    # As many are kept as ever will be from the twentieth on.
    for place in (1, 2, 3, 4):
        early, late = (max(line[place] for line in found[a:b]) for a, b in ((15, 30), (35, 50)))
        assert late < 1.1 * early

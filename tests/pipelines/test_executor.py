"""The executor: light steps in the run's process, those that ask a model in their own."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest
from dagster._core.definitions.reconstruct import build_reconstructable_job

from siftline.pipelines import execute, executor
from siftline.pipelines.execute import instance_settings, run_recipe
from siftline.recipe.parse import parse
from siftline.workspace import Workspace

HERE = Path(__file__).parent


@pytest.fixture
def instance(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copyfile(instance_settings(), home / "dagster.yaml")
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    # No test here needs a model's libraries.
    monkeypatch.setattr(executor, "PRELOADED", ("dagster._core.executor.multiprocess",))
    for name in executor.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with dg.DagsterInstance.get() as made:
        yield made


def run(instance, root, make="make_job", **given):
    job = build_reconstructable_job(
        "executor_assets", make, (), reconstructor_working_directory=str(HERE)
    )
    config = {
        "resources": {"siftline": {"config": {"root": str(root), **given}}},
        "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
    }
    return dg.execute_job(job, instance=instance, run_config=config, raise_on_error=False)


def pids(root):
    """Process by step, and what each saw of the environment."""
    lines = [line.split() for line in (root / "pids").read_text().splitlines()]
    (root / "pids").unlink()
    assert {offline for *_, offline in lines} == {"1"}
    return {name: int(pid) for name, pid, _ in lines}


def types(instance, result):
    return [
        (r.event_log_entry.dagster_event.event_type_value, r.event_log_entry.dagster_event.step_key)
        for r in instance.get_records_for_run(result.run_id).records
        if r.event_log_entry.dagster_event
    ]


def test_only_a_step_that_asks_gets_a_process(instance, tmp_path):
    result = run(instance, tmp_path)
    assert result.success
    ran = pids(tmp_path)
    assert ran["first"] == ran["last"] == os.getpid() != ran["asked"]
    assert [s for t, s in types(instance, result) if t == "STEP_WORKER_STARTED"] == ["asked"]
    # What it would ask is there now: the same step, in this process.
    again = run(instance, tmp_path)
    assert again.success
    assert set(pids(tmp_path).values()) == {os.getpid()}
    assert "STEP_WORKER_STARTED" not in {t for t, _ in types(instance, again)}
    assert instance.event_log_storage.get_concurrency_info("gpu").claimed_slots == []


def test_a_slot_is_taken_by_a_step_that_asks_and_waited_for(instance, tmp_path):
    storage = instance.event_log_storage
    storage.initialize_concurrency_limit_to_default("gpu")
    other = instance.create_run_for_job(dg.job(name="other")(lambda: None))
    assert storage.claim_concurrency_slot("gpu", other.run_id, "theirs").is_claimed
    (tmp_path / "answer").touch()
    assert run(instance, tmp_path).success  # asks nothing, so it waits for nobody
    (tmp_path / "answer").unlink()
    (tmp_path / "pids").unlink()
    waiting = threading.Event()

    def free():
        while not (tmp_path / "pids").exists():
            time.sleep(0.05)
        time.sleep(2)
        waiting.set()
        storage.free_concurrency_slots_for_run(other.run_id)

    threading.Thread(target=free, daemon=True).start()
    result = run(instance, tmp_path)
    assert result.success
    assert waiting.is_set()
    records = instance.get_records_for_run(result.run_id).records
    events = [e for r in records if (e := r.event_log_entry.dagster_event)]
    blocked = [e for e in events if "blocked by limit for pool gpu" in (e.message or "")]
    assert [e.step_key for e in blocked] == ["asked"]
    assert storage.get_concurrency_info("gpu").claimed_slots == []


def test_a_crashed_step_fails_its_run_and_gives_its_slot_back(instance, tmp_path):
    result = run(instance, tmp_path, crash=True)
    assert not result.success
    seen = types(instance, result)
    assert ("STEP_FAILURE", "asked") in seen
    assert ("STEP_START", "last") not in seen
    records = instance.get_records_for_run(result.run_id).records
    said = " ".join(r.event_log_entry.dagster_event.message or "" for r in records
                    if r.event_log_entry.dagster_event)  # fmt: skip
    assert "process of step asked unexpectedly exited with code 3" in said
    assert instance.event_log_storage.get_concurrency_info("gpu").claimed_slots == []


def test_a_failure_stops_what_hangs_on_it_and_nothing_else(instance, tmp_path):
    result = run(instance, tmp_path, "make_broken")
    assert not result.success
    seen = types(instance, result)
    assert ("STEP_FAILURE", "beside") in seen
    assert {s for t, s in seen if t == "STEP_SUCCESS"} == {"first", "asked", "last"}


DRIVER = """
import sys
from pathlib import Path
import dagster as dg
from siftline.pipelines import execute, executor
executor.PRELOADED = ("dagster._core.executor.multiprocess",)
sys.path.insert(0, sys.argv[1])
import test_executor
with dg.DagsterInstance.get() as instance:
    result = test_executor.run(instance, Path(sys.argv[2]), slow=True)
    print(instance.get_run_by_id(result.run_id).status.value)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_ends_takes_its_processes_along(instance, tmp_path, how):
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(HERE), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not ((file := tmp_path / "pids").exists() and "asked" in file.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = pids(tmp_path)["asked"]
    process.send_signal(how)
    out, _ = process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if how == signal.SIGINT:
        assert out.strip() == "FAILURE"
        assert instance.event_log_storage.get_concurrency_info("gpu").claimed_slots == []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_script_that_begins_a_run_anew_in_its_own_steps_is_told(tmp_path, monkeypatch):
    """A step process imports the script that began the run, and would begin another."""
    recipe = SimpleNamespace(name="mine")
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(ValueError, match=r'mine .* put the call there under `if __name__ == "__m'):
        run_recipe(Workspace(tmp_path), recipe, (), say=print)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("select", ["inputs/mini or models/tiny", "key:(", 'key:"no/such"'])
def test_a_selection_that_names_nothing_is_one_line(select):
    recipe = parse(
        {
            "name": "mine",
            "pool": {"name": "rows", "inputs": [{"path": "rows.jsonl"}]},
            "models": {"base": {"path": "model"}},
            "stages": ["duplicates"],
            "budget": {"unit": "rows", "size": 4},
        }
    )
    with pytest.raises(ValueError, match=r"--select .*(name assets as in key|names no asset)"):
        execute._keys(recipe, select)
    assert [str(key) for key in execute._keys(recipe, 'key:"mine/duplicates"')] == [
        "AssetKey(['mine', 'duplicates'])"
    ]

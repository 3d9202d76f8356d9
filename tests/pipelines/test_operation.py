"""What people who operate a recipe meet: files that come and go, runs cancelled, two at a time."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import dagster as dg
import fsspec
import polars as pl
import pytest
import yaml
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.execution.api import create_execution_plan
from dagster._core.launcher import WorkerStatus
from dagster._core.loader import LoadingContextForTest
from dagster._utils.tags import TagConcurrencyLimitsCounter

from siftline.assets.metadata import check_results
from siftline.assets.shared import observe_files
from siftline.assets.step import OWNER, recipes_of
from siftline.pipelines import compose as jobs
from siftline.pipelines.compose import FILES_TAG, new_files_sensor, recipe_job
from siftline.pipelines.execute import instance_settings, prepare_home
from siftline.pipelines.launching import BORN_TAG, HOST_TAG, PID_TAG, own_tags
from siftline.recipe.parse import parse
from siftline.recipe.sections import Bounds
from siftline.rows.ledger import Accounting
from siftline.workspace import Workspace

RUNS = dg.DagsterRunStatus


def small(inputs="rows/*.jsonl", **more):
    """A recipe of one light stage; no model is asked."""
    return parse(
        {
            "name": "small",
            "pool": {"name": "small_rows", "buckets": 1, "inputs": [{"path": str(inputs)}]},
            "models": {"base": {"path": "model"}},
            "stages": ["duplicates"],
            "budget": {"unit": "rows", "size": 4},
            **more,
        }
    )


def write_rows(path, numbers):
    """Questions that resemble each other in nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    words = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa",
             "lambda", "mu")  # fmt: skip
    rows = [
        {"question": f"{words[n % 12]} {n} asks {words[-n % 12]}?", "response": f"{n * n} it is"}
        for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as made:
        yield made


class Looking:
    """A sensor that is asked again and again, and the daemon's part: runs come of its requests."""

    def __init__(self, recipe, instance, monkeypatch):
        self.sensor = new_files_sensor(recipe, recipe_job(recipe))
        self.instance, self.cursor, self.now = instance, None, 1_800_000_000.0
        monkeypatch.setattr(jobs.time, "time", lambda: self.now)

    def look(self, later=60.0):
        """The request, or the reason why there is none."""
        self.now += later
        with dg.build_sensor_context(instance=self.instance, cursor=self.cursor) as context:
            said = self.sensor(context)
            self.cursor = context.cursor
        return said if isinstance(said, dg.RunRequest) else said.skip_message

    def begin(self, request, status=RUNS.STARTED):
        """A run of a request; Dagster begins none whose key it knows."""
        assert isinstance(request, dg.RunRequest), request
        tags = {**request.tags, "dagster/run_key": request.run_key}
        keys = {run.tags["dagster/run_key"] for run in self.instance.get_runs()}
        assert request.run_key not in keys, "it would be skipped for ever"
        job = dg.job(name="small")(lambda: None)
        return self.instance.create_run_for_job(job, tags=tags, status=status)

    def end(self, run, status=RUNS.SUCCESS):
        events = {RUNS.SUCCESS: dg.DagsterEventType.PIPELINE_SUCCESS,
                  RUNS.FAILURE: dg.DagsterEventType.PIPELINE_FAILURE,
                  RUNS.CANCELED: dg.DagsterEventType.PIPELINE_CANCELED}  # fmt: skip
        event = dg.DagsterEvent(events[status].value, "small")
        self.instance.report_dagster_event(event, run.run_id)
        assert self.instance.get_run_by_id(run.run_id).status == status


@pytest.fixture
def looking(tmp_path, instance, monkeypatch):
    monkeypatch.setenv("SIFTLINE_ROOT", str(tmp_path / "root"))
    return lambda recipe: Looking(recipe, instance, monkeypatch)


def test_a_file_that_goes_and_one_that_comes_back_are_runs(tmp_path, looking):
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", range(3))
    seen = looking(small(tmp_path / "*.jsonl"))
    seen.end(seen.begin(seen.look()))
    assert seen.look() == "no input file changed"
    stat = os.stat(tmp_path / "b.jsonl")
    text = (tmp_path / "b.jsonl").read_text()
    for _ in range(2):  # the same two states, over and over
        (tmp_path / "b.jsonl").unlink()
        seen.end(seen.begin(seen.look()))
        assert seen.look() == "no input file changed"
        (tmp_path / "b.jsonl").write_text(text)
        os.utime(tmp_path / "b.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        seen.end(seen.begin(seen.look()))
        assert seen.look() == "no input file changed"


def test_a_state_is_done_when_its_run_succeeded(tmp_path, looking):
    write_rows(tmp_path / "a.jsonl", range(3))
    seen = looking(small(tmp_path / "*.jsonl"))
    run = seen.begin(seen.look())
    assert "under way" in seen.look()
    seen.end(run, RUNS.FAILURE)
    again = seen.begin(seen.look())
    seen.end(again, RUNS.FAILURE)
    waits = 0  # the pauses double, and end with an hour
    for pause in (2, 4, 8, 16, 32, 60, 60):
        while isinstance(said := seen.look(), str):
            assert "failed: again in" in said
            waits += 1
        assert waits <= pause
        seen.end(seen.begin(said), RUNS.FAILURE)
        waits = 0
    while isinstance(said := seen.look(), str):
        pass
    run = seen.begin(said)
    seen.end(run)
    assert seen.look() == "no input file changed"
    seen.instance.delete_run(run.run_id)  # as old runs are
    assert seen.look(later=86400) == "no input file changed"


def test_a_new_state_is_asked_for_at_once_whatever_became_of_the_old_one(tmp_path, looking):
    write_rows(tmp_path / "a.jsonl", range(3))
    seen = looking(small(tmp_path / "*.jsonl"))
    seen.begin(seen.look())  # under way, and it may have read the files
    write_rows(tmp_path / "a.jsonl", range(4))
    waiting = seen.begin(seen.look(), RUNS.NOT_STARTED)
    write_rows(tmp_path / "a.jsonl", range(5))  # one that waits reads them as they are
    assert "has not begun" in seen.look()
    seen.end(waiting, RUNS.FAILURE)
    broken = seen.begin(seen.look())
    seen.end(broken, RUNS.CANCELED)
    assert "was cancelled: again in" in seen.look()
    write_rows(tmp_path / "a.jsonl", range(6))
    assert isinstance(seen.look(), dg.RunRequest)


def test_a_request_that_became_no_run_is_made_again(tmp_path, looking):
    write_rows(tmp_path / "a.jsonl", range(3))
    seen = looking(small(tmp_path / "*.jsonl"))
    first = seen.look()
    assert isinstance(seen.look(), str)
    assert seen.look(later=jobs.UNRECORDED_SECONDS).run_key != first.run_key


def test_a_source_that_is_gone_is_a_run_and_sets_are_looked_at(tmp_path, looking):
    write_rows(tmp_path / "a.jsonl", range(3))
    write_rows(tmp_path / "test.jsonl", range(5, 8))
    tests = [{"name": "t", "buckets": 1, "inputs": [{"path": str(tmp_path / "test.jsonl")}]}]
    seen = looking(small(tmp_path / "a.jsonl", sets={"test": tests}))
    seen.end(seen.begin(seen.look()))
    write_rows(tmp_path / "test.jsonl", range(5, 9))
    seen.end(seen.begin(seen.look()))
    (tmp_path / "a.jsonl").unlink()  # a takedown of everything there is: the run says so
    seen.end(seen.begin(seen.look()), RUNS.FAILURE)
    never = looking(small(tmp_path / "not_there.jsonl"))
    assert "not there yet" in never.look()


def test_files_of_an_object_store_are_seen_anew(looking):
    fs = fsspec.filesystem("memory")
    fs.pipe("/siftline_sensor/a.jsonl", b"{}\n")
    try:
        seen = looking(small("memory://siftline_sensor/*.jsonl"))
        seen.end(seen.begin(seen.look()))
        assert seen.look() == "no input file changed"
        fs.pipe("/siftline_sensor/b.jsonl", b"{}\n")
        seen.end(seen.begin(seen.look()))
        fs.rm("/siftline_sensor/b.jsonl")
        assert isinstance(seen.look(), dg.RunRequest)
    finally:
        fs.rm("/siftline_sensor", recursive=True)


class Remembering(fsspec.AbstractFileSystem):
    """A store that keeps listings, as s3fs does, and names paths without its protocol."""

    protocol = "kept"
    files: ClassVar[dict[str, dict]] = {}

    def _listing(self):
        if "all" not in self.dircache:
            self.dircache["all"] = {k: dict(v) for k, v in self.files.items()}
        return self.dircache["all"]

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        found = [{"name": k, "type": "file", **v} for k, v in self._listing().items()
                 if k == path or k.startswith(f"{path}/")]  # fmt: skip
        if not found:
            raise FileNotFoundError(path)
        return found if detail else [line["name"] for line in found]

    def invalidate_cache(self, path=None):
        self.dircache.clear()


def test_kept_listings_do_not_hide_a_change_and_an_etag_counts(looking):
    fsspec.register_implementation("kept", Remembering, clobber=True)
    Remembering.files = {"bucket/in/a.jsonl": {"size": 3, "ETag": "1"}}
    seen = looking(small("kept://bucket/in/*.jsonl"))
    seen.end(seen.begin(seen.look()))
    assert seen.look() == "no input file changed"
    Remembering.files = {"bucket/in/a.jsonl": {"size": 3, "ETag": "2"}}  # as large as before
    seen.end(seen.begin(seen.look()))
    Remembering.files = {**Remembering.files, "bucket/in/b.jsonl": {"size": 3, "ETag": "3"}}
    seen.end(seen.begin(seen.look()))
    Remembering.files.pop("bucket/in/a.jsonl")
    assert isinstance(seen.look(), dg.RunRequest)


def test_the_tag_names_the_request(tmp_path, looking):
    write_rows(tmp_path / "a.jsonl", range(3))
    request = looking(small(tmp_path / "*.jsonl")).look()
    assert request.tags == {FILES_TAG: request.run_key}
    assert Path(tmp_path / "a.jsonl").exists()


def test_a_root_at_an_address_is_refused_in_one_line(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from siftline.assets.step import Siftline
    from siftline.cli.recipes import run

    monkeypatch.chdir(tmp_path)
    for address in ("s3://bucket/data", "gs://bucket", "hf://datasets/x/y", "s3:/bucket"):
        said = CliRunner().invoke(run, ["small", "--root", address])
        assert said.exit_code != 0
        assert address.replace("//", "/").replace(":/", "://") in str(said.exception or said.output)
        with pytest.raises(ValueError, match="a folder of this machine"):
            _ = Siftline(root=address).workspace
        monkeypatch.setenv("SIFTLINE_ROOT", address)
        with pytest.raises(ValueError, match="a folder of this machine"):
            Workspace.from_environment()
        monkeypatch.delenv("SIFTLINE_ROOT")
    assert list(tmp_path.iterdir()) == []
    assert Workspace(tmp_path / "a: b" / "c").root.name == "c"


# ---- checks ------------------------------------------------------------------------------------


def verdicts(counts, role="gate", **bounds):
    decided = pl.DataFrame({"outcome": ["failed"] * counts.failed, "reason": "too_long"})
    output = SimpleNamespace(accounting=counts, all_decisions=lambda: decided)
    stage = SimpleNamespace(of=SimpleNamespace(role=role))
    key = dg.AssetKey(["small", "duplicates"])
    return {c.check_name: c for c in check_results(key, stage, output, Bounds(**bounds))}


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize(
    ("failed", "removed"), [(0, 0), (2, 0), (40, 0), (0, 30), (2, 30), (40, 30), (0, 98)]
)
def test_a_check_says_what_it_found_and_only_a_red_one_what_to_do(failed, removed, lost):
    counts = Accounting(100, 0, 100 - removed - failed - lost, removed, failed)
    found = verdicts(counts, max_failed=0.05, max_removed=0.9)
    expected = {"accounting": not lost, "failed_rows": failed <= 5, "removed_rows": removed <= 90}
    assert {name: check.passed for name, check in found.items()} == expected
    remedies = {"accounting": "run it again", "failed_rows": "raise the bound",
                "removed_rows": "loosen the gate"}  # fmt: skip
    for name, check in found.items():
        said = check.metadata["said"].value
        assert check.description == said
        assert (remedies[name] in said) != check.passed
        assert ("report" in said) == (name == "accounting" and not check.passed)
        plotted = {k: v.value for k, v in check.metadata.items() if k != "said"}
        assert plotted
        assert all(isinstance(v, int | float) for v in plotted.values()), plotted
    assert found["failed_rows"].metadata["share"].value == failed / 100
    assert ("too_long" in found["failed_rows"].metadata["said"].value) == bool(failed)
    assert f"{removed} of 100 rows removed" in found["removed_rows"].metadata["said"].value


# ---- runs: one of a recipe at a time, and cancelled ones stop ---------------------------------

FIRST = """
import sys, time
from pathlib import Path
from siftline.recipe.parse import find
from siftline.workspace import Workspace
import siftline.assets.outcome as outcome
from siftline.pipelines import execute
was = outcome.publish_curated
def slow(workspace, recipe, confirm):
    Path(sys.argv[1], "publishing").touch()
    def waits():
        while Path(sys.argv[1], "hold").exists():
            time.sleep(0.05)
        confirm()
    return was(workspace, recipe, waits)
outcome.publish_curated = slow
say = lambda line: print(line, flush=True)
ended = execute.run_recipe(Workspace(Path(sys.argv[1])), find("small"), (), say)
print("ended", ended.success, ended.error)
"""
"""A run that waits before it publishes as long as a file is there."""


@pytest.fixture
def root(tmp_path, monkeypatch, mini_tools):
    """A root whose recipe `small` can be run by name, in this process and in others."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    write_rows(tmp_path / "rows" / "a.jsonl", range(8))
    (recipes / "small.yaml").write_text(SMALL.format(folder=tmp_path))
    folder = tmp_path / "root"
    folder.mkdir()
    for name, value in (("SIFTLINE_RECIPES", recipes), ("SIFTLINE_ROOT", folder),
                        ("DAGSTER_HOME", folder / ".dagster")):  # fmt: skip
        monkeypatch.setenv(name, str(value))
    return folder


SMALL = """
name: small
pool: {{name: small_rows, buckets: 1, inputs: [{{path: "{folder}/rows/*.jsonl"}}]}}
models: {{base: {{path: model}}}}
stages: [duplicates]
budget: {{unit: rows, size: 4}}
"""


def begin(root, hold=True):
    (root / "hold").touch() if hold else (root / "hold").unlink(missing_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", FIRST, str(root)], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_until(true, process):
    deadline = time.monotonic() + 300
    while not true():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True])
def test_a_cancelled_run_ends_and_publishes_nothing(root, force):
    process = begin(root)
    wait_until((root / "publishing").exists, process)
    with dg.DagsterInstance.get() as instance:
        (run,) = instance.get_runs()
        assert run.tags[OWNER] == "small"
        if force:
            instance.report_run_canceled(run)
        else:  # what the button does
            assert instance.run_coordinator.cancel_run(run.run_id)
        out, _ = process.communicate(timeout=60)
        assert f"ended False run {run.run_id[:8]} was cancelled" in out
        assert instance.get_run_by_id(run.run_id).status == RUNS.CANCELED
        assert not list(root.glob("curated/small/*"))
        if force:
            return
        # A second run goes on from there; the lock, and the place in the queue, are free.
        again = begin(root, hold=False)
        out, _ = again.communicate(timeout=120)
        assert "waits" not in out
        assert [path.name for path in root.glob("curated/small/latest")] == ["latest"]


def test_a_run_cancelled_at_the_last_moment_publishes_nothing(root):
    """Between the last look and the publication; nothing interrupts it there."""
    from siftline.assets.step import stop_if_cancelled
    from siftline.ingest.pool import build_pool
    from siftline.recipe.parse import expand_pool, find
    from siftline.stages.publish import publish_curated
    from siftline.stages.run import run_stage

    workspace, recipe = Workspace(root), find("small")
    build_pool(workspace.pool("small_rows"), expand_pool(recipe.pool, root), lambda rows: None)
    run_stage(workspace, recipe, "duplicates", lambda line: None)
    with dg.DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(dg.job(name="small")(lambda: None), status=RUNS.STARTED)
        confirm = partial(stop_if_cancelled, instance, run.run_id)
        instance.report_run_canceling(run)
        with pytest.raises(dg.DagsterExecutionInterruptedError, match="was cancelled"):
            publish_curated(workspace, recipe, confirm)
    assert not list(root.glob("curated/small/*"))
    publish_curated(workspace, recipe)
    assert list(root.glob("curated/small/latest"))


@pytest.mark.slow
def test_a_second_run_waits_and_says_for_whom(root):
    first = begin(root)
    wait_until((root / "publishing").exists, first)
    second = begin(root)
    lines = []
    while "waits for" not in (line := second.stdout.readline()):
        assert line, lines
        lines.append(line)
    with dg.DagsterInstance.get() as instance:
        (run,) = instance.get_runs()  # and has begun nothing
    assert f"waits for run {run.run_id[:8]} (process {first.pid}): one run of recipe small" in line
    (root / "hold").unlink()
    for process in (first, second):
        out, _ = process.communicate(timeout=120)
        assert "ended True" in out


def test_the_queue_holds_a_second_run_of_a_recipe_back(instance):
    """The shipped settings: one run of a recipe, and others beside it."""
    settings = yaml.safe_load(instance_settings().read_text())
    limits = settings["concurrency"]["runs"]["tag_concurrency_limits"]
    job = dg.job(name="x")(lambda: None)
    going = [instance.create_run_for_job(job, tags={OWNER: "small"}, status=RUNS.STARTED)]
    counter = TagConcurrencyLimitsCounter(limits, going)
    other = [instance.create_run_for_job(job, tags={OWNER: name}) for name in ("small", "other")]
    assert [counter.is_blocked(run) for run in other] == [True, False]


def test_a_run_on_chosen_assets_counts_as_one_of_its_recipe():
    keys = [dg.AssetKey(["small", "duplicates"]), dg.AssetKey(["pool", "small_rows"])]
    assert recipes_of(keys) == ["small"]
    assert recipes_of(keys[1:]) == []
    job = recipe_job(small())
    assert job.tags[OWNER] == "small"
    tags = {key.path[-1]: step_tags(key) for key in keys[:1]}
    assert tags == {"duplicates": "small"}


def step_tags(key):
    from siftline.pipelines.compose import compose

    graph = compose([small()]).resolve_asset_graph()
    return graph.get(key).assets_def.get_op_def_for_asset_key(key).tags[OWNER]


def test_a_killed_run_is_noticed_by_the_daemon(root):
    prepare_home(Workspace(root))
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    gone = {HOST_TAG: platform.node(), PID_TAG: str(child.pid), BORN_TAG: "1"}
    job = dg.job(name="small")(lambda: None)
    with dg.DagsterInstance.get() as instance:
        launcher = instance.run_launcher
        dead = instance.create_run_for_job(job, tags=gone, status=RUNS.STARTED)
        assert launcher.check_run_worker_health(dead).status == WorkerStatus.NOT_FOUND
        alive = instance.create_run_for_job(job, tags=own_tags(), status=RUNS.STARTED)
        assert launcher.check_run_worker_health(alive).status == WorkerStatus.RUNNING
        assert launcher.terminate(dead.run_id)
        assert instance.get_run_by_id(dead.run_id).status == RUNS.CANCELED
        assert launcher.terminate(alive.run_id)
        assert instance.get_run_by_id(alive.run_id).status == RUNS.CANCELING


def test_settings_follow_the_version_unless_somebody_edited_them(root):
    home = prepare_home(Workspace(root))
    settings, made = home / "dagster.yaml", home / ".made"
    old = "telemetry: {enabled: false}\n"
    settings.write_text(old)
    made.write_text(hashlib.sha256(old.encode()).hexdigest())  # as an earlier version copied it
    prepare_home(Workspace(root))
    assert settings.read_bytes() == instance_settings().read_bytes()
    settings.write_text(old)
    prepare_home(Workspace(root))
    assert settings.read_text() == old


# ---- a bad recipe file -------------------------------------------------------------------------


def altered(name, was, by):
    """The small recipe under another name and with a change."""
    return SMALL.replace("name: small\n", f"name: {name}\n").replace(was, by)


BAD = {
    "typo": altered("typo", "[duplicates]", "[duplicatez]"),
    "no-yaml": "name: [",
    "no.yaml": "name: [",
    "bad_cron": altered("bad_cron", "models", 'schedule: "every day"\nmodels'),
    "bad_zone": altered(
        "bad_zone", "models", 'schedule: "CRON_TZ=Europe/Berlim 0 3 * * *"\nmodels'
    ),
    "zz_clash": altered("zz_clash", "buckets: 1", "buckets: 2"),
    "taken": altered("taken", "[duplicates]", "[duplicates: {{name: report}}]"),
}
"""Recipes that can't be used, each for another reason; the last two are found by composing."""
SAYS = {
    "typo": "did you mean 'duplicates'",
    "no-yaml": "not YAML",
    "no.yaml": "not YAML",
    "bad_cron": "'every day' is no cron time",
    "bad_zone": "did you mean 'Europe/Berlin'",
    "zz_clash": "both define pool/small_rows",
    "taken": "a stage can't be called 'report'",
}


@pytest.fixture
def beside_bad_ones(root, tmp_path):
    for name, text in BAD.items():
        (tmp_path / "recipes" / f"{name}.yaml").write_text(text.format(folder=tmp_path))
    return root


def test_a_bad_recipe_takes_no_other_down(beside_bad_ones):
    from siftline.pipelines.compose import compose_all
    from siftline.recipe.parse import read_all

    defs = compose_all(*read_all())
    names = {job.name for job in defs.jobs}
    assert {"small", "demo", "typo", "no_yaml"} <= names
    assert {s.name for s in defs.schedules} >= {"small_schedule", "bad_cron_schedule"}
    assert {s.name for s in defs.sensors} >= {"small_new_files", "no_yaml_new_files"}
    graph = defs.resolve_asset_graph()
    for name, says in SAYS.items():
        key = dg.AssetKey([name, "recipe"])
        node = graph.get(key)
        assert node.group_name.rstrip("_") == name.replace("-", "_").replace(".", "_")
        assert says in node.description
        (check,) = graph.get_check_keys_for_assets({key})
        assert says in graph.get_check_spec(check).description
        job = defs.resolve_job_def(node.group_name)
        result = job.execute_in_process(raise_on_error=False)
        assert not result.success
        (verdict,) = result.get_asset_check_evaluations()
        assert not verdict.passed
        assert says in verdict.metadata["said"].value
    with pytest.raises(ValueError, match="not YAML"):
        defs.resolve_sensor_def("no_yaml_new_files")(dg.build_sensor_context())
    assert dg.AssetKey(["small", "curated"]) in graph.get_all_asset_keys()


def test_status_goes_on_beside_a_bad_recipe(beside_bad_ones):
    from click.testing import CliRunner

    from siftline.cli.recipes import status

    said = CliRunner().invoke(status, ["--root", str(beside_bad_ones)])
    assert said.exit_code == 0, said.output
    assert "recipe typo is not loaded: typo.yaml: " in said.output
    said = CliRunner().invoke(status, ["--root", str(beside_bad_ones), "--json"])
    assert SAYS["no-yaml"] in json.loads(said.stdout)["broken_recipes"]["no-yaml"]


def test_a_schedule_has_a_time_zone():
    for said, cron, zone in (
        ("0 3 * * *", "0 3 * * *", "UTC"),
        ("CRON_TZ=America/New_York 30 4 * * 1", "30 4 * * 1", "America/New_York"),
    ):
        recipe = small(schedule=said)
        made = jobs.recipe_schedule(recipe, recipe_job(recipe))
        assert (made.cron_schedule, made.execution_timezone) == (cron, zone)


# ---- trials ------------------------------------------------------------------------------------


def materialize_small(*overrides, names=("curated",)):
    """The small recipe's pool and stage and what else is asked for, with changes; metadata."""
    from siftline.pipelines.compose import compose
    from siftline.recipe.parse import find

    defs = compose([find("small")])
    keys = [dg.AssetKey(["pool", "small_rows"]), dg.AssetKey(["small", "duplicates"]),
            *(dg.AssetKey(["small", name]) for name in names)]  # fmt: skip
    job = defs.resolve_implicit_global_asset_job_def()
    config = {"resources": {"siftline": {"config": {"overrides": list(overrides)}}}}
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(
            run_config=config, asset_selection=keys, instance=instance, raise_on_error=False
        )
        assert result.success
        found = {}
        for key in keys:
            event = instance.get_latest_materialization_event(key)
            found[key.path[-1]] = event.asset_materialization
        return found


def test_a_trial_publishes_beside_latest_and_says_so(root):
    from siftline.cli.recipes import summary
    from siftline.recipe.parse import find
    from siftline.stages.publish import newest

    folder = root / "curated" / "small"
    made = materialize_small()["curated"].metadata
    assert made["is_latest"].value is True
    latest = os.readlink(folder / "latest")
    change = "stages.duplicates.threshold=0.3"
    shown = materialize_small(change, names=("curated", "report"))["curated"].metadata
    assert (shown["is_latest"].value, shown["changed_by_overrides"].value) == (False, change)
    version = shown["version"].value
    assert version != latest == os.readlink(folder / "latest")
    # What belongs to the trial finds the trial, and everybody else finds latest.
    workspace = Workspace(root)
    assert newest(workspace, find("small", [change])).name == version
    assert newest(workspace, find("small")).name == latest
    said = summary(workspace, find("small", [change]))
    assert Path(said["curated"]).name == Path(said["report"]).stem == version
    assert said["is_latest"] is False
    from siftline.stages.status import describe

    (line,) = [r for r in describe(workspace)["recipes"] if r["name"] == "small"]
    assert set(line["versions"]) == {f"small/{latest} (latest)", f"small/{version} (trial)"}
    # The same again finds it; a change that changes nothing is no trial.
    again = materialize_small(change)["curated"].metadata
    assert (again["version"].value, again["computed"].value) == (version, False)
    same = materialize_small("budget.size=4")["curated"].metadata
    assert (same["version"].value, same["is_latest"].value) == (latest, True)


def test_a_changed_recipe_is_no_trial_where_nobody_reads_another(root):
    """A shipped recipe with the user's own files, run twice on a fresh root."""
    folder = root / "curated" / "small"
    change = "stages.duplicates.threshold=0.3"
    for _ in range(2):
        made = materialize_small(change)["curated"].metadata
        assert made["is_latest"].value is True
        assert os.readlink(folder / "latest") == made["version"].value
    other = materialize_small("stages.duplicates.threshold=0.4")["curated"].metadata
    assert other["is_latest"].value is False
    assert os.readlink(folder / "latest") == made["version"].value


def test_a_recipe_that_takes_its_trial_over_ends_it(root, tmp_path):
    materialize_small()
    file = tmp_path / "recipes" / "small.yaml"
    trial = materialize_small("stages.duplicates.threshold=0.3")["curated"].metadata
    file.write_text(file.read_text().replace("[duplicates]", "[duplicates: {threshold: 0.3}]"))
    made = materialize_small()["curated"].metadata
    assert made["version"].value == trial["version"].value
    assert os.readlink(root / "curated" / "small" / "latest") == made["version"].value
    assert list((root / "curated" / "small" / ".trials").iterdir()) == []


def test_changes_for_a_recipe_are_no_trouble_for_one_it_shares_a_pool_with(root, tmp_path):
    """The pool is one asset, and it was the first recipe's."""
    from siftline.assets.step import Siftline

    other = altered("another", "[duplicates]", "[verify]")
    (tmp_path / "recipes" / "another.yaml").write_text(other.format(folder=tmp_path))
    changed = Siftline(overrides=["stages.duplicates.threshold=0.3"])
    assert changed.shared("another").name == "small"
    with pytest.raises(ValueError, match="no entry 'duplicates'"):
        changed.recipe("another")
    with pytest.raises(ValueError, match="did you mean 'duplicates'"):
        Siftline(overrides=["stages.duplicatez.threshold=0.3"]).shared("small")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("budget.sise=3", "unknown key 'sise': did you mean 'size'?"),
        ("stages.duplicatez.threshold=0.5", "no entry 'duplicatez': did you mean 'duplicates'?"),
        ("budget.size=many", "budget.size: expected int, found 'many'"),
        ("budget", "expected key=value"),
    ],
)
def test_a_typing_error_launches_nothing(root, wrong, says):
    """The plan is made before a run is: it is what the Launchpad asks for."""
    from siftline.pipelines.compose import compose
    from siftline.recipe.parse import find

    job = compose([find("small")]).resolve_job_def("small")
    config = {"resources": {"siftline": {"config": {"overrides": [wrong]}}}}
    with pytest.raises(dg.DagsterInvalidConfigError) as refused:
        create_execution_plan(job, config)
    assert says in str(refused.value)
    config["resources"]["siftline"]["config"]["overrides"] = ["budget.size=3"]
    assert create_execution_plan(job, config).step_keys_to_execute


# ---- what is stale, and what the published version shows ---------------------------------------


def test_an_edited_recipe_changes_the_code_versions_of_what_it_concerns(root, tmp_path):
    from siftline.pipelines.compose import compose
    from siftline.recipe.parse import find

    def versions():
        graph = compose([find("small")]).resolve_asset_graph()
        return {k.to_user_string(): graph.get(k).code_version for k in graph.get_all_asset_keys()}

    before = versions()
    assert all(version for name, version in before.items() if "report" not in name and
               "files" not in name), before  # fmt: skip
    file = tmp_path / "recipes" / "small.yaml"
    text = file.read_text()
    file.write_text(text.replace("[duplicates]", "[duplicates: {threshold: 0.3}]"))
    after = versions()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"small/duplicates", "small/curated"}
    file.write_text(text.replace("buckets: 1", "buckets: 2"))  # how it is cut changes no row
    assert versions() == before


def test_a_new_file_marks_what_is_read_from_it_as_stale(root, tmp_path, monkeypatch):
    from siftline.pipelines.compose import compose
    from siftline.recipe.parse import find

    recipe = find("small")
    defs = compose([recipe])
    graph = defs.resolve_asset_graph()
    source, pool = dg.AssetKey(["files", "small_rows_files"]), dg.AssetKey(["pool", "small_rows"])
    assert graph.get(source).is_observable
    assert graph.get(pool).parent_keys == {source}
    job = defs.resolve_job_def("small")
    chosen = [pool, dg.AssetKey(["small", "duplicates"])]
    assert source not in job.asset_layer.executable_asset_keys
    with dg.DagsterInstance.ephemeral() as instance:

        def stale():
            looks = LoadingContextForTest(instance)
            resolver = CachingStaleStatusResolver(instance, graph, looks)
            return resolver.get_status(pool).value

        observe_files(instance, Workspace(root), recipe, "small_rows")
        assert job.execute_in_process(instance=instance, asset_selection=chosen).success
        assert stale() == "FRESH"
        observe_files(instance, Workspace(root), recipe, "small_rows")  # the same: no new record
        assert len(instance.fetch_observations(source, limit=9).records) == 1
        write_rows(tmp_path / "rows" / "b.jsonl", range(20, 24))
        sensor = defs.resolve_sensor_def("small_new_files")
        with dg.build_sensor_context(instance=instance) as context:
            assert isinstance(sensor(context), dg.RunRequest)
        assert stale() == "STALE"
        assert job.execute_in_process(instance=instance, asset_selection=chosen).success
        assert stale() == "FRESH"


def test_the_published_version_shows_its_columns_its_parent_and_its_checks(root, tmp_path):
    from siftline.pipelines.compose import compose
    from siftline.recipe.parse import find

    job = compose([find("small")]).resolve_job_def("small")
    key = dg.AssetKey(["small", "curated"])
    page = None
    with dg.DagsterInstance.local_temp(str(root)) as instance:

        def made():
            result = job.execute_in_process(instance=instance)
            checks = [c for c in result.get_asset_check_evaluations() if c.asset_key == key]
            assert {c.check_name: c.passed for c in checks} == {"all_rows": True, "columns": True}
            event = instance.get_latest_materialization_event(key)
            return event.asset_materialization.metadata

        first = made()
        columns = {c.name: c for c in first["dagster/column_schema"].value.columns}
        assert list(columns)[:2] == ["id", "messages"]
        assert columns["sift_prompt_id"].description.startswith("hash of everything before")
        assert "parent_version" not in first
        (tmp_path / "rows" / "a.jsonl").write_text(
            "".join((tmp_path / "rows" / "a.jsonl").read_text().splitlines(keepends=True)[:-2])
        )
        write_rows(tmp_path / "rows" / "b.jsonl", range(30, 33))
        second = made()
        assert second["parent_version"].value == first["version"].value
        assert (second["rows_came"].value, second["rows_went"].value) == (3, 2)
        again = made()  # the same version: the same is shown again
        assert again["computed"].value is False
        assert again["parent_version"].value == first["version"].value
        event = instance.get_latest_materialization_event(dg.AssetKey(["small", "report"]))
        link = event.asset_materialization.metadata["report"].value
        *path, extension = link.removeprefix("/logs/").split("/")
        served = instance.compute_log_manager.get_captured_local_path(path, extension)
        page = Path(served).read_text()
    assert "<html" in page
    assert second["version"].value in page

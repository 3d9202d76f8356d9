"""What people who operate a recipe meet: files that come and go, runs cancelled, two at a time."""

import json
import os
from pathlib import Path
from typing import ClassVar

import dagster as dg
import fsspec
import pytest

from siftline.pipelines import jobs
from siftline.pipelines.jobs import FILES_TAG, new_files_sensor, recipe_job
from siftline.recipe.parse import parse

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

    from siftline.assets.resource import Siftline
    from siftline.commands.run import run
    from siftline.workspace import Workspace

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

"""What Dagster sees: assets and what they hang on, checks, metadata, schedules and sensors."""

import re
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from siftline.recipe.parse import all_recipes
from siftline.stages.run import outputs
from siftline.workspace import Workspace

REPOSITORY = Path(__file__).parents[2]
PICTURE_BYTES = 100_000
STAGES = ["duplicates", "decontamination", "verify", "likelihood", "diversity", "confidence"]
ADDED = ["duplicates_added", "decontamination_added", "likelihood_added", "confidence_added"]
DEMO = {
    "inputs/demo": [],
    "pool/demo": ["inputs/demo"],
    "pool/demo_target": ["inputs/demo"],
    "pool/demo_dev": ["inputs/demo"],
    "pool/demo_test": ["inputs/demo"],
    "models/base": ["inputs/demo"],
    "scores/demo/base/likelihood": ["models/base", "pool/demo"],
    "demo/duplicates": ["pool/demo"],
    "demo/decontamination": [
        "demo/duplicates", "pool/demo_dev", "pool/demo_target", "pool/demo_test",
    ],
    "demo/verify": ["demo/decontamination"],
    "demo/likelihood": ["demo/verify", "models/base", "scores/demo/base/likelihood"],
    "demo/diversity": ["demo/likelihood", "models/base", "scores/demo/base/likelihood"],
    "demo/confidence": ["demo/diversity", "models/base", "pool/demo_dev"],
    "demo/rejection_sampling": ["demo/confidence", "models/base"],
    "demo/duplicates_added": ["demo/rejection_sampling"],
    "demo/decontamination_added": [
        "demo/duplicates_added", "pool/demo_dev", "pool/demo_target", "pool/demo_test",
    ],
    "demo/likelihood_added": [
        "demo/decontamination_added", "models/base", "scores/demo/base/likelihood",
    ],
    "demo/confidence_added": ["demo/likelihood_added", "models/base", "pool/demo_dev"],
    "demo/allocate": ["demo/confidence_added", "models/base", "scores/demo/base/likelihood"],
    "demo/curated": ["demo/allocate"],
    "demo/model": ["demo/curated", "pool/demo", "pool/demo_dev"],
    "demo/evaluation": ["demo/model", "pool/demo_test"],
    "demo/report": ["demo/evaluation"],
}  # fmt: skip
"""The demo's assets and what each depends on: a change here shows in every user's graph."""


@pytest.fixture
def defs(mini):
    from siftline.pipelines.compose import compose

    return compose(all_recipes())


def test_assets_of_the_demo(defs):
    graph = defs.resolve_asset_graph()
    found = {
        key.to_user_string(): sorted(k.to_user_string() for k in graph.get(key).parent_keys)
        for key in defs.resolve_job_def("demo").asset_layer.executable_asset_keys
    }
    assert found == DEMO


def test_model_steps_share_the_pool_of_cards(defs):
    uses_model = re.compile(r"^(models|scores)/|/(likelihood|diversity|confidence|rejection|alloc)")
    outcome = ("demo/model", "demo/evaluation")
    graph = defs.resolve_asset_graph()
    for name in DEMO:
        key = dg.AssetKey(name.split("/"))
        wanted = "gpu" if uses_model.search(name) or name in outcome else None
        assert graph.get(key).assets_def.get_op_def_for_asset_key(key).pool == wanted, name


def test_every_stage_has_blocking_checks(defs):
    graph = defs.resolve_asset_graph()
    found = {}
    for key in graph.asset_check_keys:
        spec = graph.get_check_spec(key)
        assert spec.blocking
        found.setdefault(key.asset_key.to_user_string(), set()).add(key.name)
    for stage in (*STAGES, *ADDED, "rejection_sampling", "allocate"):
        assert found[f"demo/{stage}"] == {"accounting", "failed_rows", "removed_rows"}
    assert found["pool/demo"] == {"readable"}


def test_one_schedule_and_one_sensor_per_recipe_all_off(defs):
    names = {recipe.name for recipe in all_recipes()}
    assert {"demo", "mini"} <= names
    assert {schedule.job_name for schedule in defs.schedules} == names
    assert {sensor.job_name for sensor in defs.sensors} == names
    assert len(defs.schedules) == len(defs.sensors) == len(names)
    assert {s.default_status for s in defs.schedules} == {dg.DefaultScheduleStatus.STOPPED}
    assert {s.default_status for s in defs.sensors} == {dg.DefaultSensorStatus.STOPPED}


def test_the_sensor_asks_for_a_run_when_a_file_changes(
    defs, finished, mini_tools, monkeypatch, tmp_path
):
    root = mini_tools.copy_root(finished.root, tmp_path / "root", "inputs")
    monkeypatch.setenv("SIFTLINE_ROOT", str(root))
    sensor = defs.resolve_sensor_def("mini_new_files")

    def tick(cursor):
        with dg.build_sensor_context(cursor=cursor) as context:
            return sensor(context), context.cursor

    first, cursor = tick(None)
    assert isinstance(first, dg.RunRequest)
    again, same = tick(cursor)
    assert isinstance(again, dg.SkipReason)
    assert same == cursor
    (root / "inputs" / "mini" / "pool-more.jsonl").write_text("{}\n")
    changed, moved = tick(cursor)
    assert isinstance(changed, dg.RunRequest)
    assert changed.run_key != first.run_key
    assert moved != cursor
    monkeypatch.setenv("SIFTLINE_ROOT", str(tmp_path / "empty"))
    missing, _ = tick(moved)
    assert isinstance(missing, dg.SkipReason)
    assert "not there yet" in missing.skip_message


def materialize(recipe, root, names, *overrides):
    """Materializes assets here, on an instance that is thrown away."""
    from siftline.assets.step import Siftline
    from siftline.pipelines.compose import recipe_assets

    with dg.DagsterInstance.ephemeral() as instance:
        return dg.materialize(
            recipe_assets(recipe),
            selection=[dg.AssetKey(name.split("/")) for name in names],
            instance=instance,
            resources={"siftline": Siftline(root=str(root), overrides=list(overrides))},
            raise_on_error=False,
        )


@pytest.mark.parametrize("bound", ["bounds.max_removed=0.01", "models.tiny.max_length=150"])
def test_a_failed_check_stops_the_run(bound, mini, finished, mini_tools, tmp_path):
    root = mini_tools.copy_root(finished.root, tmp_path / "root")
    stopped = "removed" in bound
    names = ["duplicates", "decontamination"] if stopped else ["likelihood", "diversity"]
    result = materialize(mini(), root, [f"mini/{name}" for name in names], bound)
    assert not result.success
    failed = {
        (c.asset_key.path[-1], c.check_name)
        for c in result.get_asset_check_evaluations()
        if not c.passed
    }
    assert failed == {(names[0], "removed_rows" if stopped else "failed_rows")}
    # What comes after a red stage does not run.
    assert [m.asset_key.path[-1] for m in materialized(result)] == names[:1]


def materialized(result):
    return [
        e.event_specific_data.materialization for e in result.get_asset_materialization_events()
    ]


def test_accounting_that_does_not_close_is_red(mini, finished):
    from dataclasses import replace
    from types import SimpleNamespace

    from siftline.assets.metadata import check_results

    recipe = mini()
    stage, output = outputs(Workspace(finished.root), recipe)[0]
    key = dg.AssetKey(["mini", stage.name])

    def verdict(accounting):
        seen = SimpleNamespace(accounting=accounting, all_decisions=output.all_decisions)
        (first, *_) = check_results(key, stage, seen, recipe.bounds)
        assert (first.check_name, first.severity) == ("accounting", dg.AssetCheckSeverity.ERROR)
        return first.passed

    counts = output.accounting
    assert verdict(counts)
    assert not verdict(replace(counts, kept=counts.kept - 1))


@pytest.fixture
def run_metadata(finished, monkeypatch):
    """The newest materialization of every asset."""
    monkeypatch.setenv("DAGSTER_HOME", str(finished.root / ".dagster"))
    found = {}
    with dg.DagsterInstance.get() as instance:
        for run in reversed(instance.get_runs()):
            for record in instance.get_records_for_run(run.run_id).records:
                event = record.event_log_entry.dagster_event
                if event and event.event_type_value == "ASSET_MATERIALIZATION":
                    made = event.event_specific_data.materialization
                    found[made.asset_key.to_user_string()] = made
    return found


def test_materializations_carry_numbers_schemas_versions_and_a_picture(run_metadata):
    assert len(run_metadata) == 22
    counted = [k for k in run_metadata if re.match(r"pool|scores|mini/(?!model|eval|report)", k)]
    assert len(counted) == 17
    for name in counted:
        assert run_metadata[name].metadata["dagster/row_count"].value > 0, name
    for name, made in run_metadata.items():
        assert made.tags["dagster/data_version"], name
    for stage in (*STAGES, *ADDED, "rejection_sampling", "allocate"):
        shown = run_metadata[f"mini/{stage}"].metadata
        assert shown["dagster/column_schema"].value.columns[0].name == "id"
        assert shown["rows_kept"].value == shown["dagster/row_count"].value
        drawn = shown["picture"].value
        assert drawn.startswith("![")
        assert "data:image/png;base64," in drawn
        assert len(drawn) < PICTURE_BYTES
    assert 0 <= run_metadata["mini/evaluation"].metadata["accuracy_curated"].value <= 1


def test_equal_content_has_equal_data_versions(run_metadata, finished, mini):
    for stage, output in outputs(Workspace(finished.root), mini()):
        made = run_metadata[f"mini/{stage.name}"]
        assert made.tags["dagster/data_version"] == output.manifest.version


def test_workspace_yaml_loads(mini_tools, tmp_path):
    said = subprocess.run(
        [sys.executable, "-m", "dagster", "definitions", "validate", "-w", "workspace.yaml"],
        cwd=REPOSITORY,
        env=mini_tools.mini_environment(DAGSTER_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert said.returncode == 0, said.stderr[-2000:]
    assert "siftline.definitions" in said.stdout + said.stderr

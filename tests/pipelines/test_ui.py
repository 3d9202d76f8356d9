"""The Dagster UI in a real browser: somebody opens it and materializes the first stages."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from siftline.ingest.pool import Pool
from siftline.rows.ledger import StageOutput

pytestmark = pytest.mark.browser

REPOSITORY = Path(__file__).parents[2]
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE = 120


@pytest.fixture(scope="module")
def chromium():
    found = shutil.which("chromium")
    if found is None:
        if "chromium" in os.environ.get("SIFTLINE_REQUIRE", ""):
            pytest.fail("chromium is required here and not installed: apt-get install chromium")
        pytest.skip("no chromium: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("ui") / "root"


@pytest.fixture(scope="module")
def server(root, mini_tools):
    """Address of `siftline ui` on an empty root, through the repository's workspace.yaml."""
    with serving(root, mini_tools.mini_environment()) as address:
        yield address


@contextmanager
def serving(root, environment):
    """Starts `siftline ui`, daemon and all, and ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = root.parent / "ui.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "siftline.cli", "ui", "--root", str(root), "--port", str(port)],
            cwd=REPOSITORY,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a child of a script would ignore SIGTERM
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process, log)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(address, process, log):
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(f"{address}/server_info", timeout=5) as answer:
                assert "dagster_webserver_version" in json.load(answer)
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)


@pytest.fixture(scope="module")
def page(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*FLAGS])
        opened = browser.new_page(viewport={"width": 1500, "height": 1000})
        opened.set_default_timeout(1000 * PATIENCE)
        yield opened
        browser.close()


def launch(page, selection):
    """Filters the group's graph by what is typed, materializes what is left; the run's id."""
    from playwright.sync_api import expect

    everything = page.get_by_role("button", name="Materialize all")
    expect(everything).to_be_enabled(timeout=1000 * PATIENCE)
    page.locator(".CodeMirror").first.click()
    page.keyboard.type(selection)
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("lineage~.*duplicates"))
    expect(page.get_by_text("mini_test", exact=True)).to_have_count(1)  # now only a way out
    expect(everything).to_be_enabled(timeout=1000 * PATIENCE)

    def launches(response):
        return "graphql" in response.url and "LaunchPipelineExecution" in (
            response.request.post_data or ""
        )

    with page.expect_response(launches) as launched:
        everything.click()
    answer = launched.value.json()["data"]["launchPipelineExecution"]
    assert answer["__typename"] == "LaunchRunSuccess", answer
    return answer["run"]["id"]


def test_first_stages_from_the_ui(page, server, root):
    page.goto(f"{server}/locations/siftline.definitions/asset-groups/mini")
    run = launch(page, '+key:"mini/duplicates"')
    page.goto(f"{server}/runs/{run}")
    page.get_by_text("Success", exact=True).first.wait_for()
    assert Pool(root / "pool" / "mini").manifest.rows("rows") > 200
    (manifest,) = (root / "stages" / "mini" / "duplicates").glob("*.json")
    counts = StageOutput(manifest).accounting
    assert counts.closes
    assert counts.removed > 0
    assert sorted(p.name for p in (root / "pool").iterdir()) == ["mini"]  # and nothing else ran


def test_the_launchpad_takes_what_set_takes(page, server):
    page.goto(f"{server}/locations/siftline.definitions/asset-groups/mini")
    everything = page.get_by_role("button", name="Materialize all")
    everything.wait_for()
    everything.click(modifiers=["Shift"])
    page.get_by_text("overrides").first.wait_for()


def test_schedule_and_sensor_are_off(page, server):
    page.goto(f"{server}/automation")
    for name in ("mini_schedule", "mini_new_files"):
        page.get_by_text(name, exact=True).first.wait_for()
    switches = page.get_by_role("switch").all() or page.locator("input[type=checkbox]").all()
    assert switches
    assert not any(switch.is_checked() for switch in switches)


# ---- an operator's day: real server, real daemon -----------------------------------------------

WHERE = {"repositoryName": "__repository__", "repositoryLocationName": "siftline.definitions"}
LAUNCH = """mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename
  ... on LaunchRunSuccess { run { runId } }
  ... on RunConfigValidationInvalid { errors { message } }
  ... on PythonError { message } } }"""
RUNS = """{ runsOrError { ... on Runs { results { runId status startTime endTime
  tags { key value } } } } }"""
STOP = """mutation($id: String!) { terminateRun(runId: $id) { __typename } }"""
SENSOR = """mutation($s: SensorSelector!) { startSensor(sensorSelector: $s) { __typename } }"""


def ask(address, query, **variables):
    body = json.dumps({"query": query, "variables": variables}).encode()
    asked = urllib.request.Request(f"{address}/graphql", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            said = json.load(answer)
    except urllib.error.HTTPError as error:
        said = json.load(error)
    assert "errors" not in said, said
    return said["data"]


def runs(address):
    """Newest first."""
    return ask(address, RUNS)["runsOrError"]["results"]


def launch_small(address, *overrides):
    config = {"resources": {"siftline": {"config": {"overrides": list(overrides)}}}}
    params = {"selector": {**WHERE, "jobName": "small"}, "runConfigData": config}
    return ask(address, LAUNCH, p=params)["launchRun"]


def until(address, true, seconds=600):
    """Waits until the runs are as they should be; what they are."""
    deadline = time.monotonic() + seconds
    while not true(found := runs(address)):
        assert time.monotonic() < deadline, found
        time.sleep(1)
    return found


def ended(found, count):
    return len(found) >= count and all(r["status"] in ("SUCCESS", "CANCELED") for r in found)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_day_of_an_operator(page, tmp_path, mini_tools):
    tools = mini_tools.beside("test_operation")
    root, recipes, rows = tmp_path / "root", tmp_path / "recipes", tmp_path / "rows"
    root.mkdir()
    recipes.mkdir()
    (recipes / "small.yaml").write_text(tools.SMALL.format(folder=tmp_path))
    (recipes / "typo.yaml").write_text(tools.BAD["typo"].format(folder=tmp_path))
    tools.write_rows(rows / "a.jsonl", range(8))
    environment = mini_tools.mini_environment() | {
        "SIFTLINE_RECIPES": str(recipes), "SIFTLINE_ROOT": str(root),
    }  # fmt: skip
    curated = root / "curated" / "small"
    with serving(root, environment) as address:
        # A bad recipe is a group of its own that says what is wrong; the others are there.
        page.goto(f"{address}/assets/typo/recipe")
        page.get_by_text("did you mean 'duplicates'").first.wait_for()
        # A typing error launches nothing.
        refused = launch_small(address, "budget.sise=3")
        assert refused["__typename"] != "LaunchRunSuccess"
        assert "did you mean 'size'?" in json.dumps(refused)
        assert runs(address) == []
        # Two runs of one recipe: the second waits in the queue.
        for _ in range(2):
            assert launch_small(address)["__typename"] == "LaunchRunSuccess"
        found = until(address, lambda found: ended(found, 2))
        second, first = sorted(found, key=lambda run: -run["startTime"])
        assert second["startTime"] >= first["endTime"]
        latest = os.readlink(curated / "latest")
        # The report is a link, on whatever machine the browser is.
        page.goto(f"{address}/assets/small/report")
        link = page.locator(f"a[href*='/logs/reports/small/{latest}/html']").first
        link.wait_for()
        with urllib.request.urlopen(f"{address}/logs/reports/small/{latest}/html") as served:
            assert latest in served.read().decode()
        # A trial leaves latest where it is.
        assert launch_small(address, "stages.duplicates.threshold=0.3")["run"]
        until(address, lambda found: ended(found, 3))
        assert os.readlink(curated / "latest") == latest
        page.goto(f"{address}/assets/small/curated")
        page.get_by_text("changed_by_overrides").first.wait_for()
        # A run of the command line stops at the button.
        tools.write_rows(rows / "b.jsonl", range(20, 24))
        with_home = environment | {"DAGSTER_HOME": str(root / ".dagster")}
        (root / "hold").touch()
        process = subprocess.Popen(
            [sys.executable, "-c", tools.FIRST, str(root)], env=with_home,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        tools.wait_until((root / "publishing").exists, process)
        going = next(run for run in runs(address) if run["status"] == "STARTED")
        stopped = ask(address, STOP, id=going["runId"])["terminateRun"]
        assert stopped["__typename"] == "TerminateRunSuccess"
        assert "was cancelled" in process.communicate(timeout=300)[0]
        found = until(address, lambda found: ended(found, 4))
        assert found[0]["status"] == "CANCELED"
        assert os.readlink(curated / "latest") == latest
        # The sensor: as the files are, then one goes, then it is back.
        (root / "hold").unlink()
        ask(address, SENSOR, s={**WHERE, "sensorName": "small_new_files"})
        text = (rows / "b.jsonl").read_text()
        until(address, lambda found: ended(found, 5))
        both = os.readlink(curated / "latest")
        assert both != latest
        (rows / "b.jsonl").unlink()
        until(address, lambda found: ended(found, 6))
        assert os.readlink(curated / "latest") == latest
        (rows / "b.jsonl").write_text(text)
        until(address, lambda found: ended(found, 7))
        assert os.readlink(curated / "latest") == both

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
from pathlib import Path

import pytest

from siftline.ingest.pool import Pool
from siftline.rows.ledger import StageOutput

pytestmark = pytest.mark.browser

REPOSITORY = Path(__file__).parents[1]
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = root.parent / "ui.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "siftline.cli", "ui", "--root", str(root), "--port", str(port)],
            cwd=REPOSITORY,
            env=mini_tools.mini_environment(),
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
def page(chromium, server):
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

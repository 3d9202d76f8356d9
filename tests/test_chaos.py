"""Random kills, full disks and damage over the whole chain; `chaos.py` says what holds."""

import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).with_name("chaos.py")


def chaos(*arguments, environment, timeout):
    command = [sys.executable, str(CHAOS), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    print(done.stdout)
    return done.stdout.splitlines()[-1]


def test_a_few_moments_leave_the_bytes_of_an_undisturbed_run(finished, mini_tools, tmp_path):
    said = chaos(
        "--work", tmp_path / "chaos", "--inputs", finished.root, "--done", "--lanes", "chain=6",
        environment=mini_tools.mini_environment(), timeout=400,
    )  # fmt: skip
    assert said.startswith("chaos: 6 moments, all held (")


@pytest.mark.slow
def test_two_hundred_moments_leave_the_bytes_of_an_undisturbed_run(mini_tools, tmp_path):
    pytest.importorskip("vllm")
    environment = mini_tools.mini_environment()
    said = chaos("--work", tmp_path / "chaos", environment=environment, timeout=3000)
    assert said.startswith("chaos: 200 moments, all held (")

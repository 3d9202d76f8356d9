"""Processes side by side: each waits, or says who is before it."""

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftline import locks
from siftline.locks import Held, file_system, held, holder, warn_if_shared

CHILD = """
import sys
from pathlib import Path
from siftline.locks import held
with held(Path(sys.argv[1]), "it", wait=False):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other():
    """`other(path)` has another process hold a lock; it ends when its input is closed."""
    children = []

    def hold(path):
        command = [sys.executable, "-c", CHILD, str(path)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout.readline() == "held\n"
        return child

    yield hold
    for child in children:
        child.kill()
        child.wait()


def test_who_does_not_wait_is_told_for_whom_and_who_waits_says_so(tmp_path, other):
    path = tmp_path / "lock"
    child = other(path)
    told = rf"it is being written by another run \(process {child.pid}, python.* -c .*\): wait"
    with pytest.raises(Held, match=told), held(path, "it", wait=False):
        raise AssertionError("held twice")
    said = []

    def say(line):
        said.append(line)
        child.stdin.close()

    with held(path, "it", wait=True, say=say):
        assert child.wait(10) == 0
    assert len(said) == 1
    assert str(child.pid) in said[0]
    killed = other(path)
    killed.kill()
    killed.wait()
    with held(path, "it", wait=False):  # the lock went with its process
        assert str(os.getpid()) in holder(path)
    assert holder(tmp_path / "none") == holder(path) == "it can't be told whose"


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.raises(ValueError, match=r"lock is on a file system without locks \(\w+\): put it"),
        held(tmp_path / "lock", "it", wait=True),
    ):
        raise AssertionError("held")


def test_a_network_file_system_is_told_once(tmp_path, monkeypatch, caplog):
    assert file_system(tmp_path) != "unknown"
    assert file_system(locks.Path("/proc/self")) == "proc"
    assert file_system(tmp_path / "not" / "there") == file_system(tmp_path)
    for kind, warned in (("ext4", 0), ("nfs4", 1), ("fuse.sshfs", 1), ("cifs", 1)):
        warn_if_shared.cache_clear()
        caplog.clear()
        monkeypatch.setattr(locks, "file_system", lambda _, kind=kind: kind)
        for _ in range(2):
            warn_if_shared(tmp_path)
        assert len(caplog.records) == warned
    assert f"{tmp_path} is on cifs: locks may not hold" in caplog.text
    warn_if_shared.cache_clear()


def test_an_index_in_use_names_its_user(tmp_path, other, capsys):
    from siftline.cli import main

    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    (tmp_path / "index").mkdir()
    from siftline.deduplication.index import LOCK

    child = other(tmp_path / "index" / LOCK)
    with pytest.raises(SystemExit):
        main(["dedup", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out"), "--index",
              str(tmp_path / "index")])  # fmt: skip
    (line,) = capsys.readouterr().err.splitlines()
    assert f"index is being written by another run (process {child.pid}" in line
    assert not (tmp_path / "out").exists()


def test_a_pool_in_use_is_waited_for(tmp_path, other, caplog):
    from siftline.ingest.pool import PoolSpec, build_pool
    from siftline.ingest.readers import Source

    (tmp_path / "a.jsonl").write_text('{"prompt": "?", "completion": "!"}\n')
    (tmp_path / "pool").mkdir()
    child = other(tmp_path / "pool" / ".lock")
    caplog.set_level(logging.WARNING)
    spec = PoolSpec("p", (Source(str(tmp_path / "a.jsonl")),))
    built = threading.Thread(target=lambda: build_pool(tmp_path / "pool", spec, lambda _: None))
    built.start()
    while "waiting for it" not in caplog.text:
        assert built.is_alive()
    assert not (tmp_path / "pool" / "manifest.json").exists()
    child.stdin.close()
    built.join(60)
    assert (tmp_path / "pool" / "manifest.json").exists()


FIRST = """
import os, sys
from pathlib import Path
import dagster as dg
from siftline.pipelines.execute import prepare_home
from siftline.workspace import Workspace

root = Path(sys.argv[1])
ready, go = os.pipe()
children = []
for _ in range(4):
    child = os.fork()
    if not child:
        os.close(go)
        os.read(ready, 1)  # all begin at once, when the other end is closed
        try:
            home = prepare_home(Workspace(root))
            with dg.DagsterInstance.from_config(str(home)) as instance:
                assert instance.get_runs() == []
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    children.append(child)
os.close(go)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


def test_four_first_runs_on_one_fresh_root(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FIRST, str(tmp_path / "root")], capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "root" / ".dagster" / "dagster.yaml").exists()

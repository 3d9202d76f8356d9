"""`siftline cache ls|gc`: what is listed is what is there, and nothing in use or committed goes."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime

import pyarrow as pa
import pytest

from siftline.cli import main
from siftline.cli.cache import seconds, size_text
from siftline.store import cache
from siftline.store.namespace import Journal
from siftline.store.store import Namespace, Store, collect

SCHEMA = pa.schema([("key", pa.string()), ("value", pa.float64())])
FINGERPRINT = "0123456789abcdef" * 4


def records(keys):
    return pa.table({"key": keys, "value": [float(len(k)) for k in keys]}, schema=SCHEMA)


def make(root, scorer="toy", days=0.0, keys=("a", "b"), bucket=0, **parameters):
    """A namespace below ROOT/store, last used so many days ago."""
    store = Store(root / "store", Namespace(scorer, 2, FINGERPRINT, parameters), SCHEMA)
    collect(store, bucket, list(keys), [range(len(keys))], lambda p: (records(list(keys)), {}))
    age(store, days)
    return store


def age(store, days):
    then = time.time() - days * 86400
    for path in store.folder.rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


def orphan(store, bucket, keys, torn=b""):
    """A journal whose writer is dead."""
    journal = Journal(store.folder / "journals" / f"b{bucket:02d}-1-1.journal", SCHEMA)
    journal.append(records(keys))
    journal.close()
    with journal.path.open("ab") as handle:
        handle.write(torn)
    return journal.path


def files(root):
    """Every file but the locks, with its bytes."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


@pytest.fixture
def call(tmp_path, capsys):
    """`call(*arguments)` runs the command line on tmp_path: exit status, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["cache", *map(str, arguments), "--root", str(tmp_path)])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


def said(result):
    code, out, err = result
    assert (code, err) == (0, "")
    return json.loads(out)


HOLDER = """
import sys
from pathlib import Path
from siftline.store.namespace import NamespaceFolder
with NamespaceFolder(Path(sys.argv[1])).lease(int(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """`hold(store, bucket)` has another process take a lease; it is killed at the end."""
    running = []

    def start(store, bucket):
        command = [sys.executable, "-c", HOLDER, str(store.folder), str(bucket)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, **pipes)
        running.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


# ---- ls --------------------------------------------------------------------------------------


def test_ls_tells_every_namespace_with_its_numbers(call, tmp_path):
    plain = make(tmp_path, keys=("a", "b", "c"), days=3)
    make(tmp_path, "other", temperature=0.5, bucket=7)
    orphan(plain, 4, ["x", "a"])
    age(plain, 3)
    found = said(call("ls", "--json"))
    lines = {line["name"]: line for line in found["namespaces"]}
    line = lines[plain.folder.name]
    assert (line["scorer"], line["version"], line["parameters"]) == ("toy", 2, {})
    assert line["fingerprint"] == FINGERPRINT[:12]
    assert line["records"] == 5  # key a of another bucket is another record
    assert line["journals"] == 1
    assert line["in_use"] is False
    on_disk = [p.stat().st_size for p in plain.folder.rglob("*") if p.is_file()]
    assert line["bytes"] == sum(on_disk)
    assert found["bytes"] == sum(line["bytes"] for line in lines.values())
    written = datetime.fromisoformat(line["last_written"])
    assert abs((datetime.now(UTC) - written).total_seconds() - 3 * 86400) < 60
    (other,) = (line for line in lines.values() if line["scorer"] == "other")
    assert other["parameters"] == {"temperature": 0.5}
    assert (other["records"], other["journals"]) == (2, 0)
    code, out, _ = call("ls")
    assert code == 0
    assert len(out.splitlines()) == 2
    assert "5 records" in out
    assert "1 open journals" in out
    assert '{"temperature":0.5}' in out


def test_ls_counts_a_record_once_though_it_lies_there_twice(call, tmp_path):
    store = make(tmp_path)
    orphan(store, 0, ["a", "b", "c"])  # as after a crash between sealing and deleting
    assert said(call("ls", "--json"))["namespaces"][0]["records"] == 3


def test_ls_says_what_is_in_use_and_disturbs_nobody(call, tmp_path, hold):
    store = make(tmp_path)
    make(tmp_path, "free")
    process = hold(store, 3)
    before = files(tmp_path)
    lines = {line["scorer"]: line for line in said(call("ls", "--json"))["namespaces"]}
    assert (lines["toy"]["in_use"], lines["free"]["in_use"]) == (True, False)
    assert files(tmp_path) == before
    process.kill()
    process.wait()
    lines = {line["scorer"]: line for line in said(call("ls", "--json"))["namespaces"]}
    assert lines["toy"]["in_use"] is False


def test_no_store_is_one_line(call):
    code, out, err = call("ls")
    assert (code, out) == (1, "")
    assert err.startswith("error: no store at ")
    assert err.count("\n") == 1


# ---- gc --------------------------------------------------------------------------------------


def test_gc_removes_what_is_out_of_use_for_thirty_days_and_says_how_much(call, tmp_path):
    old, young = make(tmp_path, "old", days=31), make(tmp_path, "young", days=29)
    size = sum(p.stat().st_size for p in old.folder.rglob("*") if p.is_file())
    kept = files(young.folder)
    found = said(call("gc", "--json"))
    assert [(n["scorer"], n["what"], n["bytes"]) for n in found["namespaces"]] == [
        ("old", "removed", size)
    ]
    assert (found["bytes"], found["dry_run"]) == (size, False)
    assert [p.name for p in (tmp_path / "store").iterdir()] == [young.folder.name]
    assert files(young.folder) == kept


def test_gc_goes_by_the_last_look_not_by_the_last_record(call, tmp_path):
    store = make(tmp_path, days=90)
    found = collect(store, 0, ["a", "b"], [[0, 1]], lambda p: pytest.fail("asked again"))
    assert found.found == 2
    assert said(call("gc", "--json"))["namespaces"] == []
    assert store.keys(0) == {"a", "b"}


def test_looking_twice_stamps_once(tmp_path):
    store = make(tmp_path)
    stamp = (store.folder / "used").stat().st_mtime_ns
    collect(store, 0, ["a", "b"], [[0, 1]], lambda p: pytest.fail("asked again"))
    assert (store.folder / "used").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(("option", "left"), [("12h", 1), ("2d", 2), ("0d", 0)])
def test_gc_takes_an_age(call, tmp_path, option, left):
    make(tmp_path, "one", days=1)
    make(tmp_path, "two")
    call("gc", "--older-than", option)
    assert len(list((tmp_path / "store").iterdir())) == left


def test_gc_of_one_scorer_leaves_the_others(call, tmp_path):
    make(tmp_path, "one", days=99)
    two = make(tmp_path, "two", days=99)
    assert [n["scorer"] for n in said(call("gc", "--scorer", "one", "--json"))["namespaces"]] == [
        "one"
    ]
    assert [p.name for p in (tmp_path / "store").iterdir()] == [two.folder.name]


def test_dry_run_says_the_same_and_changes_nothing(call, tmp_path):
    make(tmp_path, "old", days=99)
    store = make(tmp_path, "young")
    orphan(store, 2, ["x"])
    (store.folder / "parts" / ".records-0-1.parquet").write_bytes(b"half")
    before = files(tmp_path)
    dry = said(call("gc", "--dry-run", "--json"))
    assert dry["dry_run"] is True
    assert files(tmp_path) == before
    wet = said(call("gc", "--json"))
    told = [[(n["scorer"], n["what"], n["journals"]) for n in r["namespaces"]] for r in (dry, wet)]
    assert sorted(told[0]) == sorted(told[1]) == [("old", "removed", 0), ("young", "tidied", 1)]
    assert files(tmp_path) != before


def test_gc_seals_journals_of_the_dead_and_loses_no_record(call, tmp_path):
    store = make(tmp_path, days=5)
    torn = orphan(store, 2, ["x", "y"], torn=b"SJ01\xff\x00")
    half = store.folder / "parts" / ".records-9-1.parquet"
    half.write_bytes(b"half")
    age(store, 5)
    (line,) = said(call("gc", "--json"))["namespaces"]
    assert (line["what"], line["journals"]) == ("tidied", 1)
    assert not torn.exists()
    assert not half.exists()
    assert store.keys(2) == {"x", "y"}
    assert store.keys(0) == {"a", "b"}
    # Tidying is no use: the namespace is as old as it was.
    assert said(call("gc", "--older-than", "4d", "--json"))["namespaces"][0]["what"] == "removed"


def test_gc_never_touches_what_a_live_process_holds(call, tmp_path, hold):
    store = make(tmp_path, days=99)
    orphan(store, 3, ["x"])
    age(store, 99)
    process = hold(store, 3)
    before = files(tmp_path)
    for arguments in (["gc", "--json"], ["gc", "--older-than", "100d", "--json"]):
        found = said(call(*arguments))
        assert found["bytes"] == 0
        assert all(line["what"] == "in use" for line in found["namespaces"])
        assert files(tmp_path) == before
    process.kill()
    process.wait()
    assert said(call("gc", "--json"))["namespaces"][0]["what"] == "removed"


def test_a_run_that_comes_along_while_gc_takes_the_leases_keeps_its_namespace(
    tmp_path, monkeypatch
):
    store = make(tmp_path, days=99)
    real = cache.NamespaceFolder.lease

    def lease(self, bucket, **options):
        store.files.stamp()
        return real(self, bucket, **options)

    monkeypatch.setattr(cache.NamespaceFolder, "lease", lease)
    (line,) = cache.collect_garbage(tmp_path / "store", 30 * 86400, dry=False)
    assert line.what == "in use"
    assert store.keys(0) == {"a", "b"}


def test_a_run_under_way_survives_a_collection_between_its_buckets(tmp_path):
    store = make(tmp_path)
    cache.collect_garbage(tmp_path / "store", 0, dry=False)
    assert not store.folder.exists()
    got = collect(store, 1, ["c"], [[0]], lambda p: (records(["c"]), {}))
    assert got.records["key"].to_list() == ["c"]
    assert store.keys(1) == {"c"}
    assert cache.list_store(tmp_path / "store")[0].namespace == store.files.namespace


def test_gc_says_who_holds_what_it_leaves(tmp_path, hold):
    store = make(tmp_path, days=99)
    process = hold(store, 3)
    (line,) = cache.collect_garbage(tmp_path / "store", 0, dry=False)
    assert line.what == "in use"
    assert f"process {process.pid}" in line.holder
    (line,) = cache.collect_garbage(tmp_path / "store", 0, dry=True)
    assert f"process {process.pid}" in line.holder


def test_what_a_killed_collection_left_goes_with_the_next(call, tmp_path):
    make(tmp_path)
    gone = tmp_path / "store" / ".gone-toy-1.77" / "parts"
    gone.mkdir(parents=True)
    (gone / "b00-x.parquet").write_bytes(b"x")
    assert len(said(call("ls", "--json"))["namespaces"]) == 1
    call("gc")
    assert not gone.parent.exists()


def test_an_age_is_a_number_and_a_unit(call, tmp_path):
    assert [seconds(a) for a in ("90s", "2m", "1.5h", "30d", "1w")] == [
        90, 120, 5400, 2592000, 604800,
    ]  # fmt: skip
    make(tmp_path)
    code, out, err = call("gc", "--older-than", "a month")
    assert (code, out) == (1, "")
    assert "such as 30d" in err


def test_sizes_are_readable():
    sizes = (0, 1023, 1024, 1536, 5 << 30, 3 << 50)
    told = ["0 bytes", "1,023 bytes", "1.0 KiB", "1.5 KiB", "5.0 GiB", "3,072.0 TiB"]
    assert [size_text(n) for n in sizes] == told

"""Every verb of the command line on a finished root: what it prints, how it refuses."""

import json
import re
from pathlib import Path

import polars as pl
import pytest

from siftline.cli import VERBS as TABLE
from siftline.cli import main
from siftline.ingest.pool import Pool
from siftline.rows.ledger import KEPT, REMOVED
from siftline.stages.run import outputs
from siftline.store.namespace import BUCKETS, NamespaceFolder
from siftline.workspace import Workspace

ROOTED = (
    "run",
    "plan",
    "demo",
    "status",
    "explain",
    "report",
    "audit",
    "ui",
    "cache ls",
    "cache gc",
)
VERBS = (*ROOTED, "score", "dedup", "select", "rule", "train", "eval", "export", "cache")


@pytest.fixture
def call(finished, mini, capsys):
    """`call(*arguments)` runs the command line here: exit status, stdout, stderr."""

    def run(*arguments, root=None):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments), *(["--root", str(root or finished.root)])])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


def refused(result):
    """The one line of an error."""
    code, out, err = result
    assert code == 1, (out, err)
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def done(finished, mini):
    return {s.name: output for s, output in outputs(Workspace(finished.root), mini())}


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*verb.split(), "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Usage: siftline {verb}")
    assert ("--root" in said) == (verb in (*ROOTED, "train"))


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert re.findall(r"^  (\w+) ", said.partition("Commands:")[2], re.M) == sorted(TABLE)
    assert {v.split()[0] for v in VERBS} <= set(TABLE)


def test_run_ends_with_one_json_object(finished):
    (line,) = finished.said.stdout.splitlines()
    result = json.loads(line)
    assert {"curated", "report", "rows", "accuracy"} <= set(result)
    assert Path(result["curated"]) == (finished.root / "curated" / "mini" / "latest").resolve()
    assert Path(result["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert set(result["accuracy"]) == {"base", "random", "curated"}
    for counts in result["rows"].values():
        assert counts["in"] + counts["added"] == sum(
            counts[k] for k in ("kept", "removed", "failed")
        )


def test_run_says_how_far_it_is(finished):
    assert re.search(r"confidence samples \d+ draws in \d:\d\d", finished.said.stderr)


def test_status(call, finished):
    code, out, err = call("status", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    pools = {pool["name"]: pool for pool in said["pools"]}
    assert set(pools) == {"mini", "mini_dev", "mini_test"}
    assert pools["mini"]["quarantined"] == 1
    (recipe,) = said["recipes"]
    assert recipe["stages_done"] == recipe["stages"] == 12
    assert len(recipe["versions"]) == 1
    code, out, _ = call("status")
    assert code == 0
    assert "recipe mini: 12 of 12 stages" in out
    assert "(latest)" in out


def statuses(call, root):
    """Score tables and the store by name."""
    code, out, err = call("status", "--json", root=root)
    assert (code, err) == (0, "")
    said = json.loads(out)
    return {t["name"]: t for t in said["scores"]}, said["store"]


def test_status_shows_how_much_of_a_pool_is_scored(call, finished):
    rows = Pool(finished.root / "pool" / "mini").manifest.rows("rows")
    tables, store = statuses(call, finished.root)
    table = tables["mini/tiny/likelihood"]
    assert (table["rows"], table["scored"] + table["failed"]) == (rows, rows)
    assert table["share"] == table["scored"] / rows > 0
    assert table["stale"] is False
    assert {"likelihood"} <= {entry["scorer"] for entry in store}
    assert all(entry["records"] > 0 and not entry["in_use"] for entry in store)
    _, out, _ = call("status")
    share = f"({100 * table['scored'] / rows:.1f} %), {table['failed']} failed\n"
    assert f"scores mini/tiny/likelihood: {table['scored']} of {rows} rows {share}" in out
    assert "being written" not in out


def test_status_of_a_pool_that_changed_counts_its_rows_and_says_stale(
    call, finished, mini, mini_tools, tmp_path
):
    from siftline.assets.shared import build

    root = mini_tools.copy_root(finished.root, tmp_path / "root")
    pool = root / "inputs" / "mini" / "pool.jsonl"
    lines = pool.read_text(encoding="utf-8").splitlines(keepends=True)
    new = {"question": "Which number is new?", "response": "#### 1", "answer": "1", "source": "n"}
    pool.write_text("".join([*lines[5:], json.dumps(new) + "\n"]), encoding="utf-8")
    before = set(Pool(root / "pool" / "mini").all_rows(["id"]).column("id").to_pylist())
    built = build(Workspace(root), mini(), "mini", lambda line: None)
    now = set(built.all_rows(["id"]).column("id").to_pylist())
    assert len(now - before) == 1
    table = statuses(call, root)[0]["mini/tiny/likelihood"]
    assert table["stale"] is True
    assert table["rows"] == len(now)
    assert table["scored"] + table["failed"] == len(now & before)
    assert "stale: the pool has changed" in call("status", root=root)[1]


def test_status_of_a_run_under_way_counts_the_records_of_the_store(
    call, finished, mini_tools, tmp_path
):
    root = mini_tools.copy_root(finished.root, tmp_path / "root", "pool", "store", "models")
    (folder, *_) = sorted((root / "store").glob("likelihood-*"))
    files = NamespaceFolder(folder)
    with files.lease(3):
        tables, store = statuses(call, root)
        out = call("status", root=root)[1]
    assert tables == {}
    (entry,) = (entry for entry in store if entry["name"] == folder.name)
    expected = sum(len(table) for bucket in range(BUCKETS) for table in files.tables(bucket))
    assert (entry["records"], entry["in_use"]) == (expected, True)
    assert f"store {folder.name}: {expected} records, being written\n" in out
    assert "being written" not in call("status", root=root)[1]


def test_status_of_a_root_that_is_not_there(call, tmp_path):
    assert "does not exist" in refused(call("status", root=tmp_path / "nowhere"))


def test_report(call, finished):
    code, out, _ = call("report", "mini", "--json")
    assert code == 0
    assert json.loads(out) == json.loads(finished.said.stdout)
    code, out, _ = call("report", "mini")
    assert "accuracy curated" in out
    assert "rejection_sampling" in out


def test_report_before_a_run(call, tmp_path):
    assert "run the recipe first" in refused(call("report", "mini", root=tmp_path))


# ---- explain ---------------------------------------------------------------------------------


def story(call, name):
    code, out, err = call("explain", name, "--json")
    assert code == 0, err
    ((title, chapters),) = [(s["of"], s["chapters"]) for s in json.loads(out)]
    return title, [(c["stage"], c["outcome"], c["detail"]) for c in chapters]


def test_explain_a_quarantined_line(call, finished):
    lines = (finished.root / "inputs" / "mini" / "pool.jsonl").read_text().splitlines()
    title, ((stage, outcome, detail),) = story(call, f"pool.jsonl:{len(lines)}")
    assert (title, stage, outcome) == ("pool mini", "pool", "quarantined")
    assert detail["reason"] == "invalid_json"
    assert detail["excerpt"].startswith('{"question": "What is left')


def test_explain_a_collapsed_line(call, finished):
    lines = (finished.root / "inputs" / "mini" / "pool.jsonl").read_text().splitlines()
    copy = len(lines) - 1  # the generator writes the first easy row once more there
    assert lines[copy - 1] == lines[copy - 11]
    _, chapters = story(call, f"pool.jsonl:{copy}")
    assert [(c[0], c[1]) for c in chapters[:2]] == [("pool", "read"), ("pool", "collapsed")]
    assert chapters[1][2]["line"] == copy
    assert chapters[1][2]["reason"] == f"identical to pool.jsonl:{copy - 10}"


def test_explain_a_removed_row(call, done):
    gone = done["duplicates"].all_decisions().filter(pl.col("outcome") == REMOVED)
    row = gone.row(0, named=True)
    title, chapters = story(call, row["id"][:24])  # the first 20 digits are the prompt's
    assert title == f"recipe mini, row {row['id']}"
    assert chapters[-1][:2] == ("duplicates", "removed")
    assert chapters[-1][2]["matched_id"] == row["matched_id"]
    assert chapters[-1][2]["reason"] == row["reason"]


def test_explain_a_kept_row_by_eight_digits(call, done, finished):
    kept = done["allocate"].all_decisions().filter(pl.col("outcome") == KEPT, ~pl.col("added"))
    pool = Pool(finished.root / "pool" / "mini").all_rows(["id"]).column("id").to_pylist()
    heads = [identity[:8] for identity in pool]
    name = next(i for i in kept["id"].to_list() if heads.count(i[:8]) == 1)
    title, chapters = story(call, name[:8])
    assert title.endswith(name)
    assert [c[0] for c in chapters] == ["pool", *done, "curated"]
    assert {c[1] for c in chapters[1:-1]} == {"kept"}
    assert chapters[-1][1] == "published"


def test_explain_an_added_row(call, done):
    sampled = done["rejection_sampling"].all_decisions().filter("added")["id"].to_list()
    title, chapters = story(call, sampled[0])
    assert title == f"recipe mini, row {sampled[0]}"
    assert chapters[0][:2] == ("rejection_sampling", "added")
    assert chapters[0][2]["origin"].startswith("rejection_sampling draw ")
    assert chapters[0][2]["parent_id"][:20] == sampled[0][:20]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("0123456789abcdef", "no pool or stage"),
        ("pool.jsonl:99999", "no pool or stage"),
        ("abc", "8 to 40 hex digits, or FILE:LINE"),
        ("not an id", "8 to 40 hex digits, or FILE:LINE"),
    ],
)
def test_explain_of_what_nobody_knows(call, name, said):
    assert said in refused(call("explain", name))


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "mimi"], "no recipe 'mimi': did you mean 'mini'?"),
        (
            ["run", "mini", "--set", "budgett.size=3"],
            "unknown key 'budgett': did you mean 'budget'",
        ),
        (["run", "mini", "--set", "budget.sise=3"], "unknown key 'sise': did you mean 'size'?"),
        (["run", "mini", "--set", "budget.size"], "expected key=value"),
        (["run", "mini", "--set", "budget.size=many"], "budget.size: expected int, found 'many'"),
        (["run", "mini", "--set", "stages.confidense.cut=1"], "did you mean 'confidence'?"),
        (["run", "mini", "--set", "pool.buckets=3"], "buckets must be a power of two, not 3"),
        (["explain", "0123456789", "--set", "seed=1"], "name it with --recipe"),
    ],
)
def test_refusals_name_the_value_and_the_remedy(call, tmp_path, arguments, said):
    assert said in refused(call(*arguments, root=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_plan_says_what_the_rest_costs_and_draws_the_pilot_only(call):
    code, out, _ = call("plan", "mini", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["stage"] == "rejection_sampling"
    assert 0 <= found["draws"]["low"] <= found["draws"]["mean"] <= found["draws"]["high"]
    assert found["seconds"] is None  # the pilot was in the store
    code, out, _ = call("plan", "mini")
    assert out.startswith("rejection_sampling: ")
    assert "targets met" in out
    code, _, err = call("plan", "mini", "--max-draws", "3")
    assert code == 1
    assert "max_draws leaves 3 draws and the pilot of" in err.splitlines()[-1]
    none = call("plan", "mini", "--set", "stages=[duplicates]", "--max-draws", "9")
    assert refused(none).strip() == "error: recipe 'mini' has no rejection_sampling stage to limit"

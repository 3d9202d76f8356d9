"""Selection methods that installed packages register: listed, found by name, or refused."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

from siftline.cli import main
from siftline.config import build
from siftline.selectors.registry import METHODS, find, methods
from siftline.stages.select.options import Select

CODE = '''
from dataclasses import dataclass
import polars as pl
from siftline.selectors.method import Ranked, Ranking, amounts_of, by_value
from siftline.selectors.spending import spend

@dataclass(frozen=True)
class Wordy(Ranked):
    """Takes the responses with the most words."""

    least: int = 0
    needs = ()
    limit = 50

    def columns(self):
        return {"n_words": pl.Float64}

    def rank(self, pool, budget, target):
        values = pool["n_words"].to_numpy()
        order = by_value(values, values >= self.least)
        return Ranking(order, spend(order, amounts_of(pool, budget), budget), values, "fewer_words")

@dataclass(frozen=True)
class Bare(Ranked):
    least: int

class Loose(Ranked):
    pass
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install(name, value, package=...)` makes a distribution that registers one method."""
    made = []

    def run(name, value, package="wordy-methods", code=CODE):
        module = package.replace("-", "_")
        site = tmp_path / f"site{len(made)}"
        (site / module).mkdir(parents=True)
        (site / module / "__init__.py").write_text("", encoding="utf-8")
        (site / module / "best.py").write_text(code, encoding="utf-8")
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        points = f"[siftline.selectors]\n{name} = {module}.{value}\n"
        (info / "entry_points.txt").write_text(points, encoding="utf-8")
        monkeypatch.syspath_prepend(str(site))
        made.append(module)

    yield run
    for module in made:
        for loaded in (module, f"{module}.best"):
            sys.modules.pop(loaded, None)


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    return said.out


def test_a_registered_method_is_one_of_the_table(install, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("siftline.cli.select_run.BUCKETS", 2)
    assert methods() == METHODS
    install("wordy", "best:Wordy")
    assert "wordy_methods" not in sys.modules
    assert find("random").distribution is None
    assert "wordy_methods" not in sys.modules, "a package is imported for its own method alone"
    entry = find("wordy")
    assert (entry.name, entry.distribution, entry.own) == ("wordy", "wordy-methods", True)
    assert methods() == (*METHODS, entry)
    assert find("wordy_methods.best:Wordy").method is entry.method
    assert (entry.limit, entry.limit_at(8)) == (50, 50)

    listed = json.loads(call(capsys, "select", "--list", "--json"))
    assert [line["method"] for line in listed] == [*(e.name for e in METHODS), "wordy"]
    assert listed[-1]["package"] == "wordy-methods"
    assert listed[-1]["options"] == {"least": 0}
    assert listed[-1]["good_for"] == "Takes the responses with the most words."
    text = call(capsys, "select", "--list")
    assert "wordy_methods.best:Wordy (package wordy-methods)" in text
    assert "up to 122,070 rows of 32,768 values" in text

    rows = tmp_path / "rows.jsonl"
    lines = ({"prompt": f"p{i}", "completion": "so " * (1 + i % 7)} for i in range(14))
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    asked = ["select", "wordy", rows, "--set", "least=6", "--json"]
    result = json.loads(call(capsys, *asked, "--budget", 3, "--out", tmp_path / "out"))
    assert (result["method"], result["options"]) == ("wordy", {"least": 6})
    kept = pl.read_parquet(tmp_path / "out" / "selection.parquet").filter("kept")["row"]
    assert len(kept) == 3
    assert {6, 13} < set((kept - 1).to_list()) < {5, 6, 12, 13}  # of 6 and 7 words

    stage = build(Select, {"method": "wordy", "options": {"least": 2}}, "select")
    assert stage.entry == entry
    assert stage.configured().least == 2
    with pytest.raises(ValueError, match="did you mean 'wordy'"):
        find("wordi")


def test_its_own_limit_is_kept(install, capsys, tmp_path):
    install("wordy", "best:Wordy")
    rows = tmp_path / "rows.jsonl"
    lines = ({"prompt": f"p{i}", "completion": "so"} for i in range(51))
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["select", "wordy", str(rows), "--budget", "3", "--out", str(tmp_path / "out")])
    assert "51 rows, and wordy takes 50 at most" in capsys.readouterr().err


def test_it_joins_the_table_of_values_by_itself(install, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import bench_value
    import value_arms

    install("wordy", "best:Wordy")
    assert [e.name for e in value_arms.selectors()] == [*(e.name for e in METHODS), "wordy"]
    sizes = {"prompts": 20, "test": 5, "dev": 5, "target": 5, "corpus": 50}
    world = SimpleNamespace(data=value_arms.recipe_data(sizes, 100))
    for size in ("small", "whole"):
        assert bench_value.arms_of(world, size, [])[0][-1] == "select wordy"


@pytest.mark.parametrize(
    ("name", "value", "code", "said"),
    [
        ("random", "best:Wordy", CODE, "has the name of one of siftline's"),
        ("wordy", "best:Wordiest", CODE, "can't be loaded from 'broken_methods.best:Wordiest'"),
        ("wordy", "worst:Wordy", CODE, "No module named 'broken_methods.worst'"),
        ("wordy", "best:Wordy", "1 / 0", "ZeroDivisionError: division by zero"),
        ("wordy", "best:Loose", CODE, "is no frozen dataclass"),
        ("wordy", "best:spend", CODE, "has no summarise, decide, apply"),
        ("wordy", "best", CODE, "has no summarise, decide, apply"),
        ("wordy", "best:Bare", CODE, "give its option least a default"),
        ("my words", "best:Wordy", CODE, "name it in letters"),
    ],
)
def test_a_broken_one_is_refused_by_the_name_of_its_package(install, name, value, code, said):
    install(name, value, "broken-methods", code)
    for asked in (lambda: find(name), methods):
        with pytest.raises(ValueError, match=r"method .* of package broken-methods") as error:
            asked()
        assert said in str(error.value)
    if name != "random":  # the others are found as ever
        assert find("random").name == "random"


def test_two_packages_with_one_name_are_refused(install):
    install("wordy", "best:Wordy", "first-methods")
    install("wordy", "best:Wordy", "second-methods")
    with pytest.raises(ValueError, match="packages first-methods and second-methods register"):
        find("wordy")


def test_a_limit_of_values_follows_the_width():
    less = find("less")
    assert (less.limit, less.limit_at(32_768)) == (122_070, 122_070)
    assert less.limit_at(384) == find("rds_plus").limit == find("rds_plus").limit_at(384)
    assert less.limit_at(384) > 1_000_000
    assert find("facility_location").limit_at(64) == find("facility_location").limit
    assert find("random").limit_at(64) == find("random").limit

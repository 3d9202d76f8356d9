"""A stage in a package of its own, as CONTRIBUTING shows it."""

import re
import sys
from pathlib import Path

import pytest

from siftline.recipe.kinds import BUILT_IN, StageKind, kind_of
from siftline.recipe.parse import parse
from siftline.workspace import Workspace

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
SHOWN = re.search(r"## A stage of your own\n.*?```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)


def shown():
    assert SHOWN, "CONTRIBUTING shows no stage"
    return SHOWN[1]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install(name, value, code)` makes a distribution that registers one stage."""
    made = []

    def run(name="word_count", value="KIND", code=None, package="wordy"):
        site = tmp_path / f"{package}-{len(made)}"
        info = site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{package}.py").write_text(code or shown(), encoding="utf-8")
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        points = f"[siftline.stages]\n{name} = {package}:{value}\n"
        (info / "entry_points.txt").write_text(points, encoding="utf-8")
        monkeypatch.syspath_prepend(str(site))
        made.append(package)

    kind_of.cache_clear()
    yield run
    kind_of.cache_clear()
    for module in made:
        sys.modules.pop(module, None)


def recipe(tmp_path, tiny_model, *stages):
    """A recipe on eight questions, two of them answered by one word."""
    lines = [
        f'{{"prompt": "What is {k} + {k}?", "response": "{2 * k}{" it is, of course" * (k > 1)}"}}'
        for k in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return parse(
        {
            "name": "own",
            "pool": {"name": "rows", "inputs": [{"path": str(tmp_path / "rows.jsonl")}]},
            "models": {"base": {"path": str(tiny_model)}},
            "stages": list(stages),
            "budget": {"unit": "rows", "size": 4},
        }
    )


def test_a_stage_as_shown_runs_from_a_package(install, tmp_path, tiny_model, mini_tools):
    assert len(shown().splitlines()) <= 60
    install()
    assert isinstance(kind_of("word_count"), StageKind)
    own = recipe(tmp_path, tiny_model, "duplicates", {"word_count": {"least": 2}})
    done = mini_tools.run_chain(tmp_path / "root", own)
    output = done[-1][1]
    assert (output.accounting.kept, output.accounting.removed) == (6, 2)
    removed = output.all_decisions().filter(outcome="removed")
    assert set(removed["reason"]) == {"few_words"}
    assert set(removed["value"]) == {1.0}
    assert set(removed["threshold"]) == {2.0}
    assert (Workspace(tmp_path / "root").root / "curated" / "own" / "latest").exists()


def test_its_assets_stand_in_the_graph(install, tmp_path, tiny_model):
    from siftline.pipelines.compose import recipe_assets

    install()
    own = recipe(tmp_path, tiny_model, "word_count")
    (asset,) = [a for a in recipe_assets(own) if a.key.path[-1] == "word_count"]
    assert "fewer words" in asset.descriptions_by_key[asset.key]


def test_its_options_are_checked_as_any(install, tmp_path, tiny_model):
    install()
    with pytest.raises(ValueError, match=r"^stages\.word_count: least is 0: it must be at least 1"):
        recipe(tmp_path, tiny_model, {"word_count": {"least": 0}})
    with pytest.raises(ValueError, match=r"unknown stage 'word_cont': .*'word_count'"):
        recipe(tmp_path, tiny_model, "word_cont")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("verify", "KIND", "has the name of one of siftline's"),
        ("other", "KIND", "give its StageKind"),
        ("word_count", "WordCount", "give its StageKind"),
        ("word_count", "NONE", "can't be loaded"),
    ],
)
def test_an_entry_point_that_is_no_stage_is_refused(install, name, value, said):
    install(name, value)
    with pytest.raises(ValueError, match=said) as error:
        kind_of(name)
    assert "wordy" in str(error.value)
    assert "\n" not in str(error.value)


def test_two_packages_with_one_name_are_refused(install):
    install()
    install(package="wordier")
    with pytest.raises(ValueError, match="wordier and wordy register a stage 'word_count' each"):
        kind_of("word_count")


def test_built_in_kinds_are_whole():
    for name in BUILT_IN:
        kind = kind_of(name)
        assert kind.run == f"siftline.stages.{name}.run:run"
        assert callable(kind.runner())
        assert kind.options.__module__ in {
            f"siftline.stages.{name}.{part}" for part in ("options", "decide")
        }
        assert {kind_of(gate).role for gate in kind.repeats} <= {"gate"}

"""Which rows the arms take that the curated one is held against."""

import pyarrow as pa
import pytest

from siftline.ingest.pool import Pool
from siftline.kernels.text.words import words
from siftline.recipe.sections import ARMS
from siftline.rows.ledger import REMOVED
from siftline.scoring.templates import load_tokenizer
from siftline.scoring.verifiers import get_verifier
from siftline.stages.arms import Draw, rows_of_arm
from siftline.stages.models import model_spec
from siftline.stages.run import outputs
from siftline.training.schedule import tokenize_rows
from siftline.workspace import Workspace

BUDGET = 900


@pytest.fixture
def arm(finished, mini, mini_tools, tmp_path):
    workspace, recipe = Workspace(mini_tools.copy_root(finished.root, tmp_path / "root")), mini()
    tokenizer = load_tokenizer(model_spec(workspace, recipe, "target"))
    draw = Draw(tokenizer, 384, BUDGET)

    def rows(name, seed=0, emit=lambda line: None):
        return rows_of_arm(workspace, recipe, name, draw, seed, emit).rows

    rows.workspace, rows.recipe, rows.draw = workspace, recipe, draw
    return rows


def ids(table):
    return set(table.column("id").to_pylist())


def tokens(arm, table):
    return int(tokenize_rows(table, arm.draw.tokenizer, 384).loss_tokens.sum())


def gone(arm, *kinds):
    done = outputs(arm.workspace, arm.recipe)
    tables = [out.all_decisions().filter(outcome=REMOVED) for s, out in done if s.kind in kinds]
    return {i for table in tables for i in table["id"].to_list()}


def test_each_random_arm_draws_from_its_own_rows_up_to_the_budget(arm):
    pool = ids(Pool(arm.workspace.pool("mini")).all_rows(["id"]))
    unclean = gone(arm, "duplicates", "decontamination")
    assert len(unclean) > 5
    assert ids(arm("full")) == pool
    for name in ("random", "random_clean", "random_sampled"):
        drawn = arm(name)
        # One row that would pass the budget is left out, and rows have at most 120 loss tokens.
        assert BUDGET - 120 < tokens(arm, drawn) <= BUDGET
        assert ids(drawn) == ids(arm(name))
        assert ids(drawn) != ids(arm(name, seed=1))
    seeds = range(12)
    assert unclean & set().union(*(ids(arm("random", s)) for s in seeds))
    assert not unclean & set().union(*(ids(arm("random_clean", s)) for s in seeds))


def test_vanilla_sampling_spends_the_draws_of_the_chain_and_adds_what_is_right(arm, forwards):
    said = []
    arm_rows = arm("random_sampled", emit=said.append)
    facts = {s.kind: out.facts for s, out in outputs(arm.workspace, arm.recipe)}
    draws = facts["rejection_sampling"]["draws"]
    assert said[0].startswith(f"random_sampled: {draws:,} vanilla draws, ")
    # The chain's own draws of the same prompts are found in the store.
    assert 0 < forwards["generate"] <= draws
    pool = ids(Pool(arm.workspace.pool("mini")).all_rows(["id"]))
    known = {r["prompt_id"]: r for r in Pool(arm.workspace.pool("mini")).all_rows().to_pylist()}
    wide = Draw(arm.draw.tokenizer, 384, 10**6)
    everything = rows_of_arm(arm.workspace, arm.recipe, "random_sampled", wide, 0).rows
    added = [r for r in everything.to_pylist() if r["id"] not in pool]
    assert added, "the mini pool has prompts that any model solves now and then"
    check = get_verifier("math")
    texts = [(r["id"][:20], words(r["messages"][-1]["content"])) for r in added]
    assert len(set(texts)) == len(texts)
    assert all(check(text, known[prompt]["answer"]).correct for prompt, text in texts)
    assert pa.types.is_list(arm_rows.schema.field("messages").type)


def test_an_arm_without_its_stage_is_refused(arm, mini):
    assert set(ARMS) == {"full", "random", "random_clean", "random_sampled", "curated"}
    with pytest.raises(ValueError, match="arm 'best' is unknown: choose full, random"):
        mini("training.arms=[best]")

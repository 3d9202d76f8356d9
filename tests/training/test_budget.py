"""Loss-token budgets: who is seen, in which order, and how steps are cut."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftline.rows import schema
from siftline.training.material import read_rows
from siftline.training.schedule import plan_steps, rows_for_budget, rows_for_epochs, tokenize_rows
from siftline.training.sft import FineTune

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def names(n):
    return [f"{i:040x}" for i in range(n)]


def table(pairs):
    turns = [[schema.message("user", q), schema.message("assistant", a)] for q, a in pairs]
    return pa.Table.from_pylist([schema.make_row(t) for t in turns], schema=schema.ROW)


@given(SIZES, st.integers(1, 500), st.integers(0, 3))
def test_a_budget_is_met_to_within_one_row(sizes, budget, seed):
    ids = names(len(sizes))
    size = dict(zip(ids, sizes, strict=True))
    try:
        sequence = rows_for_budget(ids, np.array(sizes), budget, seed)
    except ValueError:
        assert max(sizes) > budget
        return
    spent = sum(size[i] for i in sequence)
    assert budget - max(sizes) < spent <= budget
    epochs, rest = divmod(len(sequence), len(ids))
    for epoch in range(epochs):  # each epoch holds each row once
        part = sequence[epoch * len(ids) : (epoch + 1) * len(ids)]
        assert sorted(part) == ids
    assert len(set(sequence[epochs * len(ids) :])) == rest


@given(SIZES, st.randoms(use_true_random=False))
def test_input_order_changes_nothing(sizes, random):
    ids = names(len(sizes))
    pairs = list(zip(ids, sizes, strict=True))
    random.shuffle(pairs)
    budget = 3 * max(sizes) + sum(sizes)
    straight = rows_for_budget(ids, np.array(sizes), budget, 7)
    mixed = rows_for_budget([i for i, _ in pairs], np.array([s for _, s in pairs]), budget, 7)
    assert straight == mixed


def test_epochs_and_seeds_have_orders_of_their_own():
    ids = names(50)
    sequence = rows_for_epochs(ids, 2.0, seed=0)
    assert sorted(sequence[:50]) == sorted(sequence[50:]) == ids
    assert sequence[:50] != sequence[50:]
    assert sequence[:50] != rows_for_epochs(ids, 1.0, seed=1)
    assert rows_for_epochs(ids, 0.5, seed=0) == sequence[:25]
    assert sequence == rows_for_budget(ids, np.ones(50), 100, seed=0)


@given(st.lists(st.integers(1, 80), min_size=1, max_size=120), st.data())
def test_steps_hold_every_row_once_in_order_and_nearly_equal_tokens(sizes, data):
    parts = data.draw(st.integers(1, 4).filter(lambda p: p <= len(sizes)))
    steps = data.draw(st.integers(1, len(sizes) // parts))
    plan = plan_steps(np.array(sizes), steps, parts)
    assert len(plan) == steps
    assert all(len(step) == parts and all(len(part) for part in step) for step in plan)
    flat = np.concatenate([part for step in plan for part in step])
    np.testing.assert_array_equal(flat, np.arange(len(sizes)))


def test_steps_are_balanced_by_tokens_not_rows():
    sizes = np.array([10] * 100 + [1] * 1000)  # half of all tokens in 100 of 1,100 rows
    plan = plan_steps(sizes, 10)
    spent = [int(sum(sizes[part].sum() for part in step)) for step in plan]
    assert max(spent) - min(spent) <= 10
    assert len(plan[0][0]) == 20
    assert len(plan[-1][0]) == 200


def test_too_few_rows_for_the_steps_is_an_error():
    with pytest.raises(ValueError, match="7 rows can't fill 4 steps of 2"):
        plan_steps(np.ones(7), 4, 2)


@pytest.mark.parametrize(("sizes", "budget"), [([], 5), ([3, 0], 5), ([6, 7], 5)])
def test_a_budget_that_can_not_be_spent_is_an_error(sizes, budget):
    with pytest.raises(ValueError, match=r"give each row|raise it"):
        rows_for_budget(names(len(sizes)), np.array(sizes), budget, 0)


def test_the_span_is_the_response_and_its_end(tiny):
    tokenizer = tiny.make_tokenizer(bos=True)
    rows = tokenize_rows(table([("1+1?", "It is 2"), ("Ünal?", "Ja")]), tokenizer, 100)
    texts = set()
    for position in range(2):
        tokens, start = rows.row(position)
        texts.add((tokenizer.decode(tokens[:start]), tokenizer.decode(tokens[start:])))
        assert rows.loss_tokens[position] == len(tokens) - start
    assert texts == {
        ("<bos>Question: 1+1?\nAnswer:", " It is 2<eos>"),
        ("<bos>Question: Ünal?\nAnswer:", " Ja<eos>"),
    }
    assert rows.loss_tokens.tolist() == [len(" It is 2") + 1, len(" Ja") + 1]  # one token a byte


def test_what_can_not_be_trained_on_is_named(tiny):
    data = table([("q", "fine"), ("q2", "long " * 40), ("q3", "")])
    rows = tokenize_rows(data, tiny.make_tokenizer(), 60)
    assert len(rows.ids) == 1
    reasons = dict(rows.skipped.select("reason", "value").iter_rows())
    tokens = len("Question: q2\nAnswer: ") + len("long " * 40) + 1  # text is kept
    assert reasons == {"too_long": tokens, "empty_response": None}
    assert rows.skipped.filter(reason="too_long")["threshold"].item() == 60
    said = f"shortest too long has {tokens} tokens, max_length is 60: raise it"
    with pytest.raises(ValueError, match=f"none of 1 rows can be trained on .too_long; the {said}"):
        tokenize_rows(data.slice(1, 1), tiny.make_tokenizer(), 60)
    with pytest.raises(ValueError, match="1 ids come twice"):
        tokenize_rows(pa.concat_tables([data, data.slice(0, 1)]), tiny.make_tokenizer(), 60)


def test_what_is_no_conversation_is_skipped_and_counted(tiny):
    good = table([("q", "fine")]).to_pylist()[0]
    user = schema.message("user", "q")
    shapes = {"a": [schema.message("assistant", "x"), user], "b": [], "c": None, "d": [None, user]}
    lines = [good, *(good | {"id": identity, "messages": m} for identity, m in shapes.items())]
    fields = [field.with_nullable(True) for field in schema.ROW]
    data = pa.Table.from_pylist(lines, schema=pa.schema(fields))
    rows = tokenize_rows(data, tiny.make_tokenizer(), 60)
    assert rows.ids == [good["id"]]
    assert rows.skipped.select("id", "reason").rows() == [
        (identity, "not_a_conversation") for identity in "abcd"
    ]


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("id", [3], "column id is int64: ids are strings"),
        ("messages", ["hello"], "column messages is string: give a list of role and content"),
        ("messages", [["hello"]], "column messages is list"),
        ("messages", [[{"from": "a", "value": "b"}]], "give a list of role and content"),
    ],
)
def test_columns_of_other_types_are_refused(tmp_path, column, values, said):
    data = table([("q", "fine")]).select(["id", "messages"])
    place = data.schema.get_field_index(column)
    pq.write_table(data.set_column(place, column, pa.array(values)), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=said):
        read_rows([tmp_path / "d.parquet"], FineTune())
    assert read_rows(data, FineTune()) is data

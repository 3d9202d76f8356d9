"""S3FT: own answer where it is right, else a right paraphrase, else the row as it was."""

from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siftline.recipe.parse import parse
from siftline.rows import schema
from siftline.rows.ledger import KEPT, REMOVED
from siftline.rows.schema import make_row, message
from siftline.scoring.engines.base import Failed, Generation, ModelSpec
from siftline.scoring.recorder import Recorder
from siftline.scoring.templates import load_tokenizer
from siftline.stages.rejection_sampling.options import JUDGE
from siftline.stages.rejection_sampling.problems import grader
from siftline.stages.s3ft.options import SelfAnswers
from siftline.stages.s3ft.run import ROUTES, _answers, _result


class Scripted:
    """Answers by what the question says: "own 3" gives 3, "para 4" gives 4 when asked again."""

    max_length = 2000

    def __init__(self, tokenizer, name="scripted"):
        self.tokenizer, self.name, self.asked = tokenizer, name, []

    def fingerprint(self):
        return self.name

    def generate(self, prompts, seeds, how):
        return [
            [self.one(p, i) for i, _ in enumerate(s)] for p, s in zip(prompts, seeds, strict=True)
        ]

    def one(self, tokens, i):
        text = self.tokenizer.decode(tokens)
        again = "Write this answer again" in text
        self.asked.append(again)
        words = text.replace(":", " ").split()
        if "broken" in words:
            return Failed("timeout")
        assert "own" in words, text
        said = words[words.index("para" if again else "own") + 1]
        return Generation(f"In my own words {i}.\n#### {said}", 5, "stop")


def row(own, para, answer="7", source="book", independent=True):
    question = f"Sum own {own} para {para} of {source}"
    turns = [message("user", question), message("assistant", f"The book says\n#### {answer}")]
    kept = answer if independent else None
    return {**make_row(turns, answer=kept, source=source), "parent_id": None, "origin": None}


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelSpec(path=str(tiny_model)))


def answered(rows, tokenizer, root, judge=None, **options):
    engine = Scripted(tokenizer)
    spec = ModelSpec(path="x", max_length=2000)
    rows = sorted(rows, key=lambda r: r["id"])
    chosen = SelfAnswers(max_new_tokens=8, **options)
    recorder = Recorder(engine, spec, root)
    grade = grader(chosen.verifier, lambda: judge or pytest.fail("no judge is asked"))
    return _answers(recorder, 0, rows, chosen, grade), engine, rows


def decided(rows, found, before=()):
    table = pa.Table.from_pylist(
        rows, schema=pa.schema([f.with_nullable(True) for f in schema.ADDED])
    )
    ids = [r["id"] for r in rows]
    context = SimpleNamespace(
        in_play=lambda b: ids, rows=lambda b: table, known=lambda b: {*ids, *before}
    )
    return _result(context, 0, found)


def test_known_routes_give_exact_shares_and_no_row_is_lost(tokenizer, tmp_path):
    rows = [
        row(7, 1),  # says it itself
        row(1, 7),  # can only say it again
        row(1, 2),  # neither
        row(7, 7, independent=False),
    ]
    found, engine, rows = answered(rows, tokenizer, tmp_path)
    assert sorted(found.route.values()) == [
        "no_independent_answer", "own_answer", "paraphrase", "reference",
    ]  # fmt: skip
    assert set(found.route) == {r["id"] for r in rows}
    assert engine.asked.count(False) == 6  # two own draws of each with an answer
    assert engine.asked.count(True) == 4  # paraphrases only where these failed
    result = decided(rows, found)
    lines = result.to_table().to_pylist()
    outcome = {line["id"]: (line["outcome"], line["reason"], line["added"]) for line in lines}
    for r in rows:
        route = found.route[r["id"]]
        replaced = route in ("own_answer", "paraphrase")
        assert outcome[r["id"]] == ((REMOVED, route, False) if replaced else (KEPT, None, False))
    added = {r["parent_id"]: r for r in result.added.to_pylist()}
    assert set(added) == {i for i, w in found.route.items() if w in ("own_answer", "paraphrase")}
    for parent, new in added.items():
        assert new["messages"][-1]["content"] == "In my own words 0.\n#### 7"
        assert new["origin"] == f"s3ft {found.route[parent]}"
        assert (new["answer"], new["source"]) == ("7", "self")


def test_rows_of_one_prompt_get_different_answers(tokenizer, tmp_path):
    """Two sources answer one prompt: the draws are the prompt's, each is used once."""
    first = row(7, 1, source="book")
    turns = [*first["messages"][:-1], message("assistant", "Otherwise put\n#### 7")]
    second = {**make_row(turns, answer="7", source="web"), "parent_id": None, "origin": None}
    found, _, _ = answered([first, second], tokenizer, tmp_path)
    assert set(found.route.values()) == {"own_answer"}
    assert len(set(found.text.values())) == 2


def test_a_row_without_any_draw_fails_and_no_paraphrase_is_asked_where_none_is_wanted(
    tokenizer, tmp_path
):
    broken = row(7, "7 broken")
    found, _, rows = answered([broken, row(1, 7)], tokenizer, tmp_path, paraphrases=0)
    assert found.failed == {broken["id"]: "timeout"}
    assert list(found.route.values()) == ["reference"]
    result = decided(rows, found)
    assert result.failed == found.failed
    assert result.decisions.height == 1


def test_two_rows_of_a_prompt_never_become_one(tokenizer, tmp_path):
    """One says it itself, the other's paraphrase comes to the same words."""
    turns = row(1, 7)["messages"]
    rows = [
        {**make_row([*turns[:-1], message("assistant", f"{w}\n#### 7")], answer="7", source=w),
         "parent_id": None, "origin": None}
        for w in ("one", "two", "three")
    ]  # fmt: skip
    found, _, ordered = answered(rows, tokenizer, tmp_path, paraphrases=1)
    routes = sorted(found.route.values())
    assert routes == ["paraphrase", "reference", "reference"]
    result = decided(ordered, found)
    assert result.added.num_rows == 1
    # A row that was written before is not written again, nor lost.
    (new,) = result.added.column("id").to_pylist()
    again = decided(ordered, found, before=[new])
    assert again.added.num_rows == 0
    assert again.decisions["kept"].all()


def test_the_same_words_leave_the_row_as_it_is(tokenizer, tmp_path):
    turns = [message("user", "own 7 para 1"), message("assistant", "In my own words 0.\n#### 7")]
    same = {**make_row(turns, answer="7"), "parent_id": None, "origin": None}
    found, _, rows = answered([same], tokenizer, tmp_path)
    assert (found.route, found.text) == ({same["id"]: "own_answer"}, {})
    assert decided(rows, found).added.num_rows == 0


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(5, 8), st.integers(5, 8), st.booleans()), max_size=8))
def test_in_and_out_close_whatever_the_model_says(tokenizer, tmp_path, kinds):
    rows = {r["id"]: r for r in (row(a, b, source=f"s{i}", independent=c)
                                 for i, (a, b, c) in enumerate(kinds))}  # fmt: skip
    found, _, ordered = answered(list(rows.values()), tokenizer, tmp_path)
    again, engine, _ = answered(list(rows.values())[::-1], tokenizer, tmp_path)
    assert (found, engine.asked) == (again, [])  # from the store, in any order
    result = decided(ordered, found)
    lines = result.to_table().to_pylist()
    kept = sum(line["outcome"] == KEPT for line in lines)
    removed = sum(line["outcome"] == REMOVED for line in lines)
    assert len(rows) + result.added.num_rows == kept + removed
    assert removed == result.added.num_rows  # nothing is lost, nothing is gained
    assert set(found.route.values()) <= set(ROUTES)


def test_gates_judge_what_the_stage_wrote():
    recipe = parse(
        {
            "name": "mine",
            "pool": {"name": "p", "inputs": [{"path": "x.jsonl"}]},
            "models": {"m": {"path": "/nowhere"}},
            "stages": ["duplicates", "decontamination", "s3ft"],
            "budget": {"size": 10, "unit": "rows"},
        }
    )
    names = [(stage.name, stage.scope) for stage in recipe.stages[2:]]
    assert names == [
        ("s3ft", "all"), ("duplicates_added", "added"), ("decontamination_added", "added"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="draws is 0"):
        SelfAnswers(draws=0)


# ---- a judge ---------------------------------------------------------------------------------


def same_word(scripted, asked):
    """A judge for whom two answers are the same that name the same metal."""

    def votes(prompt, options):
        asked.append(prompt)
        first, _, second = prompt.partition("Answer 1:")[2].partition("Answer 2:")
        names = [{m for m in ("iron", "gold", "tin") if m in part} for part in (first, second)]
        return scripted.logs(*((0.9, 0.1) if names[0] == names[1] else (0.1, 0.9)))

    return votes


class Metals(Scripted):
    """Says a metal where `Scripted` says a number: free text that no rule can read."""

    def one(self, tokens, i):
        said = super().one(tokens, i)
        return Generation(said.text.replace("#### ", "It's "), 5, "stop")


def metal(own, para, gold, answer=None):
    turns = [message("user", f"Which own {own} para {para} for {gold}?")]
    turns.append(message("assistant", f"One takes {gold} here."))
    return {**make_row(turns, answer=answer, source="book"), "parent_id": None, "origin": None}


def test_a_judge_serves_rows_that_have_no_answer_to_a_rule(tokenizer, scripted, tmp_path):
    asked: list[str] = []
    engine = scripted.Scripted("judge", tokenizer, votes=same_word(scripted, asked))
    judge = Recorder(engine, ModelSpec("nowhere", max_length=2048), tmp_path / "judge")
    rows = [
        metal("iron", "tin", "iron"),  # says it itself
        metal("tin", "gold", "gold"),  # can only say it again
        metal("tin", "tin", "iron"),  # neither
        metal("gold", "gold", "iron", answer="gold"),  # right by its answer, not by its response
    ]
    chosen = SelfAnswers(max_new_tokens=8, verifier=JUDGE)
    drawn = Recorder(Metals(tokenizer), ModelSpec(path="x", max_length=2000), tmp_path / "draws")
    ordered = sorted(rows, key=lambda r: r["id"])
    found = _answers(drawn, 0, ordered, chosen, grader(JUDGE, lambda: judge))
    routes = [found.route[r["id"]] for r in rows]
    assert routes == ["own_answer", "paraphrase", "reference", "own_answer"]
    assert "iron" in found.text[rows[0]["id"]]
    assert "gold" in found.text[rows[1]["id"]]
    assert found.verdicts["match"] == 3
    assert found.verdicts["wrong_answer"] == 2 + 4  # two draws of one, four of the other
    result = decided(ordered, found)
    added = {r["parent_id"]: r for r in result.added.to_pylist()}
    assert added.keys() == found.text.keys()
    assert added[rows[0]["id"]]["answer"] is None
    assert added[rows[3]["id"]]["answer_from"] == "independent"
    # Each pair is asked once in both orders, and none of a row that is already served.
    assert len(asked) == len(set(asked)) <= 2 * sum(found.verdicts.values())


def test_a_judge_that_can_not_tell_replaces_nothing(tokenizer, scripted, tmp_path):
    engine = scripted.Scripted("place", tokenizer, votes=lambda p, o: scripted.logs(0.5, 0.5))
    judge = Recorder(engine, ModelSpec("nowhere", max_length=2048), tmp_path / "judge")
    rows = [metal("iron", "iron", "iron")]
    drawn = Recorder(Metals(tokenizer), ModelSpec(path="x", max_length=2000), tmp_path / "draws")
    chosen = SelfAnswers(max_new_tokens=8, verifier=JUDGE)
    found = _answers(drawn, 0, rows, chosen, grader(JUDGE, lambda: judge))
    assert (list(found.route.values()), found.text) == (["reference"], {})
    assert found.verdicts["verifier_error"] == 4
    assert decided(rows, found).decisions["kept"].all()


def test_a_recipe_with_a_judge_asks_for_its_model():
    from siftline.recipe.kinds import kind_of

    assert kind_of("s3ft").models(SelfAnswers(), None) == ("target",)
    assert kind_of("s3ft").models(SelfAnswers(verifier="judge"), None) == ("target", "judge")

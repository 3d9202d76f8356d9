import json
from collections import Counter, defaultdict

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from siftline.demo.arithmetic import DRILLS, NEAR, generate, word_runs
from siftline.demo.defects import truncate, wrong_steps
from siftline.demo.problems import (
    LEVELS,
    LONGEST_QUESTION,
    LONGEST_RESPONSE,
    SOURCES,
    Dice,
    apply_op,
    make_problem,
    render,
)
from siftline.demo.rows import write_jsonl
from siftline.demo.summary import ACCEPTED, CHARGED, audit, wrong_removals
from siftline.kernels.sets.jaccard import jaccard_reference
from siftline.kernels.sets.shingles import char_shingles_reference
from siftline.kernels.text.words import numbers, words
from siftline.rows.schema import make_row, message
from siftline.scoring.answers.find import answer_key, extract_answer
from siftline.stages.canaries import similarity

SIZES = {"prompts": 600, "test": 160, "dev": 40, "target": 40, "corpus": 800}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    generate(folder / "in", folder / "truth", seed=0, **SIZES)
    return folder


@pytest.fixture(scope="module")
def pool(made):
    return read(made / "in" / "pool.jsonl")


@pytest.fixture(scope="module")
def truth(made):
    return {row["id"]: row for row in read(made / "truth" / "rows.jsonl")}


def identity(row):
    messages = [message("user", row["question"]), message("assistant", row["response"])]
    return make_row(messages, answer=row["answer"], source=row["source"])["id"]


def test_same_arguments_same_bytes_and_another_seed_other_rows(made, tmp_path):
    generate(tmp_path / "a", tmp_path / "b", seed=0, **SIZES)
    for path in (made / "in").iterdir():
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "b" / "rows.jsonl").read_bytes() == (
        made / "truth" / "rows.jsonl"
    ).read_bytes()
    generate(tmp_path / "c", tmp_path / "d", seed=1, **SIZES)
    assert (tmp_path / "c" / "pool.jsonl").read_bytes() != (
        tmp_path / "a" / "pool.jsonl"
    ).read_bytes()


def test_truth_and_pool_name_the_same_rows(pool, truth):
    assert Counter(map(identity, pool)) == Counter(list(truth))
    for row in truth.values():
        assert row["twin"] is None or truth[row["twin"]]["defect"] is None


def test_each_defect_is_planted_at_its_rate_and_is_what_it_says(truth):
    added = ("exact_duplicate", "near_duplicate", "off_topic", "leaked_test", "conflict")
    base = sum(row["defect"] not in added for row in truth.values())
    counts = Counter(row["defect"] for row in truth.values())
    assert set(counts) == {None, *ACCEPTED} - {"wrong_without_reference"}  # of examples/smollm2
    for defect, rate in (
        ("exact_duplicate", 0.05),
        ("wrong_vs_reference", 0.06),
        ("conflict", 0.03),
    ):
        assert counts[defect] == round(rate * base)
    assert 0.03 * base < counts["wrong_with_reference"] < 0.07 * base
    for row in truth.values():
        said, defect = extract_answer(row["response"]), row["defect"]
        if defect == "truncated":
            assert said is None
            assert row["clean_response"].startswith(row["response"])
        elif defect == "off_topic":
            assert said is row["answer"] is None
        else:
            right = answer_key(said) == row["true_answer"]
            assert right == (
                defect not in ("wrong_vs_reference", "wrong_with_reference", "conflict")
            )
            if defect in ("wrong_with_reference", "conflict"):
                assert row["answer"] == answer_key(said)
            elif row["answer"] is not None:
                assert row["answer"] == row["true_answer"]


def test_copies_are_near_and_clean_rows_are_not(truth):
    near = [row for row in truth.values() if row["defect"] == "near_duplicate"]
    assert near
    for row in near:
        twin = truth[row["twin"]]
        assert any(words(row[c]) != words(twin[c]) for c in ("question", "response"))
        for column in ("question", "response"):
            left, right = words(row[column]), words(twin[column])
            jaccard = jaccard_reference(
                char_shingles_reference(left, 5), char_shingles_reference(right, 5)
            )
            assert numbers(left) == numbers(right)
            assert jaccard == pytest.approx(similarity(row[column], twin[column]))
            assert jaccard >= NEAR > 0.85
    prompts = defaultdict(list)
    for row in truth.values():
        if row["defect"] in ("exact_duplicate", "near_duplicate"):
            continue
        prompts[row["question"]].append(row["response"])
    pairs = [(a, b) for group in prompts.values() for a in group for b in group if a < b]
    assert len(pairs) > 300
    # "8 - 6 = 2" and "so 8-6=2" have the same words but one, and are copies of each other.
    close = [(a, b) for a, b in pairs if similarity(a, b) >= 0.8]
    assert len(close) <= len(pairs) // 50
    assert all(a.removeprefix("so ").replace(" ", "") == b.removeprefix("so ").replace(" ", "")
               for a, b in close)  # fmt: skip


def test_no_clean_row_overlaps_the_evaluation_sets_and_leaks_do(made, truth):
    guarded, evaluation = set(), set()
    for name in ("test", "dev", "target"):
        questions = {row["question"] for row in read(made / "in" / f"{name}.jsonl")}
        assert len(questions) == SIZES[name]
        assert evaluation.isdisjoint(questions)
        evaluation |= questions
        guarded |= set().union(*map(word_runs, questions))
    test = {row["question"] for row in read(made / "in" / "test.jsonl")}
    leaks = [row for row in truth.values() if row["defect"] == "leaked_test"]
    verbatim = sum(row["question"] in test for row in leaks)
    assert 0 < verbatim < len(leaks)
    for row in truth.values():
        overlaps = not guarded.isdisjoint(word_runs(row["question"]))
        assert overlaps == (row["defect"] == "leaked_test")


def independent(groups, defects):
    """p value of a chi-square test that groups and defects have nothing to do with each other."""
    table = pl.DataFrame({"g": groups, "d": defects}).pivot("d", index="g", values="d",
                                                            aggregate_function="len")  # fmt: skip
    return chi2_contingency(table.drop("g").fill_null(0).to_numpy()).pvalue


def test_neither_source_nor_position_nor_column_gives_a_defect_away(pool, truth):
    defects = [truth[identity(row)]["defect"] or "clean" for row in pool]
    columns = {
        "source": [row["source"] for row in pool],
        "position": [i * 10 // len(pool) for i in range(len(pool))],
        "batch": [row["batch"] for row in pool],
        "month": [row["created"][:7] for row in pool],
        "id": [identity(row)[0] for row in pool],
        "id end": [identity(row)[-1] for row in pool],
    }
    assert set(pool[0]) == {"question", "response", "answer", "source", "batch", "created", "lang"}
    assert {row["lang"] for row in pool} == {"en"}
    for name, groups in columns.items():
        # Rows of a mislabelled prompt share their prompt id; only the others are independent.
        kept = [i for i, d in enumerate(defects) if name != "id" or d != "wrong_with_reference"]
        assert independent([groups[i] for i in kept], [defects[i] for i in kept]) > 1e-3, name
    # The test can fail: sorted by defect, position tells everything.
    assert independent(columns["position"], sorted(defects)) < 1e-9


def test_the_corpus_reads_every_character_and_no_evaluation_or_pool_question(made, pool):
    texts = [line["text"] for line in read(made / "in" / "corpus.jsonl")]
    drills = [text for text in texts[1:] if not text.startswith("Question: ")]
    assert len(texts) - len(drills) == SIZES["corpus"]
    assert abs(len(drills) - DRILLS * SIZES["corpus"]) < 4 * (0.25 * SIZES["corpus"]) ** 0.5
    for line in "\n".join(drills).split("\n"):
        left, op, right, _, value = line.split()
        assert apply_op(int(left), op, int(right)) == int(value)
    written = pool + [
        r for n in ("test", "dev", "target") for r in read(made / "in" / f"{n}.jsonl")
    ]
    used = set("".join(row["question"] + row["response"] for row in written))
    assert used - {"\n"} <= set(texts[0])
    asked = {text.removeprefix("Question: ").split("\n")[0] for text in texts[1:]}
    assert asked.isdisjoint(row["question"] for row in written)
    verdicts = Counter(text[-1] for text in texts[1:] if "Proposed answer:" in text)
    total = sum(verdicts.values())
    assert abs(total - 0.1 * SIZES["corpus"]) < 4 * (0.1 * 0.9 * SIZES["corpus"]) ** 0.5
    assert abs(verdicts["A"] - verdicts["B"]) < 4 * total**0.5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(LEVELS))
def test_problems_add_up_and_every_spoiled_one_does_not(identity, level):
    dice = Dice(7, "test", str(identity))
    problem = make_problem(dice, level)
    assert len(problem.steps) == problem.level == level
    assert len(problem.question) <= LONGEST_QUESTION
    for before, after in zip(problem.steps, problem.steps[1:], strict=False):
        assert after.left == before.value
    assert all(apply_op(s.left, s.op, s.right) == s.value for s in problem.steps)
    wrong = wrong_steps(problem.steps, dice)
    assert wrong[-1].value != problem.answer
    assert sum(apply_op(s.left, s.op, s.right) != s.value for s in wrong) == 1
    for style in range(len(SOURCES)):
        response = render(style, problem.steps, dice)
        assert len(response) <= LONGEST_RESPONSE
        assert answer_key(extract_answer(response)) == str(problem.answer)
        assert extract_answer(truncate(response, dice)) is None


def test_bad_arguments_are_refused_in_one_line(tmp_path):
    for arguments, said in (
        ({"prompts": 0}, "at least 1"),
        ({"off_topic": 0.5}, "share from 0"),
        ({"typo": 0.1}, "unknown argument"),
        ({"verdicts": 1.0}, "verdicts 1.0"),
        ({"test": 5}, "too few"),
    ):
        with pytest.raises(ValueError, match=said):
            generate(tmp_path / "in", tmp_path / "truth", seed=0, **arguments)
    with pytest.raises(ValueError, match="lies in"):
        generate(tmp_path / "in", tmp_path / "in" / "truth", seed=0)
    assert not (tmp_path / "in").exists()


def test_the_audit_counts_matching_gates_only(tmp_path):
    def row(name, defect=None, twin=None):
        return {"id": name, "defect": defect, "twin": twin}

    write_jsonl(tmp_path / "rows.jsonl", [
        row("c1"), row("c2"), row("c3"), row("c4"), row("c5"),
        row("e1", "exact_duplicate", "c1"), row("e2", "exact_duplicate", "c2"),
        row("n1", "near_duplicate", "c3"),
        row("w1", "wrong_vs_reference"), row("w2", "wrong_vs_reference"),
        row("t1", "truncated"), row("l1", "leaked_test"), row("l2", "leaked_test"),
    ])  # fmt: skip
    gone = [
        ("duplicates", "gate", "e1", "exact_duplicate"),
        ("duplicates", "gate", "c2", "exact_duplicate"),  # the original went for its copy
        ("verify", "gate", "w1", "wrong_answer"),
        ("duplicates", "gate", "w2", "near_duplicate"),  # removed, but not caught
        ("allocate", "budget", "t1", "quota"),  # a budget never counts
        ("diversity", "shortlist", "n1", "near_duplicate"),  # nor does a shortlist
        ("decontamination", "gate", "l1", "overlaps_test"),
        ("confidence", "gate", "c4", "low_confidence"),
        ("mine", "gate", "c5", "my_reason"),
        ("verify", "gate", "added", "wrong_answer"),  # not in the truth
    ]
    lines = [dict(zip(("stage", "kind", "id", "reason"), g, strict=True), kept=False) for g in gone]
    lines.append({"stage": "verify", "kind": "gate", "id": "l2", "reason": None, "kept": True})
    decisions = pl.DataFrame(lines)

    def counted(planted, caught, wrongly_removed):
        return {"planted": planted, "caught": caught, "wrongly_removed": wrongly_removed}

    assert audit(tmp_path, decisions) == {
        "exact_duplicate": counted(2, 2, 0),
        "near_duplicate": counted(1, 0, 0),
        "wrong_vs_reference": counted(2, 1, 0),
        "wrong_with_reference": counted(0, 0, 1),
        "truncated": counted(1, 0, 0),
        "leaked_test": counted(2, 1, 0),
        "other": counted(0, 0, 1),
    }
    assert wrong_removals(tmp_path, decisions) == {"low_confidence": 1, "my_reason": 1}
    assert audit(tmp_path, decisions.sample(fraction=1.0, shuffle=True, seed=1)) == audit(
        tmp_path, decisions
    )
    assert set(CHARGED.values()) <= set(ACCEPTED)
    with pytest.raises(ValueError, match="no truth"):
        audit(tmp_path / "elsewhere", decisions)

"""The rubric judge: expectation over a scale, and questions with options, against plain loops."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftline.rows.schema import ROW, make_row, message
from siftline.scoring.engines.base import ModelSpec, open_engine
from siftline.scoring.measures.judge import Rubric, choice_question, expected_grade
from siftline.scoring.measures.scorers import columns_of, run_scorer
from siftline.scoring.recorder import Recorder

PAIRS = [(f"What is {i} + {i}?", f"It is {2 * i}." + " Yes." * (i % 4)) for i in range(7)]
ROWS = pa.Table.from_pylist(
    [make_row([message("user", p), message("assistant", r)]) for p, r in PAIRS], schema=ROW
)
SHORT = Rubric("judge", "Grade {low}-{high} {{json}}: {prompt} / {response}", (1, 5))
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think>\n</think>\n"
    "{% endif %}{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def judge(tiny, tmp_path_factory):
    """`judge(template)` is (spec, engine); opened once."""
    folder = tiny.make_model(tmp_path_factory.mktemp("judge") / "model", bos=True)
    opened = {}

    def get(template=CHATML, max_length=900):
        spec = ModelSpec(
            str(folder),
            device="cpu",
            template=template,
            max_length=max_length,
            batch_tokens=1500,
        )
        if spec not in opened:
            opened[spec] = open_engine(spec)
        return spec, opened[spec]

    yield get
    for engine in opened.values():
        engine.close()


class Table:
    """A judge whose log-probabilities of single-token options are given by the prompt's text."""

    def __init__(self, tokenizer, template, rule):
        self.tokenizer, self.max_length, self.rule, self.asked = tokenizer, 2000, rule, 0
        tokenizer.chat_template = template

    def fingerprint(self):
        return "table"

    def choices(self, prompts, options):
        assert all(len(option) == 1 for option in options)
        self.asked += len(prompts)
        names = [self.tokenizer.decode(option) for option in options]
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        return np.array([[self.rule(text, name) for name in names] for text in texts], np.float32)


def lines(frame):
    return {line["id"]: line for line in frame.to_dicts()}


def test_grades_agree_with_a_plain_loop(judge, tmp_path):
    import transformers

    spec, engine = judge()
    frame, failed = run_scorer(SHORT, {"judge": Recorder(engine, spec, tmp_path)}, 0, ROWS)
    assert failed == {}
    assert dict(frame.schema) == columns_of(SHORT)
    assert frame["id"].to_list() == sorted(ROWS.column("id").to_pylist())
    tokenizer = engine.tokenizer
    model = transformers.AutoModelForCausalLM.from_pretrained(spec.path).eval()
    grades = tokenizer.convert_tokens_to_ids(list("12345"))
    for row in ROWS.to_pylist():
        prompt, response = (m["content"] for m in row["messages"])
        text = f"<user>Grade 1-5 {{{{json}}}}: {prompt} / {response}<eos>\n<assistant>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            p = model(ids).logits[0, -1].double().softmax(0)[grades].numpy()
        line = lines(frame)[row["id"]]
        assert line["mass"] == pytest.approx(p.sum(), rel=1e-4)
        assert line["value"] == pytest.approx((p * [1, 2, 3, 4, 5]).sum() / p.sum(), abs=1e-5)
    assert frame["value"].n_unique() == len(PAIRS)


def test_planted_judgements_order_the_rows(tiny, judge, tmp_path):
    spec, _ = judge()

    def rule(text, grade):
        likes = text.count("Yes") + 1
        return math.log(0.6 if int(grade) == likes else 0.1)

    engine = Table(tiny.make_tokenizer(bos=True), CHATML, rule)
    frame, _ = run_scorer(SHORT, {"judge": Recorder(engine, spec, tmp_path)}, 0, ROWS)
    for row in ROWS.to_pylist():
        likes = row["messages"][-1]["content"].count("Yes") + 1
        line = lines(frame)[row["id"]]
        assert line["mass"] == pytest.approx(1.0, abs=1e-6)
        assert line["value"] == pytest.approx(0.6 * likes + 0.1 * (15 - likes), abs=1e-5)


def test_a_judge_that_answers_none_of_the_grades_has_no_mass(tiny, judge, tmp_path):
    spec, _ = judge()
    engine = Table(tiny.make_tokenizer(bos=True), CHATML, lambda text, grade: -80.0 - int(grade))
    frame, failed = run_scorer(SHORT, {"judge": Recorder(engine, spec, tmp_path)}, 0, ROWS)
    assert failed == {}
    assert frame["mass"].max() < 1e-30
    assert frame["value"].is_between(1, 2).all()


def test_a_judge_without_an_answer_fails_the_row(tiny, judge, tmp_path):
    spec, _ = judge()
    engine = Table(
        tiny.make_tokenizer(bos=True),
        CHATML,
        lambda text, grade: math.nan if "3 + 3" in text else -1.0 - int(grade),
    )
    frame, failed = run_scorer(SHORT, {"judge": Recorder(engine, spec, tmp_path)}, 0, ROWS)
    assert list(failed.values()) == ["no_scores"]
    assert frame.height == len(PAIRS) - 1


def test_nothing_is_asked_twice_and_order_does_not_matter(tiny, judge, tmp_path):
    spec, real = judge()
    engine = Table(tiny.make_tokenizer(bos=True), CHATML, lambda text, grade: -float(grade))
    first, _ = run_scorer(SHORT, {"judge": Recorder(engine, spec, tmp_path / "a")}, 0, ROWS)
    assert engine.asked == len(PAIRS)
    run_scorer(
        replace(SHORT, scale=(2, 4)), {"judge": Recorder(engine, spec, tmp_path / "a")}, 0, ROWS
    )
    assert engine.asked == 2 * len(PAIRS), "another scale is another question"
    backwards = ROWS.take(list(range(len(PAIRS)))[::-1])
    again, _ = run_scorer(SHORT, {"judge": Recorder(engine, spec, tmp_path / "a")}, 0, backwards)
    assert engine.asked == 2 * len(PAIRS)
    assert again.equals(first)
    fresh = [
        run_scorer(SHORT, {"judge": Recorder(real, spec, tmp_path / name)}, 0, rows)[0]
        for name, rows in (("b", ROWS), ("c", backwards))
    ]
    assert fresh[0].equals(fresh[1]), "the same bits in another order"


def test_a_template_that_opens_with_a_thought_puts_it_before_the_choice(judge, tmp_path):
    """The grade then follows the empty thought, and is one token again."""
    spec, engine = judge(THINKING)
    recorder = Recorder(engine, spec, tmp_path)
    asked = [{"role": "user", "content": "Grade it"}]
    prompt, options = choice_question(recorder, asked, ["1", "2", "3"], lead_in=True)
    assert engine.tokenizer.decode(prompt) == "<user>Grade it<eos>\n<assistant><think>\n</think>\n"
    assert [engine.tokenizer.decode(option) for option in options] == ["1", "2", "3"]
    plain, longer = choice_question(recorder, asked, ["1", "2", "3"])
    assert engine.tokenizer.decode(plain) == "<user>Grade it<eos>\n<assistant>"
    assert [[*plain, *option] for option in longer] == [[*prompt, *option] for option in options]


def test_a_judge_with_a_thought_is_graded_behind_it(tiny, judge, tmp_path):
    spec, _ = judge(THINKING)
    seen = []

    def rule(text, grade):
        seen.append(text)
        return -float(grade)

    engine = Table(tiny.make_tokenizer(bos=True), THINKING, rule)
    run_scorer(SHORT, {"judge": Recorder(engine, spec, tmp_path)}, 0, ROWS)
    assert seen
    assert all(text.endswith("<assistant><think>\n</think>\n") for text in seen)


def test_an_option_that_merges_with_the_prompt_moves_the_start_of_all(tiny, judge, tmp_path):
    folder = tiny.make_model(tmp_path / "merging", merges=[(":", "1")])
    spec = ModelSpec(
        str(folder),
        device="cpu",
        template=CHATML.replace("<assistant>", "A:").replace(
            "<{{ m.role }}>", "{{ 'A:' if m.role == 'assistant' else 'Q:' }}"
        ),
    )
    recorder = Recorder(open_engine(spec), spec, tmp_path / "store")
    asked = [{"role": "user", "content": "x"}]
    prompt, options = choice_question(recorder, asked, ["1", "2"])
    decode = recorder.engine.tokenizer.decode
    assert [decode([*prompt, *option]) for option in options] == ["Q:x<eos>\nA:1", "Q:x<eos>\nA:2"]
    assert [len(option) for option in options] == [1, 2]


def test_options_keep_a_token_whatever_they_share(judge, tmp_path):
    spec, engine = judge()
    recorder = Recorder(engine, spec, tmp_path)
    asked = [{"role": "user", "content": "x"}]
    _, options = choice_question(recorder, asked, ["ab", "abc", "abd"], lead_in=True)
    assert [engine.tokenizer.decode(option) for option in options] == ["b", "bc", "bd"]


def test_a_row_that_does_not_fit_is_a_reason(judge, tmp_path):
    spec, engine = judge(max_length=120)
    rows = pa.concat_tables(
        [
            ROWS,
            pa.Table.from_pylist(
                [make_row([message("user", "x" * 200), message("assistant", "y")])], schema=ROW
            ),
        ]
    )
    for allowed in (120, 900):  # the recipe may allow more than the model takes
        recorder = Recorder(engine, replace(spec, max_length=allowed), tmp_path)
        frame, failed = run_scorer(SHORT, {"judge": recorder}, 0, rows)
        assert list(failed.values()) == ["too_long"]
        assert frame.height == len(PAIRS)


def test_texts_of_a_row_are_not_looked_into():
    config = Rubric("j", "{prompt}|{response}|{low}|{other}", (0, 9))
    assert config.question("{response}{low}", "{prompt}") == "{response}{low}|{prompt}|0|{other}"


def test_the_judge_reads_reasoning_tools_and_plain_text(tiny, judge, tmp_path):
    spec, _ = judge()
    call = '[{"name": "f", "arguments": {}}]'
    rows = [
        make_row([message("assistant", "Only text.")]),
        make_row(
            [message("user", "Do it"), message("assistant", "", reasoning="Hm.", tool_calls=call)],
            tools='[{"name": "f"}]',
        ),
    ]
    seen = []

    def rule(text, grade):
        seen.append(text)
        return -float(grade)

    engine = Table(tiny.make_tokenizer(bos=True), CHATML, rule)
    table = pa.Table.from_pylist(rows, schema=ROW)
    _, failed = run_scorer(SHORT, {"judge": Recorder(engine, spec, tmp_path)}, 0, table)
    assert failed == {}
    assert any("json}}:  / Only text." in text for text in seen)
    assert any('[{"name": "f"}]\nDo it / Hm.\n' + call in text for text in seen)


@given(
    st.lists(st.floats(-1000, 0), min_size=2, max_size=9),
    st.integers(0, 1),
    st.floats(-50, 50),
)
def test_the_expected_grade_stays_on_the_scale_and_ignores_the_mass(logprobs, low, shift):
    grades = np.arange(low, low + len(logprobs), dtype=float)
    value, mass = expected_grade(np.array(logprobs), grades)
    assert low <= value <= low + len(logprobs) - 1
    assert mass == pytest.approx(sum(math.exp(x) for x in logprobs), rel=1e-9)
    moved, _ = expected_grade(np.array(logprobs) + shift, grades)
    assert moved == pytest.approx(value, abs=1e-9)
    turned, _ = expected_grade(np.array(logprobs[::-1]), grades)
    assert turned == pytest.approx(2 * low + len(logprobs) - 1 - value, abs=1e-9)


def test_a_certain_judge_gives_the_grade_itself():
    value, mass = expected_grade(np.array([-1e4, 0.0, -1e4]), np.array([1.0, 2.0, 3.0]))
    assert (value, mass) == (2.0, 1.0)

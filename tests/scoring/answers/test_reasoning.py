"""Reasoning left out of a response: every form, what is a mention, and what is unfinished."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.answers.reasoning import without_reasoning

BLOCKS = [
    "<think>{}</think>",
    "<THINK>{}</Think>",
    "< think >{}< / think >",
    '<think effort="low" x>{}</think >',
    "<|think|>{}<|/think|>",
    "&lt;think&gt;{}&lt;/think&gt;",
    "<think>\n<think>\n{}</think>",
    "<think><think>a</think>{}</think>",
    "<thinking>{}</thinking>",
    "<thinking>{}</think>",
    "<thought>{}</thought>",
    "<thoughts>{}</thoughts>",
    "<reasoning>{}</reasoning>",
    "<reasoning_process>{}</reasoning_process>",
    "<reflection>{}</reflection>",
    "<scratchpad>{}</scratchpad>",
    "<inner_monologue>{}</inner_monologue>",
    "<think><reflection>{}</reflection></think>",
    "<think><reflection>{}</think>",
    "[THINK]{}[/THINK]",
    "◁think▷{}◁/think▷",
    "<seed:think>{}</seed:think>",
    "<|begin_of_thought|>{}<|end_of_thought|>",
    "<|START_THINKING|>{}<|END_THINKING|>",
    "<|channel>thought\n{}<channel|>",
    "<think/>",
]
WHOLE = [
    "<|begin_of_thought|>{}<|end_of_thought|>\n<|begin_of_solution|>{}<|end_of_solution|>",
    "<|begin_of_thought|>{}<|begin_of_solution|>{}",
    "<|START_THINKING|>{}<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>",
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    "<|channel|>analysis{}<|channel|>final{}",
    "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    "<|start|>assistant<|channel|>final <|constrain|>json<|message|>{}",
    "{}<|end|><|start|>assistant<|channel|>final<|message|>{}",
    "analysis{}assistantfinal{}",
    "<|im_start|>think\n{}\n<|im_start|>answer\n{}",
    "Here is my thought process:\n{}\n\nHere is my response:\n{}",
    "{}</think>{}",
    "{}</reasoning>{}",
    "{}[/THINK]\n{}",
]
plain = st.text(alphabet="ab5 .\n#*$\\{}", max_size=20)


def words(text):
    return text.split()


@pytest.mark.parametrize("form", BLOCKS)
@settings(max_examples=15, deadline=None)
@given(before=plain, inside=plain, after=plain)
def test_a_block_goes_and_what_stands_around_it_stays(form, before, inside, after):
    found = without_reasoning(f"{before}{form.replace('{}', inside)}{after}")
    assert words(found) == words(before + "\n" + after)


@pytest.mark.parametrize("form", WHOLE)
@settings(max_examples=15, deadline=None)
@given(inside=plain, answer=plain)
def test_only_the_answer_of_a_whole_response_stays(form, inside, answer):
    assert words(without_reasoning(form.replace("{}", inside, 1).replace("{}", answer))) == words(
        answer
    )


@pytest.mark.parametrize("form", [b for b in BLOCKS if "{}" in b and b.count("a</think>") == 0])
def test_an_unclosed_block_leaves_no_answer(form):
    cut = form.split("{}")[0]
    assert without_reasoning(f"{cut}So it is \\boxed{{5}}.\n#### 5") == ""
    assert without_reasoning(f"Well. {cut}So it is 5.").strip() == "Well."


@pytest.mark.parametrize(
    "response",
    [
        "<|channel|>analysis<|message|>It is 5.",
        "<|channel|>analysis It is 5.",
        "analysisIt is 5.",
        "<|im_start|>think\nIt is 5.",
        "Here is my thought process:\nIt is 5.",
        "<think>I use <think> </think> tags, as told. It is 5.",
    ],
)
def test_reasoning_that_never_ends_leaves_no_answer(response):
    assert without_reasoning(response).strip() == ""


@pytest.mark.parametrize(
    "response",
    [
        "",
        "5",
        "I think <b>so</b>. x < y > z",
        "The tag `<think>` opens it and `</think>` ends it. The answer is 5.",
        'Split at "</think>" and take the last part.',
        "```python\nprompt = '<think>'\nend = text.split('</think>')[-1]\n```",
        "```python\nprompt = f'{text}<think>'\nopen('x')\n```\nDone.",
        "~~~xml\n<think>\nhm\n</think>\n~~~\nThat is the form.",
        "```\nre.sub(r'<think>.*?</think>', '', text)\n```",
        "<thinker>a</thinker> <thinks>",
        "analysis of variance is a method",
        "```\n<|channel|>analysis\n```\nis how it begins",
    ],
)
def test_mentions_and_other_tags_stay(response):
    assert without_reasoning(response) == response


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>a ```python\nx = 1\n</think>\n```python\ny = 2\n```", "```python\ny = 2\n```"),
        ("a ```\nx\n</think>\n```python\ny\n```", "```python\ny\n```"),
        ("draft 4\n</think>\nhm</think>\n5", "5"),
        ("<think>a</think>4 <think>b</think>5", "4 5"),
        ("<think>a</think>\n```python\ns = 'a</think>'\n```", "```python\ns = 'a</think>'\n```"),
        ("<think>the `</think>` mark</think> 5", "5"),
        ("#### 1<think>x</think>2", "#### 1\n2"),
    ],
)
def test_what_is_not_plain(response, answer):
    assert without_reasoning(response).strip() == answer


pieces = st.sampled_from(
    ["<think>", "</think>", "<reasoning>", "</reasoning>", "[THINK]", "`", "\n```\n", '"', "a ",
     "<|channel|>analysis", "<|channel|>final", "\n", "<|begin_of_solution|>", "5"]
)  # fmt: skip


@given(st.lists(pieces, max_size=30).map("".join))
def test_any_text_loses_some_or_nothing_and_the_same_each_time(text):
    found = without_reasoning(text)
    assert found == without_reasoning(text)
    rest = iter(text)
    assert all(letter in rest for letter in found if not letter.isspace())


@pytest.mark.parametrize(
    "unit",
    ["<think>", "</think>", "<think></think>", "<think", "`<think>", "```\n<think>\n```\n", "< ",
     "<think " + "a" * 190, "<|channel|>final", "analysis ", "<think></reason>", "`", "&lt;"],
)  # fmt: skip
def test_the_cost_grows_with_the_length(unit):
    def seconds(size):
        text = unit * (size // len(unit))
        best = 9.0
        for _ in range(3):
            started = time.process_time()
            without_reasoning(text)
            best = min(best, time.process_time() - started)
        return best

    assert seconds(120_000) < 10 * seconds(30_000) + 0.05

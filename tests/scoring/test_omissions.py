"""Rows that a chat template would leave incomplete have a reason, alike wherever they are read."""

import json
from collections import Counter
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siftline.rows import schema
from siftline.scoring import templates as omissions
from siftline.scoring.spans import UnscorableRow, prompt_tokens, response_span, trimmed
from siftline.scoring.templates import QUESTION_ANSWER, render
from siftline.training.schedule import tokenize_rows

CASES = (Path(__file__).parents[1] / "cases") / "templates"
TURN = "<|im_start|>{{ m.role }}\n"
CHATML = "{% for m in messages %}" + TURN + "{{ m.content }}<|im_end|>\n{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = CHATML + OPEN
R1 = (
    "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}" + OPEN
)
GEMMA = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CALL = '[{"type":"function","function":{"name":"f","arguments":{"a":1}}}]'
TOOLS = '[{"type":"function","function":{"name":"f","parameters":{"properties":{"a":{}}}}}]'


@pytest.fixture(scope="module")
def plain(tiny):
    return tiny.make_tokenizer()


def said(tokenizer, messages, template, tools=None, **options):
    """The reason, or None where the row is whole."""
    try:
        response_span(tokenizer, messages, template, tools=tools, **options)
    except UnscorableRow as error:
        return error.reason
    return None


def conversation(turns):
    rest = ("tool_call_id", "name")
    return [
        schema.message(
            m["role"],
            m["content"],
            reasoning=m.get("reasoning_content"),
            tool_calls=json.dumps(m["tool_calls"]) if m.get("tool_calls") else None,
            **{k: m[k] for k in rest if m.get(k)},
        )
        for m in turns
    ]


def cases():
    lines = (CASES / "chat.jsonl").read_text().splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    chats += pl.read_parquet(CASES / "think.parquet")["messages"].to_list()
    return [conversation(turns) for turns in chats]


DROPS = {
    "plain": (PLAIN, {5: "reasoning", 10: "prompt", 11: "calls"}),
    "r1": (R1, {4: "reasoning", 5: "reasoning", 6: "reasoning", 7: "reasoning",
                10: "prompt", 11: "calls", **dict.fromkeys(range(16, 24), "reasoning")}),
    "gemma": (GEMMA, {2: "error", 5: "reasoning", 10: "prompt", 11: "calls"}),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPS)
def test_rows_of_the_cases_are_whole_or_have_a_reason(plain, name):
    template, expected = DROPS[name]
    for number, messages in enumerate(cases(), 1):
        wanted = expected.get(number)
        reason = {None: None, "error": "template_error"}.get(wanted, f"template_drops_{wanted}")
        assert said(plain, messages, template) == reason, (number, messages)


@pytest.mark.parametrize("name", DROPS)
def test_training_and_scoring_leave_out_the_same_rows(tiny, tmp_path, name):
    from siftline.scoring.engines.base import ModelSpec, open_engine
    from siftline.scoring.measures.likelihood import score_likelihood
    from siftline.scoring.recorder import FINAL, Recorder

    template, _ = DROPS[name]
    rows = pa.Table.from_pylist([schema.make_row(m) for m in cases()], schema=schema.ROW)
    spec = ModelSpec(path=str(tiny.make_model(tmp_path / "m")), device="cpu", template=template)
    engine = open_engine(spec)
    recorder = Recorder(engine, spec, tmp_path / "store")
    scored, reasons = score_likelihood(recorder, 0, rows)
    trained = tokenize_rows(rows, engine.tokenizer, 10**6, template)
    left = dict(trained.skipped.select("id", "reason").iter_rows())
    assert left == reasons
    assert set(left.values()) <= FINAL
    assert sorted(trained.ids) == scored["id"].to_list()
    assert dict(zip(trained.ids, trained.loss_tokens.tolist(), strict=True)) == dict(
        scored.select("id", "n_tokens").iter_rows()
    )
    counted = Counter(reason for reason in left.values() if reason != "template_error")
    assert sum(counted.values()) >= 3
    assert trained.trimmed == (name == "gemma")


def test_white_space_around_a_response_may_go_and_is_told(plain):
    messages = conversation(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "  x\n y  "}]
    )
    assert said(plain, messages, GEMMA) is None
    assert trimmed(plain, messages, GEMMA)
    assert not trimmed(plain, messages, PLAIN)
    inner = GEMMA.replace("| trim", "| replace('\\n ', ' ')")
    assert said(plain, messages, inner) == "template_drops_content"


def test_tools_that_a_template_does_not_show_are_missed(plain):
    chat = conversation([{"role": "user", "content": "f?"}, {"role": "assistant", "content": "x"}])
    assert said(plain, chat, PLAIN, TOOLS) == "template_drops_tools"
    assert said(plain, chat, QUESTION_ANSWER, TOOLS) is None
    with pytest.raises(UnscorableRow, match="leaves out the tools"):
        prompt_tokens(plain, chat, PLAIN, tools=TOOLS)


def test_a_prompt_without_its_system_message_is_not_asked(plain):
    template = PLAIN.replace("messages %}", "messages if m.role != 'system' %}", 1)
    chat = conversation(
        [
            {"role": "system", "content": "i"},  # a letter of the template's own tokens
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "x"},
        ]
    )
    assert said(plain, chat, template) == "template_drops_prompt"
    with pytest.raises(UnscorableRow, match="part of the prompt"):
        prompt_tokens(plain, chat, template)


@pytest.mark.parametrize(
    "written",
    [
        "{{ m.tool_calls | tojson }}",
        "{{ m.tool_calls | tojson(indent=2) }}",
        "{% for c in m.tool_calls %}{{ c.function.name }}("
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}, {% endfor %}){% endfor %}",
        "{% for c in m.tool_calls %}<f={{ c.function.name }}>{% for k, v in "
        "c.function.arguments.items() %}<p={{ k }}>{{ v if v is string else v | tojson }}</p>"
        "{% endfor %}{% endfor %}",
        "{% for c in m.tool_calls %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}",
    ],
    ids=["json", "indented", "python", "xml", "text"],
)
def test_calls_are_held_in_any_notation(plain, written):
    shown = "{{ m.content }}{% if m.tool_calls %}" + written + "{% endif %}"
    template = PLAIN.replace("{{ m.content }}", shown)
    arguments = {"a": [1, True, None, 2.5e-7], "b": {"é": 'x "y"\n z'}, "c": " spaced "}
    for form in (arguments, json.dumps(arguments)):
        calls = [{"function": {"name": "g", "arguments": form}}]
        chat = conversation(
            [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": calls},
            ]
        )
        assert said(plain, chat, template) is None
    assert said(plain, chat, PLAIN) == "template_drops_calls"
    first = template.replace("in m.tool_calls ", "in m.tool_calls[:1] ")
    first = first.replace("{{ m.tool_calls |", "{{ m.tool_calls[:1] |")
    chat[-1]["tool_calls"] = json.dumps([*calls, {"function": {"name": "h", "arguments": {}}}])
    assert said(plain, chat, template) is None
    assert said(plain, chat, first) == "template_drops_calls"


def test_a_weight_of_nothing_takes_no_loss(plain):
    chat = conversation(
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "bad"},
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": "good"},
        ]
    )
    _, span = response_span(plain, chat, turns="all")
    assert len(span) == 4
    chat[1]["weight"] = 0
    tokens, span = response_span(plain, chat, turns="all")
    assert plain.decode(tokens[slice(*span)]) == " good<eos>"


TEXT = st.text(st.sampled_from("aim<>/|_ \n\"\\'é=4"), min_size=1, max_size=12).filter(str.strip)
PARTS = ("system", "content", "reasoning", "calls", "tools")


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.fixed_dictionaries(dict.fromkeys(PARTS, TEXT)), st.sets(st.sampled_from(PARTS)))
def test_what_is_dropped_is_named_and_nothing_else_is(plain, words, dropped):
    """Short texts over the letters of the template itself: no accident may stand for a part."""
    shown = {
        "tools": "{% if tools %}{{ tools | tojson }}{% endif %}",
        "system": "{% if m.role == 'system' %}{{ m.content }}{% endif %}",
        "content": "{% if m.role == 'assistant' %}{{ m.content }}{% endif %}",
        "reasoning": "{% if m.reasoning_content %}<|{{ m.reasoning_content }}|>{% endif %}",
        "calls": "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}",
    }
    parts = {name: "" if name in dropped else code for name, code in shown.items()}
    body = parts["system"] + parts["reasoning"] + parts["content"] + parts["calls"]
    template = (
        f"{parts['tools']}{{% for m in messages %}}{TURN}"
        f"{{% if m.role == 'user' %}}{{{{ m.content }}}}{{% endif %}}{body}<|im_end|>\n"
        f"{{% endfor %}}{OPEN}"
    )
    call = [{"type": "function", "function": {"name": "f", "arguments": {"a": words["calls"]}}}]
    chat = conversation(
        [
            {"role": "system", "content": words["system"]},
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": words["content"],
                "reasoning_content": words["reasoning"],
                "tool_calls": call,
            },
        ]
    )
    names = {
        "content": omissions.CONTENT,
        "reasoning": omissions.REASONING,
        "calls": omissions.CALLS,
        "system": omissions.PROMPT,
        "tools": omissions.TOOLS,
    }
    wanted = next((r for r in omissions.OMISSIONS if r in {names[d] for d in dropped}), None)
    assert said(plain, chat, template, TOOLS) == wanted


def public_templates():
    import trl

    folder = Path(trl.__file__).with_name("chat_templates")
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


WHOLE = (
    "glm4moe", "lfm2_2_5_v2", "lfm2_2_5_vl", "nemotron_3_5_lightning", "nemotron_3_nano",
    "nemotron_3_super", "nemotron_3_ultra", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6",
    "qwen3_8",
)  # fmt: skip
"""Public templates that know reasoning and calls."""
ALMOST = ("diffusion_gemma", "gemma4_v5")
"""They move the words beside a call behind its result."""
ASKED = [
    {"role": "system", "content": "Use the tools."},
    {"role": "user", "content": "Weather in Łódź?"},
]
CALLING = {
    "role": "assistant",
    "content": "I look it up.",
    "reasoning_content": "The user wants weather.",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "f", "arguments": {"a": 'Łódź "PL"', "n": [1, None]}},
        }
    ],
}
TOLD = [
    {"role": "tool", "content": '{"t": 3}', "tool_call_id": "call00001", "name": "f"},
    {"role": "assistant", "content": "3 degrees.", "reasoning_content": "It says three."},
]


@pytest.mark.parametrize("name", WHOLE + ALMOST)
def test_public_templates_show_content_reasoning_and_calls(plain, name):
    template = public_templates()[name]
    mute = {**CALLING, "content": "" if name in ALMOST else CALLING["content"]}
    for turns in ([*ASKED, CALLING], [*ASKED, mute, *TOLD]):
        chat = conversation(turns)
        assert said(plain, chat, template, TOOLS) is None
        text = render(plain, chat, template, tools=TOOLS)
        assert text.count(turns[-1]["content"]) == 1
        assert text.count(turns[-1]["reasoning_content"]) == 1
        assert "PL" in text


def test_public_templates_without_reasoning_or_calls_say_so(tiny):
    tokenizer = tiny.make_tokenizer(bos=True)
    found = {
        name: said(tokenizer, conversation([*ASKED, CALLING]), template, TOOLS)
        for name, template in public_templates().items()
        if not name.endswith("_training")
    }
    assert found["llama3"] == found["qwen2_5"] == found["phi3"] == "template_drops_reasoning"
    assert found["llama3_1"] == "template_drops_content"
    assert found["gptoss"] == "template_error"
    partly = {"gemma4", "gemma4_v3", "gemma4_v4", "lfm2_2_5"}  # not in every conversation
    assert {name for name, why in found.items() if why is None} == {*WHOLE, *ALMOST, *partly}

"""Templates that would never end do; those in use come out as transformers has them."""

import os
import threading
import time
from datetime import datetime
from pathlib import Path

import jinja2
import pytest

from siftline.scoring import template_limits
from siftline.scoring.spans import UnscorableRow, response_span
from siftline.scoring.template_limits import STEPS, TemplateLimit, render_limited
from siftline.scoring.templates import QUESTION_ANSWER

GROW = (
    "{{% set n = namespace(s={start}) %}}"
    "{{% for i in range(99) %}}{{% set n.s = {step} %}}{{% endfor %}}"
)
HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "many rounds": "{% for i in range(10**9) %}{% endfor %}",
    "a long text": "{{ 'a' * 10**10 }}",
    "a text, long in two steps": "{{ ('a' * 1000000) * 1000000 }}",
    "a long list": "{{ ([1] * 10**9) | length }}",
    "a power": "{{ 10 ** (10 ** 8) }}",
    "squares": GROW.format(start="3", step="n.s * n.s"),
    "doubled by ~": GROW.format(start="'ab'", step="n.s ~ n.s"),
    "doubled by +": GROW.format(start="'ab'", step="n.s + n.s"),
    "nested lists as JSON": GROW.format(start="['a']", step="[n.s, n.s]") + "{{ n.s | tojson }}",
    "nested lists as text": GROW.format(start="['a']", step="[n.s, n.s]") + "{{ n.s }}",
    "nested lists joined": GROW.format(start="['a']", step="[n.s, n.s]") + "{{ n.s ~ '' }}",
    "width by %": "{{ '%1000000000d' % 3 }}",
    "width as argument": "{{ '%*d' % (1000000000, 3) }}",
    "width by format": "{{ '{:1000000000}'.format(3) }}",
    "width by a filter": "{{ 'a' | center(1000000000) }}",
    "width by a method": "{{ 'a'.zfill(1000000000) }}",
    "replace": "{% set s = 'a' * 1000000 %}{{ s | replace('a', s) }}{{ s.replace('a', s) }}",
    "join": "{% set s = 'a' * 1000000 %}{{ ([s] * 60000) | join }}",
    "a macro for ever": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "a macro twice": (
        "{% macro f(x) %}{% if x %}{{ f(x-1) }}{{ f(x-1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a recursive loop": "{% for x in range(9) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "a block": "{% set x %}{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}{% endset %}",
    "searches": "{% set s = 'a' * 9999999 %}{% for i in range(99999) %}{{ 'b' in s }}{% endfor %}",
    "slices": "{% set s = 'a' * 9999999 %}{% for i in range(999) %}{{ s[1:] | count }}{% endfor %}",
    "a table of letters": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(1000000) }}",
    "wrapping": "{{ ('a ' * 1000000) | wordwrap(1, wrapstring='x' * 1000000) }}",
    "sums": "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
}  # fmt: skip
SOME = [{"role": "user", "content": "6 * 7?"}, {"role": "assistant", "content": "42"}]


@pytest.mark.parametrize("how", HOSTILE)
def test_a_template_without_end_ends_soon_and_always_the_same(how):
    said, start = [], time.process_time()
    for _ in range(2 if how in ("loops", "join") else 1):
        with pytest.raises(TemplateLimit) as error:
            render_limited(HOSTILE[how], messages=SOME)
        said.append(str(error.value))
    assert time.process_time() - start < 60  # hours or a full memory without limits
    assert len(set(said)) == 1
    assert "\n" not in said[0]
    # Nothing of it is left for the next.
    assert render_limited("{{ messages | length }}", messages=SOME) == "2"


def test_what_a_constant_makes_is_not_made_when_it_is_compiled():
    never = "{% if never %}{{ 'a' * 10**10 }}{{ 9 ** (9 ** 9) }}{% endif %}ok"
    assert render_limited(never) == "ok"


def test_limits_hold_in_threads_and_child_processes_each_for_itself():
    rounds = STEPS // 3
    one = (
        "{% for i in range(99) %}{% for j in range("
        + str(rounds // 99)
        + ") %}{% endfor %}{% endfor %}"
    )
    outcomes = []
    threads = [
        threading.Thread(target=lambda: outcomes.append(render_limited(one))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [""] * 4  # together they take more steps than one may
    child = os.fork()
    if not child:
        try:
            render_limited(HOSTILE["sums"])
        except TemplateLimit:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def conversations():
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, "é"]}}}
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    system = {"role": "system", "content": " Be good. "}
    thought = {"role": "assistant", "content": "<think>hm</think> 42", "reasoning_content": "hm"}
    yield SOME, None, False
    yield [system, *SOME, SOME[0]], None, True
    yield [system, SOME[0], thought, SOME[0], thought], None, False
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    yield [SOME[0], called, {"role": "tool", "name": "f", "content": "1"}, SOME[1]], [tool], False


def shipped():
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.name: path.read_text() for path in sorted(folder.glob("*.jinja"))}


def test_templates_in_use_come_out_as_transformers_has_them(monkeypatch):
    from transformers.utils import chat_template_utils
    from transformers.utils.chat_template_utils import _compile_jinja_template

    class OneDay(datetime):  # the date is ours in every rendering
        @classmethod
        def now(cls, tz=None):
            return template_limits.DATE

    monkeypatch.setattr(chat_template_utils, "datetime", OneDay)

    def outcome(render, **given):
        try:
            return render(**given)
        except Exception as error:
            return type(error).__name__, str(error)

    known = {**shipped(), "ours": QUESTION_ANSWER}
    assert len(known) > 20
    said = 0
    for name, template in known.items():
        if "idefics" in name or "smolvlm" in name:  # they go through a text letter by letter
            continue
        for messages, tools, prompt in conversations():
            given = {
                "messages": messages, "tools": tools, "documents": None,
                "add_generation_prompt": prompt, "bos_token": "<s>", "eos_token": "</s>",
            }  # fmt: skip
            theirs = outcome(_compile_jinja_template(template).render, **given)
            assert outcome(lambda t=template, **g: render_limited(t, **g), **given) == theirs, name
            said += isinstance(theirs, str)
    assert said > 2 * len(known)


@pytest.mark.parametrize("turns", [10, 1000])
def test_a_long_conversation_is_far_from_the_limit(turns):
    said = {"role": "assistant", "content": "it is 42"}
    talk = [m for i in range(turns) for m in ({"role": "user", "content": f"{i}?"}, said)]
    for name in ("qwen3.jinja", "llama3_1.jinja", "deepseekv3.jinja"):
        text = render_limited(shipped()[name], messages=talk, add_generation_prompt=False)
        assert text.count("it is 42") == turns
    words = [{"role": "user", "content": "word " * 200_000}, SOME[1]]
    assert len(render_limited(QUESTION_ANSWER, messages=words, eos_token="</s>")) > 1_000_000


def test_a_row_under_a_hostile_template_has_a_reason(tokenizer):
    for how in ("loops", "a long text", "a macro for ever"):
        with pytest.raises(UnscorableRow) as error:
            response_span(tokenizer, SOME, HOSTILE[how])
        assert error.value.reason == "template_error"
    deep = "[" * 100_000 + "]" * 100_000
    with pytest.raises(UnscorableRow) as error:  # an empty object holds no tool
        response_span(tokenizer, SOME, "{{ tools }}", tools="{}")
    assert error.value.reason == "template_drops_content"
    for tools in (deep, '"text"', "[1]", '[["a"]]'):
        with pytest.raises(UnscorableRow) as error:
            response_span(tokenizer, SOME, "{{ tools }}", tools=tools)
        assert error.value.reason == "template_error", tools[:9]


def test_a_template_that_is_none_says_so():
    with pytest.raises(jinja2.TemplateError):
        render_limited("{% for %}")


# ---- the same text, whenever it is made --------------------------------------------------------

UNSTEADY = {
    "a function": "{{ raise_exception }}",
    "a method": "{{ messages[0].content.upper }}",
    "an object": "{{ cycler(1, 2) }}",
    "a generator": "{{ messages | map(attribute='role') }}",
    "in a list": "{{ [[joiner()]] }}",
    "in a join of terms": "{{ 'a' ~ range.__class__ ~ joiner() }}",
    "in a join": "{{ [raise_exception] | join }}",
    "in a join of what is mapped": "{{ [[joiner()]] | map('first') | join }}",
    "by a filter": "{{ raise_exception | string }}",
    "by a format": "{{ '%s' % raise_exception }}",
    "by a filter's format": "{{ '%s' | format(joiner()) }}",
    "by a method's format": "{{ '{}'.format(joiner()) }}",
    "by a named format": "{{ '{a}'.format(a=joiner()) }}",
    "at random": "{{ [1, 2, 3] | random }}",
}


@pytest.mark.parametrize("how", UNSTEADY)
def test_a_template_whose_text_is_another_in_each_process_fails(how):
    with pytest.raises(jinja2.TemplateError):
        render_limited(UNSTEADY[how], messages=[{"role": "user", "content": "x"}])


def test_the_date_is_one_whenever_a_row_is_rendered(caplog):
    """As Llama, Mistral and gpt-oss ask for it."""
    template_limits._say_date.cache_clear()
    llama = (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{%- endif %}"
        "Today Date: {{ date_string }}"
    )
    assert render_limited(llama) == "Today Date: 26 Jul 2024"
    assert render_limited("{{ strftime_now('%Y-%m-%d') }}") == "2024-07-26"
    assert caplog.text.count("asks for the date") == 1
    assert render_limited(llama, date_string="1 Jan 2000") == "Today Date: 1 Jan 2000"
    assert len(render_limited("{{ strftime_now('%H%M%S%f' * 100) }}")) == 1200

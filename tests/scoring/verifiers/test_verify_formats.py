"""Regular expressions and JSON schemas as reference answers."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.answers.reasoning import Block, blocks
from siftline.scoring.verifiers import (
    NAMED,
    JsonSchemaVerifier,
    RegexVerifier,
    Verdict,
    get_verifier,
)
from siftline.scoring.verifiers.text import json_value
from siftline.stages.verify.decide import VERIFIERS, Verify


@pytest.fixture(scope="module")
def regex():
    verifier = RegexVerifier(timeout=2)
    yield verifier
    verifier.close()


@pytest.fixture(scope="module")
def schema():
    verifier = JsonSchemaVerifier(timeout=5)
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("response", "pattern", "correct"),
    [
        ("yes", "yes|no", True),
        ("  no\n", "yes|no", True),
        ("yes and no", "yes|no", False),
        ("YES", "yes", False),
        ("YES", "(?i)yes", True),
        ("I counted them.\n#### 42", r"\d{2}", True),
        ("The answer is 42.", "4[0-9]", True),
        ("\\boxed{7}", "[0-6]", False),
        ("2024-02-30", r"\d{4}-\d{2}-\d{2}", True),
        ("one\ntwo", "one.two", False),
        ("one\ntwo", "(?s)one.two", True),
    ],
)
def test_a_final_answer_matches_as_a_whole(regex, response, pattern, correct):
    assert regex(response, pattern).correct is correct


def test_reasoning_is_left_out(regex, schema):
    assert regex("<think>no</think>\nyes", "yes|no").extracted == "yes"
    assert regex("<think>no</think>\n<answer>yes</answer>", "yes").correct is True
    assert regex("<think>yes", "yes") == Verdict(None, None, "no_final_answer")
    assert schema('<think>{"name": 1}</think>\n{"name": "Ada"}', PERSON).correct is True
    fenced = '```json\n{"name": "Ada"}\n```'
    assert schema(f"<think>\n{fenced}\n</think>\n{fenced}", PERSON).correct is True
    assert schema(f"<think>\n{fenced}", PERSON) == Verdict(None, None, "no_final_answer")


def test_what_is_no_expression_or_no_answer_decides_nothing(regex):
    assert regex("x", "").reason == "no_reference"
    assert regex(" ", "x") == Verdict(None, None, "no_final_answer")
    for pattern in ("(", "(?<=a+)b", "[", "x{99999999999}"):
        verdict = regex("x", pattern)
        assert verdict.correct is None
        assert verdict.reason.startswith("verifier_error"), pattern


def test_catastrophic_patterns_end_in_time_and_leave_the_next_one_working():
    verifier = RegexVerifier(timeout=0.5)
    found = []
    jobs = [("a" * 40 + "!", "(a+)+"), ("x" * 40, "(x|x)*y"), ("ok", "ok")]

    def judge():  # off the main thread, where an alarm of ours would not ring
        found.extend(verifier(*job) for job in jobs)

    started = time.monotonic()
    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    verifier.close()
    assert time.monotonic() - started < 20
    assert [v.correct for v in found] == [None, None, True]
    assert {v.reason for v in found[:2]} == {"verifier_error: timeout after 0.5 s"}


@settings(max_examples=40, deadline=None)
@given(
    st.text(alphabet="ab.\n#", max_size=12),
    st.sampled_from(["a*b?", "(a|b)+", ".*", "a.b", "[^a]+"]),
)
def test_verdicts_are_those_of_python(regex, text, pattern):
    verdict = regex(text, pattern)
    if verdict.extracted is None:
        assert not text.strip() or "#" in text
    else:
        assert verdict.correct is (re.fullmatch(pattern, verdict.extracted) is not None)
        assert verdict == regex(text, pattern)


PERSON = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1},
            "age": {"type": "integer", "minimum": 0},
            "friends": {"type": "array", "items": {"$ref": "#"}},
        },
        "required": ["name"],
        "additionalProperties": False,
    }
)


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ('{"name": "Ada", "age": 36}', True),
        ('\n {"name": "Ada"} ', True),
        ('Here it is:\n```json\n{"name": "Ada"}\n```\nDone.', True),
        ('```JSON\n{"name": "Ada"}\n```', True),
        ('{"name": "Ada", "friends": [{"name": "Bo"}]}', True),
        ('{"name": "Ada", "friends": [{"age": 1}]}', False),
        ('{"name": ""}', False),
        ('{"name": "Ada", "age": -1}', False),
        ('{"name": "Ada", "age": 36.5}', False),
        ('{"name": "Ada", "email": "x"}', False),
        ("[]", False),
        ("```json\n{name: Ada}\n```", False),
        ('```json\n{"name": "Ada"} {"name": "Bo"}\n```', False),
        ('```json\n{"name": "Ada", "name": "Bo"}\n```', False),
        ('```json\n{"name": "Ada", "age": NaN}\n```', False),
        ('{"name": "Ada"} {"name": "Bo"}', None),
        ('It is {"name": "Ada"}', None),
        ('```json\n{"name": "Ada"}\n```\nor\n```json\n{"name": "Bo"}\n```', None),
        ('```json\n{"name": "Ada"}', None),
        ('```\n{"name": "Ada"}\n```', None),
        ("", None),
    ],
)
def test_one_value_has_to_satisfy_the_schema(schema, response, correct):
    verdict = schema(response, PERSON)
    assert verdict.correct is correct
    if correct is None:
        assert verdict == Verdict(None, None, "no_final_answer")


def test_schemas_that_can_not_be_used_decide_nothing(schema):
    assert schema("1", " ").reason == "no_reference"
    bad = ["{", "[]", '"x"', '{"type": "integr"}', '{"minimum": "a"}', '{"$ref": "#/nowhere"}']
    for reference in bad:
        verdict = schema("1", reference)
        assert verdict.correct is None, reference
        assert verdict.reason.startswith("verifier_error"), reference
    assert schema("1", "true").correct is True
    assert schema("1", "false").correct is False


def test_nothing_is_fetched(schema):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        verdict = schema("1", json.dumps({"$ref": f"http://127.0.0.1:{port}/schema.json"}))
        assert verdict.correct is None
        assert "verifier_error" in verdict.reason
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_schema_that_costs_too_much_ends_in_time():
    verifier = JsonSchemaVerifier(timeout=1)
    slow = json.dumps({"type": "string", "pattern": "^(a+)+$"})
    deep = json.dumps({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"})
    started = time.monotonic()
    assert verifier(json.dumps("a" * 40 + "!"), slow).reason.endswith("timeout after 1 s")
    assert verifier("1", deep).reason.startswith("verifier_error")
    nested = "[" * 100_000 + "]" * 100_000
    assert verifier(nested, "true").correct is not True
    assert verifier("1", "false").correct is False, "the next one works"
    assert time.monotonic() - started < 20
    verifier.close()


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    )
)  # fmt: skip
def test_any_value_is_judged_as_jsonschema_does_and_fenced_as_bare(schema, value):
    wanted = {"anyOf": [{"type": "integer"}, {"type": "array", "maxItems": 1}, {"required": ["a"],
              "type": "object"}]}  # fmt: skip
    text = json.dumps(value)
    expected = jsonschema.Draft202012Validator(wanted).is_valid(value)
    assert schema(text, json.dumps(wanted)).correct is expected
    assert schema(f"So:\n```json\n{text}\n```", json.dumps(wanted)).correct is expected


@given(st.text(alphabet='`~json \n{}[]"1,:', max_size=60))
def test_any_text_has_one_value_or_none(text):
    found = json_value(text)
    # The indentation of a fence is taken off its lines.
    assert found is None or "".join(found.split()) in "".join(text.split())


def test_blocks_are_those_of_commonmark():
    text = (
        "a\n```py\nx\n~~~\n```\n~~~ json extra\n```\ny\n~~~~\n    ```\nno\n````\n```\nz\n```` \nend"
    )
    assert blocks(text) == [
        Block("py", "x\n~~~\n"),
        Block("json", "```\ny\n"),
        Block("", "```\nz\n"),
    ]
    assert blocks("```\nx") == [Block("", "x", closed=False)]
    assert blocks("a `b` c") == []
    started = time.monotonic()
    blocks("```json\n" * 100_000)
    assert time.monotonic() - started < 5


def test_names():
    names = {"math", "exact", "verbatim", "choice", "regex", "json_schema", "code", "instructions"}
    assert set(NAMED) == names
    assert set(VERIFIERS) == set(NAMED), "the gate's options name the verifiers there are"
    assert isinstance(get_verifier("regex"), RegexVerifier)
    assert isinstance(get_verifier("json_schema"), JsonSchemaVerifier)
    assert get_verifier("regex") is get_verifier("regex")
    with pytest.raises(ValueError, match="regex, json_schema, code"):
        get_verifier("regexp")
    with pytest.raises(ValueError, match="timeout"):
        RegexVerifier(timeout=0)
    with pytest.raises(ValueError, match="timeout"):
        JsonSchemaVerifier(timeout=-1)
    assert Verify(verifier="regex").verifier == "regex"
    assert Verify(verifier="package.module:thing").verifier == "package.module:thing"
    with pytest.raises(ValueError, match="'regexp': use math, exact"):
        Verify(verifier="regexp")


def test_the_example_in_the_docs_holds():
    text = (Path(__file__).parents[3] / "docs" / "verifiers.md").read_text(encoding="utf-8")
    (example,) = [block.text for block in blocks(text) if block.language == "python"]
    subprocess.run([sys.executable, "-c", example], check=True)
    table = set(re.findall(r"^\| `(\w+)` \|", text, re.M))
    assert table == set(NAMED)


def test_a_missing_package_is_said_when_the_verifier_is_made(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install jsonschema"):
        JsonSchemaVerifier()

"""Identity: what an id depends on, what it does not, and where it puts a row."""

import hashlib
import json
import subprocess
import sys
import unicodedata

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftline.rows import schema
from siftline.rows.schema import (
    HALF_ID,
    bucket_of,
    canonical_text,
    digest,
    make_row,
    message,
    prompt_id,
    row_id,
    text_view,
)

TEXT = st.text(max_size=20)
HEX = st.text("0123456789abcdef", min_size=40, max_size=40)


def chat(*contents):
    roles = ("user", "assistant")
    return [message(roles[i % 2], text) for i, text in enumerate(contents)]


def test_ids_never_change():
    """Golden values: an id that moved would orphan every score and decision ever recorded."""
    row = make_row(chat("What is 2 + 3?", "5"), answer="5", source="sums")
    assert row["id"] == "9a94087a8282fe91788bae477c79abcf65ec1d25"
    assert make_row(chat("", "a", "b", "c"))["id"] == "b2ff1f34e76ba823ef5feed12b07ff4e4a531fd8"


def test_digest_is_blake2b_of_canonical_json():
    payload = json.dumps([["a", {"b": 1, "c": "é"}]], ensure_ascii=False, separators=(",", ":"))
    want = hashlib.blake2b(payload.encode(), digest_size=20).hexdigest()
    assert digest(["a", {"c": "é", "b": 1}]) == want
    assert len(want) == 2 * HALF_ID


@given(TEXT, TEXT, TEXT, TEXT)
def test_prompt_half_depends_on_the_prompt_alone(prompt, response, answer, source):
    row = make_row(chat(prompt, response), answer=answer, source=source)
    bare = make_row(chat(prompt, "another response"))
    assert row["prompt_id"] == bare["prompt_id"] == row["id"][:HALF_ID] == bare["id"][:HALF_ID]
    assert len(row["id"]) == 40
    assert set(row["id"]) <= set("0123456789abcdef")


def test_second_half_depends_on_messages_answer_and_source_only():
    base = {"answer": "1", "source": "s"}
    same = [
        make_row(chat("q", "r"), **base),
        make_row(chat("q", "r"), **base, conversation_id="c", copies=7, answer_from="response"),
        make_row(chat(" q\r\n", "r "), answer=" 1 ", source="s"),
    ]
    assert len({row["id"] for row in same}) == 1
    others = [
        make_row(chat("q", "R"), **base),
        make_row(chat("q", "r"), answer="2", source="s"),
        make_row(chat("q", "r"), source="s"),
        make_row(chat("q", "r"), answer="1", source="t"),
        make_row(chat("q", "r"), answer="1"),
    ]
    assert len({row["id"] for row in [same[0], *others]}) == 6
    assert {row["prompt_id"] for row in others} == {same[0]["prompt_id"]}


def test_the_prompt_holds_system_turns_tools_and_roles():
    system = [message("system", "s"), *chat("q", "r")]
    longer = chat("q", "r", "q", "r")
    as_tool = [message("tool", "q"), message("assistant", "r")]
    thinking = [message("user", "q", reasoning="t"), message("assistant", "r")]
    calls = [message("user", "q", tool_calls="t"), message("assistant", "r")]
    variants = [prompt_id(m) for m in (chat("q", "r"), system, longer, as_tool, thinking, calls)]
    variants.append(prompt_id(chat("q", "r"), tools="[]"))
    assert len(set(variants)) == len(variants)


def test_plain_text_is_its_own_prompt():
    text = [message("assistant", "once upon a time")]
    assert prompt_id(text) == prompt_id([message("assistant", "once upon a time")])
    assert prompt_id(text) != prompt_id([message("assistant", "once upon a thyme")])
    assert row_id(text, source="a") != row_id(text, source="b")


@given(TEXT)
def test_canonical_text_is_a_fixed_point_and_forgets_encoding(text):
    clean = canonical_text(text)
    assert canonical_text(clean) == clean
    assert "\r" not in clean
    assert canonical_text(unicodedata.normalize("NFD", text)) == clean
    assert canonical_text(f"\n {text}\t") == clean
    assert canonical_text(clean.replace("\n", "\r\n")) == clean


def test_message_fills_every_field_and_keeps_text_to_the_character():
    empty = dict.fromkeys(("reasoning", "tool_calls", "tool_call_id", "name", "weight"))
    assert message("user", None) == {"role": "user", "content": "", **empty}
    assert message("assistant", " a ", reasoning="", tool_calls=" x ")["reasoning"] is None
    assert message("assistant", " a ", tool_calls=" x ")["tool_calls"] == "x"
    assert message("assistant", "    return a\r\n")["content"] == "    return a\r\n"
    assert message("tool", "1", tool_call_id="c", name="f", weight=0) == {
        **message("tool", "1"),
        "tool_call_id": "c",
        "name": "f",
        "weight": 0,
    }


def test_fields_that_came_later_count_only_where_they_are_filled():
    plain = chat("q", "r", "q", "r")
    fields = ({"tool_call_id": "c"}, {"name": "Ann"}, {"weight": 0})
    filled = [[plain[0], {**plain[1], **more}, *plain[2:]] for more in fields]
    found = [row_id(messages) for messages in (plain, *filled)]
    assert len({i[:HALF_ID] for i in found}) == len(found) == 4
    bare = [{k: m[k] for k in ("role", "content", "reasoning", "tool_calls")} for m in plain]
    assert row_id(bare) == found[0]


@pytest.mark.parametrize(("messages", "found"), [([], "nothing"), (chat("q"), "user")])
def test_a_row_needs_a_response(messages, found):
    with pytest.raises(ValueError, match=f"must be the assistant's response, found {found}"):
        make_row(messages)


def test_answer_from_says_independent_unless_told_and_nothing_without_an_answer():
    assert make_row(chat("q", "r"), answer="1")["answer_from"] == "independent"
    assert make_row(chat("q", "r"), answer="1", answer_from="response")["answer_from"] == "response"
    assert make_row(chat("q", "r"), answer_from="response")["answer_from"] is None


@given(HEX, st.integers(0, 10))
def test_buckets_are_leading_bits(identity, bits):
    """A finer cut splits buckets in two, keeps order, and agrees with the binary digits."""
    buckets = 1 << bits
    bucket = bucket_of(identity, buckets)
    assert bucket == int(bin(int(identity, 16))[2:].zfill(160)[:bits] or "0", 2)
    assert bucket_of(identity, 2 * buckets) // 2 == bucket
    assert bucket_of(identity[:HALF_ID], buckets) == bucket


def test_buckets_must_be_a_power_of_two():
    with pytest.raises(AssertionError, match="power of two"):
        bucket_of("0" * 40, 12)


def test_buckets_are_about_equally_full():
    counts = [0] * 16
    for i in range(4000):
        counts[bucket_of(prompt_id(chat(f"question {i}", "r")), 16)] += 1
    assert min(counts) > 180  # 250 expected, standard deviation 15.3
    assert max(counts) < 320


def test_text_view_flattens_and_keeps_row_order():
    rows = [
        make_row([message("system", "be brief"), *chat("2+2?", "4")], answer="4", source="s"),
        make_row([message("assistant", "plain text")]),
        make_row(chat("a", "b", "c", "d")),
    ]
    view = text_view(pa.Table.from_pylist(rows, schema=schema.ROW))
    assert view["prompt"].to_list() == ["be brief\n2+2?", "", "a\nb\nc"]
    assert view["response"].to_list() == ["4", "plain text", "d"]
    assert view["id"].to_list() == [row["id"] for row in rows]
    assert view["answer"].to_list() == ["4", None, None]
    assert set(view.dtypes) == {pl.String}
    empty = text_view(schema.ROW.empty_table())
    assert dict(empty.schema) == dict(view.schema)


def test_ids_are_the_same_in_another_process():
    code = (
        "from siftline.rows.schema import make_row, message\n"
        "print(make_row([message('user', 'é ∑'), message('assistant', '1')], source='x')['id'])"
    )
    command = [sys.executable, "-c", code]
    seen = {
        subprocess.run(
            command, env={"PYTHONHASHSEED": seed}, capture_output=True, check=True, text=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert seen == {make_row(chat("é ∑", "1"), source="x")["id"]}

"""Spans of several turns, against character offsets of conversations written out by hand here.

Each template has a plain Python twin, which says of every piece of text whether it is a turn. The
tokenizer's offsets then tell which tokens a turn has: those that end in it. One that stands across
its start belongs to it, one across its end to what follows.
"""

from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siftline.scoring.engines.base import check_spans, positions
from siftline.scoring.spans import (
    UnscorableRow,
    prompt_tokens,
    response_span,
    start_token,
    stop_tokens,
    unconditional,
)
from siftline.scoring.templates import QUESTION_ANSWER, render

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Ends every turn with one token and the conversation with another, as Phi 3 does.
CLOSING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\\n' if add_generation_prompt else eos_token }}"
)
THOUGHT = (
    "{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\\n' }}}}"
    "{{% if m.reasoning and {shown} %}}{{{{ '<think>' + m.reasoning + '</think>' }}}}{{% endif %}}"
    "{{{{ m.content + '<|im_end|>\\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n{opened}' }}}}{{% endif %}}"
)
# Reasoning of turns before the last user's is dropped, as Qwen 3 does.
AFTER_LAST_USER = THOUGHT.format(
    shown="messages[loop.index0:] | selectattr('role', 'equalto', 'user') | list | length == 0",
    opened="",
)
# Reasoning of all but the last assistant turn is dropped: an earlier turn changes once one follows.
LAST_ASSISTANT = THOUGHT.format(
    shown="messages[loop.index:] | selectattr('role', 'equalto', 'assistant') | list | length == 0",
    opened="",
)
NEVER = THOUGHT.format(shown="false", opened="<think>\\n")  # opens a thought that history drops

MERGES = {
    "none": (),
    "both sides": ((":", "Ġ"), ("]", "Ġ"), ("Ċ", "a"), ("Ċ", "u"), ("Ġ", "a"), ("a", "Ġ")),
    "inside": (("a", "b"), ("ab", "a"), ("Ġ", "b"), ("b", "Ċ")),
}


class Piece(NamedTuple):
    text: str
    turn: bool = False


def question_answer(messages):
    pieces = []
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            body = f" {m['content']}" if m["content"] else ""
            pieces += [Piece("Answer:"), Piece(f"{body}<eos>", True)]
            pieces += [Piece("\n")] * (i + 1 < len(messages))
        else:
            mark = "Question: " if m["role"] == "user" else ""
            pieces.append(Piece(f"{mark}{m['content']}\n"))
    return [Piece("<bos>"), *pieces]


def chatml(messages):
    pieces = []
    for m in messages:
        turn = m["role"] == "assistant"
        pieces += [Piece(f"<|im_start|>{m['role']}\n"), Piece(f"{m['content']}<|im_end|>", turn)]
        pieces.append(Piece("\n"))
    return pieces


def llama(messages):
    system, rest = "", messages
    if messages[0]["role"] == "system":
        system, rest = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n", messages[1:]
    pieces = []
    for i, m in enumerate(rest):
        if m["role"] == "assistant":
            pieces.append(Piece(f" {m['content']} <eos>", True))
        else:
            pieces.append(Piece(f"<bos>[INST] {'' if i else system}{m['content']} [/INST]"))
    return pieces


def bare(messages):
    """The end of sequence behind the last turn is not the template's: scoring appends it."""
    pieces = []
    for m in messages:
        turn = m["role"] == "assistant"
        pieces += [Piece(f"{m['role']}: "), Piece(f"{m['content']}\n", turn)]
    return [*pieces[:-1], Piece(f"{pieces[-1].text}<eos>", True)]


TEMPLATES = {
    "question-answer": (QUESTION_ANSWER, question_answer),
    "chatml": (CHATML, chatml),
    "llama": (LLAMA, llama),
    "bare": (BARE, bare),
}


@pytest.fixture(scope="module")
def tokenizers(tiny):
    made = {}
    for name, merges in MERGES.items():
        made[name] = tiny.make_tokenizer(bos=True, merges=merges)
        made[name].add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


@pytest.fixture(scope="module")
def plain(tokenizers):
    return tokenizers["none"]


def expected(tokenizer, pieces):
    """Tokens of the text up to the end of its last turn, and the stretches that end in turns."""
    last = max(i for i, piece in enumerate(pieces) if piece.turn)
    text, stretches = "", []
    for piece in pieces[: last + 1]:
        if piece.turn:
            stretches.append((len(text), len(text) + len(piece.text)))
        text += piece.text
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [b for _, b in encoded["offset_mapping"]]
    span = []
    for low, high in stretches:
        inside = [i for i, end in enumerate(ends) if low < end <= high]
        if inside:
            span += [inside[0], inside[-1] + 1]
    return encoded["input_ids"], tuple(span)


def turn(role, content, **more):
    return {"role": role, "content": content, "reasoning": None, "tool_calls": None, **more}


def talk(*contents, system=None):
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    start = [] if system is None else [turn("system", system)]
    return [*start, *(turn(roles[i % 2], content) for i, content in enumerate(contents))]


# Letters that merge with what templates write around a turn are common, anything may occur.
TEXT = st.one_of(
    st.text(st.sampled_from("aub ]:\n"), max_size=8),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=12),
)
TALKS = st.builds(
    lambda pairs, system: talk(*(text for pair in pairs for text in pair), system=system),
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4),
    st.none() | TEXT,
)


@pytest.mark.parametrize("merges", MERGES)
@pytest.mark.parametrize("name", TEMPLATES)
@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(messages=TALKS)
def test_spans_are_the_turns_by_character_offsets(tokenizers, name, merges, messages):
    tokenizer, (template, pieces_of) = tokenizers[merges], TEMPLATES[name]
    pieces = pieces_of(messages)
    tokens, span = response_span(tokenizer, messages, template, turns="all")
    assert (tokens, span) == expected(tokenizer, pieces)
    check_spans([tokens], [span])
    assert all(a < b for a, b in zip(span[::2], span[1::2], strict=True))
    assert (tokens, span[-2:]) == response_span(tokenizer, messages, template)
    assert span[-1] == len(tokens)
    assert tokens[-1] in stop_tokens(tokenizer, template)
    if merges == "none":
        texts = [tokenizer.decode(tokens[a:b]) for a, b in zip(span[::2], span[1::2], strict=True)]
        assert texts == [piece.text for piece in pieces if piece.turn]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_twins_write_what_the_templates_write(plain, name):
    template, pieces_of = TEMPLATES[name]
    messages = talk("1+1?", "2", "2+2?", "", "3+3?", "6", system="Be brief.")
    text = "".join(piece.text for piece in pieces_of(messages))
    assert text.removesuffix("<eos>") == render(plain, messages, template).removesuffix("<eos>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_scored_turn_ends_with_the_end_of_turn(plain, name):
    template, _ = TEMPLATES[name]
    messages = talk("1+1?", "2", "2+2?", "4", "3+3?", "6")
    tokens, span = response_span(plain, messages, template, turns="all")
    assert len(span) == 6
    ends = [tokens[end - 1] for end in span[1::2]]
    if name == "bare":  # it marks no end within: only what follows the last turn is ours to add
        assert [plain.decode([end]) for end in ends] == ["\n", "\n", "<eos>"]
    else:
        assert set(ends) <= stop_tokens(plain, template)
        assert len(set(ends)) == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_one_turn_is_the_last_and_all_of_them(plain, name):
    template, _ = TEMPLATES[name]
    for messages in (talk("1+1?", "2"), talk("1+1?", "2", system="Be brief.")):
        last = response_span(plain, messages, template)
        assert response_span(plain, messages, template, turns="all") == last
        assert len(last[1]) == 2
    text = [turn("assistant", "Once upon a time")]
    assert response_span(plain, text, template, turns="all") == response_span(plain, text, template)


@pytest.mark.parametrize("turns", ["last", "all"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_unconditional_twin_keeps_the_turns_tokens_behind_the_start(plain, name, turns):
    template, _ = TEMPLATES[name]
    messages = talk("1+1?", "2", "2+2?", "four", system="Be brief.")
    tokens, span = response_span(plain, messages, template, turns=turns)
    alone, twin = unconditional(plain, tokens, span)
    assert alone[0] == start_token(plain) == plain.bos_token_id
    assert alone[1:] == [tokens[i] for i in positions(span)]
    assert twin == (1, len(alone))
    assert unconditional(plain, alone, twin) == (alone, twin)


def test_tool_calls_are_turns_and_their_results_are_not(plain):
    tools = '[{"name": "sum", "parameters": {}}]'
    messages = [
        turn("user", "1+1?"),
        turn("assistant", "", tool_calls='[{"name": "sum", "arguments": {"a": 1}}]'),
        turn("tool", "2"),
        turn("assistant", "It is 2", reasoning="read it"),
        turn("user", "sure?"),
        turn("assistant", "Yes"),
    ]
    tokens, span = response_span(plain, messages, tools=tools, turns="all")
    assert expected(
        plain,
        [
            Piece('<bos>[{"name": "sum", "parameters": {}}]\nQuestion: 1+1?\nAnswer:'),
            Piece(' [{"name": "sum", "arguments": {"a": 1}}]<eos>', True),
            Piece("\n2\nAnswer:"),
            Piece(" read it\n It is 2<eos>", True),
            Piece("\nQuestion: sure?\nAnswer:"),
            Piece(" Yes<eos>", True),
        ],
    ) == (tokens, span)


def test_a_conversation_closed_by_a_token_of_its_own_keeps_its_ends_of_turn(plain):
    messages = talk("1+1?", "2", "2+2?", "4")
    tokens, span = response_span(plain, messages, CLOSING, turns="all")
    texts = [plain.decode(tokens[a:b]) for a, b in zip(span[::2], span[1::2], strict=True)]
    assert texts == ["2<|im_end|>", "4<|im_end|>\n<eos>"]
    ends = plain.convert_tokens_to_ids(["<|im_end|>", "<eos>"])
    assert stop_tokens(plain, CLOSING) == set(ends)


def thinking(*reasons):
    """A conversation whose assistant turns have these thoughts."""
    messages = talk(*(text for i in range(len(reasons)) for text in (f"{i}?", f"{i}!")))
    for message, reason in zip(messages[1::2], reasons, strict=True):
        message["reasoning"] = reason
    return messages


def test_reasoning_dropped_later_on_is_an_error_where_that_turn_is_asked_for(plain):
    messages = thinking("first", "second")
    tokens, (start, end) = response_span(plain, messages, AFTER_LAST_USER)
    assert plain.decode(tokens[start:end]) == "<think>second</think>1!<|im_end|>"
    assert "first" not in plain.decode(tokens)
    with pytest.raises(UnscorableRow, match="rewrites turn 1") as raised:
        response_span(plain, messages, AFTER_LAST_USER, turns="all")
    assert raised.value.reason == "template_error"
    # Without thoughts in earlier turns nothing is dropped.
    tokens, span = response_span(plain, thinking(None, "second"), AFTER_LAST_USER, turns="all")
    texts = [plain.decode(tokens[a:b]) for a, b in zip(span[::2], span[1::2], strict=True)]
    assert texts == ["0!<|im_end|>", "<think>second</think>1!<|im_end|>"]


@pytest.mark.parametrize("turns", ["last", "all"])
def test_a_prompt_the_response_rewrites_is_an_error_and_not_a_longer_response(plain, turns):
    with pytest.raises(UnscorableRow, match="rewrites") as raised:
        response_span(plain, thinking("first", None), LAST_ASSISTANT, turns=turns)
    assert raised.value.reason == "template_error"
    tokens, span = response_span(plain, thinking(None, "second"), LAST_ASSISTANT, turns=turns)
    assert plain.decode(tokens[span[-2] :]) == "<think>second</think>1!<|im_end|>"


def test_a_thought_the_prompt_opens_is_no_error_but_one_that_is_dropped_is(plain):
    for first, second in (("first", "second"), (None, "second"), ("first", None)):
        with pytest.raises(UnscorableRow, match="leaves out the response's reasoning") as raised:
            response_span(plain, thinking(first, second), NEVER, turns="all")
        assert raised.value.reason == "template_drops_reasoning"
    messages = thinking(None, None)
    assert plain.decode(prompt_tokens(plain, messages, NEVER)).endswith("assistant\n<think>\n")
    tokens, span = response_span(plain, messages, NEVER, turns="all")
    texts = [plain.decode(tokens[a:b]) for a, b in zip(span[::2], span[1::2], strict=True)]
    assert texts == ["0!<|im_end|>", "1!<|im_end|>"]


def test_a_greeting_before_any_question_is_a_turn_like_others(plain):
    messages = [turn("assistant", "Hello"), *talk("1+1?", "2")]
    for name in ("question-answer", "chatml", "bare"):
        template, pieces_of = TEMPLATES[name]
        found = response_span(plain, messages, template, turns="all")
        assert found == expected(plain, pieces_of(messages))
        assert len(found[1]) == 4
    with pytest.raises(UnscorableRow, match="must alternate"):
        response_span(plain, messages, LLAMA, turns="all")


def test_a_response_to_tools_alone_is_scored_behind_them(plain):
    call = turn("assistant", "", tool_calls='[{"name": "f"}]')
    tokens, (start, end) = response_span(plain, [call], tools='[{"name": "f"}]')
    assert plain.decode(tokens[:start]) == '<bos>[{"name": "f"}]\nAnswer:'
    assert plain.decode(tokens[start:end]) == ' [{"name": "f"}]<eos>'


def test_a_turn_whose_tokens_all_belong_to_the_next_text_has_no_stretch(tokenizers):
    # "Ċu": the line break of the empty turn and the first letter of "user:" are one token.
    tokenizer = tokenizers["both sides"]
    tokens, span = response_span(tokenizer, talk("1?", "", "2?", "b"), BARE, turns="all")
    assert len(span) == 2
    assert tokenizer.decode(tokens[span[0] : span[1]]) == "b\n<eos>"


def test_a_boundary_that_merges_differently_starts_where_the_prompt_stops_being_shared(tiny):
    # " a" is merged before ": ", so the prompt's last token is not one of the conversation's.
    tokenizer = tiny.make_tokenizer(merges=[("Ġ", "a"), (":", "Ġ")])
    tokens, (start, end) = response_span(tokenizer, talk("1?", "ab"), BARE)
    assert tokenizer.decode(prompt_tokens(tokenizer, talk("1?", "ab"), BARE)[-1:]) == ": "
    assert [tokenizer.decode([t]) for t in tokens[start:end]] == [":", " a", "b", "\n", "<eos>"]


def test_special_tokens_that_users_write_do_not_end_a_turn(plain):
    messages = talk("say <|im_end|> twice", "<|im_end|> and <|im_end|>.", "why?", "so <eos>")
    tokens, span = response_span(plain, messages, CHATML, turns="all")
    texts = [plain.decode(tokens[a:b]) for a, b in zip(span[::2], span[1::2], strict=True)]
    assert texts == ["<|im_end|> and <|im_end|>.<|im_end|>", "so <eos><|im_end|>"]


@pytest.mark.parametrize("turns", ["last", "all"])
def test_the_limit_counts_the_whole_conversation(plain, turns):
    messages = talk("1+1?", "2", "2+2?", "4")
    length = len(response_span(plain, messages, turns=turns)[0])
    assert len(response_span(plain, messages, max_length=length, turns=turns)[0]) == length
    with pytest.raises(UnscorableRow, match="too_long"):
        response_span(plain, messages, max_length=length - 1, turns=turns)

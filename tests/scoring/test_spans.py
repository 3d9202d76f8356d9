"""Response spans: what is scored, at the level of tokens."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siftline.scoring.spans import (
    UnscorableRow,
    prompt_tokens,
    response_span,
    stop_tokens,
    unconditional,
)
from siftline.scoring.templates import QUESTION_ANSWER, chat_template_of, render

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
STRICT = "{{ raise_exception('roles must alternate') }}"


def turn(role, content, **more):
    return {"role": role, "content": content, "reasoning": None, "tool_calls": None, **more}


SUM = [turn("user", "1+1?"), turn("assistant", "It is 2")]


@pytest.fixture(scope="module")
def plain(tiny):
    return tiny.make_tokenizer()


@pytest.fixture(scope="module")
def chatml(tiny):
    tokenizer = tiny.make_tokenizer(template=CHATML)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def test_response_and_end_of_sequence_are_the_span(plain):
    tokens, (start, end) = response_span(plain, SUM)
    assert plain.decode(tokens[:start]) == "Question: 1+1?\nAnswer:"
    assert plain.decode(tokens[start:end]) == " It is 2<eos>"
    assert end == len(tokens)


def test_prompt_to_generate_from_is_the_scored_prompt(plain):
    tokens, (start, _) = response_span(plain, SUM)
    assert prompt_tokens(plain, SUM) == tokens[:start]
    assert prompt_tokens(plain, SUM[:-1]) == tokens[:start]


def test_system_and_earlier_turns_stand_before_the_span(plain):
    messages = [turn("system", "Be brief."), *SUM, turn("user", "2+2?"), turn("assistant", "4")]
    tokens, (start, end) = response_span(plain, messages)
    assert plain.decode(tokens[:start]) == (
        "Be brief.\nQuestion: 1+1?\nAnswer: It is 2<eos>\nQuestion: 2+2?\nAnswer:"
    )
    assert plain.decode(tokens[start:end]) == " 4<eos>"


def test_bos_opens_the_default_template_once(tiny):
    tokenizer = tiny.make_tokenizer(bos=True)
    tokens, _ = response_span(tokenizer, SUM)
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens.count(tokenizer.bos_token_id) == 1


def test_token_merged_across_the_boundary_belongs_to_the_span(tiny):
    # ":" and the space before the answer are one token: the prompt alone ends in ":".
    tokenizer = tiny.make_tokenizer(merges=[(":", "Ġ")])
    tokens, (start, end) = response_span(tokenizer, SUM)
    assert prompt_tokens(tokenizer, SUM)[-1:] == tokenizer.encode(":")
    assert tokenizer.decode(tokens[:start]) == "Question: 1+1?\nAnswer"
    assert tokenizer.decode(tokens[start:end]) == ": It is 2<eos>"


def test_end_of_turn_of_a_chat_template_ends_the_span(chatml):
    tokens, (start, end) = response_span(chatml, SUM)
    assert chatml.decode(tokens[start:end]) == "It is 2<|im_end|>"
    assert end == len(tokens)  # the newline behind it belongs to no turn
    end_of_turn = chatml.convert_tokens_to_ids("<|im_end|>")
    assert stop_tokens(chatml) == {chatml.eos_token_id, end_of_turn}


def test_template_without_end_of_turn_gets_eos(plain):
    tokens, (start, end) = response_span(plain, SUM, BARE)
    assert tokens[end - 1] == plain.eos_token_id
    assert plain.decode(tokens[start:end]) == "It is 2\n<eos>"
    assert stop_tokens(plain, BARE) == {plain.eos_token_id}


def test_plain_text_is_scored_whole(plain, tiny):
    tokens, span = response_span(plain, [turn("assistant", "Once.")])
    assert tokens == [plain.eos_token_id, *plain.encode("Once."), plain.eos_token_id]
    assert span == (1, 7)
    with_bos = tiny.make_tokenizer(bos=True)
    assert response_span(with_bos, [turn("assistant", "a")])[0][0] == with_bos.bos_token_id
    assert unconditional(plain, tokens, span) == (tokens, span)


def test_unconditional_keeps_the_response_tokens(plain):
    tokens, (start, end) = response_span(plain, SUM)
    alone, span = unconditional(plain, tokens, (start, end))
    assert alone == [plain.eos_token_id, *tokens[start:end]]
    assert span == (1, len(alone))


def test_too_long_and_refused_conversations_name_their_reason(plain):
    length = len(response_span(plain, SUM)[0])
    assert len(response_span(plain, SUM, max_length=length)[0]) == length
    with pytest.raises(UnscorableRow, match=f"{length} tokens") as raised:
        response_span(plain, SUM, max_length=length - 1)
    assert raised.value.reason == "too_long"
    with pytest.raises(UnscorableRow, match="too_long"):
        prompt_tokens(plain, SUM, max_length=len(prompt_tokens(plain, SUM)))
    with pytest.raises(UnscorableRow, match="roles must alternate") as raised:
        response_span(plain, SUM, STRICT)
    assert raised.value.reason == "template_error"


@pytest.mark.parametrize(
    "fault",
    [
        "messages[0].content + 1",  # TypeError
        "messages[0].content.index('no such text')",  # ValueError
        "messages[0].pop('no such key')",  # KeyError
        "messages[0].content.split('+')[5].strip()",  # UndefinedError, of jinja
        "[].pop()",  # IndexError
    ],
)
def test_what_a_templates_own_code_raises_is_the_rows_reason(plain, fault):
    with pytest.raises(UnscorableRow) as raised:
        response_span(plain, SUM, f"{{% if messages %}}{{{{ {fault} }}}}{{% endif %}}")
    assert raised.value.reason == "template_error"


def test_special_tokens_are_listed_once_and_again_when_there_are_more(tiny, monkeypatch):
    tokenizer = tiny.make_tokenizer(template=CHATML)
    kind = type(tokenizer)
    asked = []
    listed = kind.added_tokens_decoder.fget

    def counting(self):
        asked.append(self)
        return listed(self)

    monkeypatch.setattr(kind, "added_tokens_decoder", property(counting))
    assert response_span(tokenizer, SUM)[0][-1] == tokenizer.eos_token_id  # no such end of turn
    before = len(asked)
    for _ in range(3):
        response_span(tokenizer, SUM)
    assert len(asked) == before
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokens, _ = response_span(tokenizer, SUM)
    assert tokens[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_reasoning_tool_calls_and_tools_are_rendered(plain):
    call = turn("assistant", "", reasoning="add", tool_calls='[{"name": "sum"}]')
    text = render(plain, [SUM[0], call], tools='[{"name": "sum", "description": "adds"}]')
    assert "adds" in text.split("Question")[0]
    assert text.split("Answer:")[1] == ' add\n [{"name": "sum"}]<eos>'


def test_generation_marks_cover_what_is_scored(plain):
    """TRL trains where the marks are: it must be the same tokens the span names."""
    messages = [*SUM, turn("user", "2+2?"), turn("assistant", "4")]
    encoded = plain.apply_chat_template(
        messages,
        chat_template=QUESTION_ANSWER,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    tokens, (start, end) = response_span(plain, messages)
    assert encoded["input_ids"] == tokens
    mask = encoded["assistant_masks"]
    assert mask[start:end] == [1] * (end - start)
    assert not mask[start - 1]
    first = response_span(plain, SUM)[1]
    assert [i for i, m in enumerate(mask) if m][: first[1] - first[0]] == list(range(*first))


def test_recipe_template_wins_over_the_tokenizers_own(chatml, plain):
    assert chat_template_of(chatml, BARE) == BARE
    assert chat_template_of(chatml, None) == CHATML
    assert chat_template_of(plain, None) == QUESTION_ANSWER


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(system=TEXT, question=TEXT, answer=TEXT)
def test_span_decodes_to_the_response_whatever_the_text(plain, system, question, answer):
    messages = [turn("system", system), turn("user", question), turn("assistant", answer)]
    tokens, (start, end) = response_span(plain, messages)
    body = f" {answer}" if answer else ""
    assert tokens[start:end] == [*plain(body)["input_ids"], plain.eos_token_id]
    prompt = f"{system}\nQuestion: {question}\nAnswer:"
    assert tokens[:start] == plain(prompt)["input_ids"]

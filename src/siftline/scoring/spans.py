"""Which tokens of a conversation are the response.

The span starts where the templated conversation with the last assistant turn and the one without
it (but with the generation prompt) stop sharing tokens. Tokenising the response alone would miss
tokens that merge across the boundary. The end of turn is part of the span: a model must learn, and
is asked, where to stop.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jinja2

from siftline.scoring.engines import Span, positions
from siftline.scoring.templates import render

Turns = Literal["last", "all"]
"""Which assistant turns are the response."""


class UnscorableRow(ValueError):
    """A row no engine can score; `reason` is what the ledger records."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` alone; templates write their own special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def start_token(tokenizer: Any) -> int:
    """What stands before a text without a prompt: BOS, or EOS where the tokenizer has no BOS."""
    bos = tokenizer.bos_token_id
    return int(tokenizer.eos_token_id if bos is None else bos)


def _templated(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
    try:
        return encode(tokenizer, render(tokenizer, messages, **options))
    except jinja2.TemplateError as error:
        raise UnscorableRow("template_error", str(error)) from error


def _turn_end(tokenizer: Any, tokens: list[int], start: int) -> int | None:
    """Position after the token that ends the turn, or None where the template writes none.

    It is the last special token, with nothing but white space after it: ChatML's <|im_end|> is
    followed by a newline that belongs to no turn.
    """
    special = set(tokenizer.all_special_ids)
    special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    for position in range(len(tokens) - 1, start - 1, -1):
        if tokens[position] in special:
            rest = tokens[position + 1 :]
            return position + 1 if not tokenizer.decode(rest).strip() else None
    return None


def _text_span(tokenizer: Any, text: str) -> tuple[list[int], Span]:
    tokens = [start_token(tokenizer), *encode(tokenizer, text), int(tokenizer.eos_token_id)]
    return tokens, (1, len(tokens))


def response_span(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    template: str | None = None,
    *,
    tools: str | None = None,
    max_length: int | None = None,
    turns: Turns = "last",
) -> tuple[list[int], Span]:
    """Tokens of a conversation and the half-open span of its assistant turns.

    A row of plain text (one assistant message, nothing before it) is scored as text: the start
    token, the text, end of sequence. A template that writes no end of turn gets EOS appended.

    Args:
        tokenizer: A fast transformers tokenizer.
        messages: The conversation; the last message is the assistant's.
        template: Jinja chat template; None takes the tokenizer's, else QUESTION_ANSWER.
        tools: JSON list of tools, as the row has it.
        max_length: Most tokens a row may have; None for no limit.
        turns: The last assistant turn, or all of them.

    Returns:
        Token ids, and the span: (start, end), one pair a turn, with 1 <= start < end and the last
        end == len(tokens).

    Raises:
        UnscorableRow: reason `too_long` or `template_error`.
    """
    assert messages[-1]["role"] == "assistant", f"last role is {messages[-1]['role']!r}"
    if len(messages) == 1 and not tools:
        message = messages[0]
        if message.get("reasoning") or message.get("tool_calls"):
            raise UnscorableRow("template_error", "reasoning or tool calls without a prompt")
        tokens, span = _text_span(tokenizer, message.get("content") or "")
    else:
        tokens, span = _turn_span(tokenizer, messages, template, tools)
        if turns == "all":
            span = (*_earlier_turns(tokenizer, messages, tokens, template, tools), *span)
    if max_length is not None and len(tokens) > max_length:
        raise UnscorableRow("too_long", f"{len(tokens)} tokens, the model takes {max_length}")
    return tokens, span


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _earlier_turns(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tokens: list[int],
    template: str | None,
    tools: str | None,
) -> Span:
    """Spans of the assistant turns before the last one within the whole conversation's tokens.

    Raises:
        UnscorableRow: if the template shows an earlier turn otherwise once others follow (some drop
            its reasoning): what the model saw there is then not what the turn said.
    """
    span: list[int] = []
    for i, message in enumerate(messages[:-1]):
        if message["role"] != "assistant":
            continue
        alone, (start, end) = _turn_span(tokenizer, messages[: i + 1], template, tools)
        shared = _shared(alone, tokens)
        if shared < end:
            # A template that writes no end of turn got EOS appended: the text alone is the turn.
            written = _templated(tokenizer, messages[: i + 1], template=template, tools=tools)
            if shared < min(len(written), end):
                raise UnscorableRow("template_error", f"the template rewrites turn {i} later on")
            end = shared
        span += [max(start, span[-1] if span else 1), end]
    return tuple(span)


def _turn_span(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    template: str | None,
    tools: str | None,
) -> tuple[list[int], tuple[int, int]]:
    tokens = _templated(tokenizer, messages, template=template, tools=tools)
    prompt = _templated(
        tokenizer, messages[:-1], template=template, tools=tools, generation_prompt=True
    )
    start = max(_shared(tokens, prompt), 1)  # nothing predicts the first token
    end = _turn_end(tokenizer, tokens, start)
    if end is None:
        tokens, end = [*tokens, int(tokenizer.eos_token_id)], len(tokens) + 1
    return tokens[:end], (start, end)


def unconditional(tokenizer: Any, tokens: Sequence[int], span: Span) -> tuple[list[int], Span]:
    """The same response tokens without their prompt, behind the start token alone.

    Keeps the very tokens of `response_span`, so conditional and unconditional log-probabilities
    are of the same events and can be subtracted. Several turns stand one behind the other.
    """
    response = [tokens[i] for i in positions(span)]
    assert response, f"span {span} in {len(tokens)} tokens"
    return [start_token(tokenizer), *response], (1, len(response) + 1)


def prompt_tokens(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    template: str | None = None,
    *,
    tools: str | None = None,
    max_length: int | None = None,
) -> list[int]:
    """Tokens to generate an answer from; a last assistant turn, the answer itself, is left off.

    Raises:
        UnscorableRow: reason `template_error`, or `too_long` when no room is left for an answer.
    """
    prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not prompt:
        return [start_token(tokenizer)]
    tokens = _templated(tokenizer, prompt, template=template, tools=tools, generation_prompt=True)
    if max_length is not None and len(tokens) >= max_length:
        raise UnscorableRow("too_long", f"{len(tokens)} tokens, the model takes {max_length}")
    return tokens


def stop_tokens(tokenizer: Any, template: str | None = None) -> frozenset[int]:
    """Tokens that end an assistant turn: EOS, and the template's end of turn where it differs."""
    probe = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
    tokens, _ = response_span(tokenizer, probe, template)
    return frozenset({int(tokenizer.eos_token_id), tokens[-1]})

"""Which tokens of a conversation are the response.

The span starts where the templated conversation with the last assistant turn and the one without
it (but with the generation prompt) stop sharing tokens. Tokenising the response alone would miss
tokens that merge across the boundary. The end of turn is part of the span: a model must learn, and
is asked, where to stop.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from itertools import takewhile
from typing import Any, Literal
from weakref import WeakKeyDictionary

from siftline.rows.native import native_message
from siftline.scoring.engines.base import Span, positions
from siftline.scoring.engines.batching import least_tokens
from siftline.scoring.templates import OMISSIONS, chat_template_of, omission, render

Turns = Literal["last", "all"]
"""Which assistant turns are the response."""
MOST_TURNS = 1 << 25
"""Most turns times tokens of a row whose turns are all the response: each of them is templated with
all that comes before it. As many as 2,000 turns of 16,000 tokens in all."""


def _faults() -> tuple[type[Exception], ...]:
    """What a template's own code raises about a row that it was not written for."""
    import jinja2

    return (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        RecursionError,
    )


class UnscorableRow(ValueError):
    """A row no engine can score.

    Attributes:
        reason: What the ledger records.
        tokens: How many it has, where they are too many and were counted.
    """

    def __init__(self, reason: str, detail: str, tokens: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.tokens = reason, tokens


def encode(tokenizer: Any, text: str, max_length: int | None = None) -> list[int]:
    """Token ids of `text` alone; templates write their own special tokens.

    Raises:
        UnscorableRow: `too_long` if it must have more than `max_length` tokens, which is told from
            its length before it is cut into any. Space at its end does not count.
    """
    if max_length is not None and least_tokens(tokenizer, text.rstrip()) > max_length:
        raise UnscorableRow("too_long", f"{len(text):,} characters, above {max_length} tokens")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def start_token(tokenizer: Any) -> int:
    """What stands before a text without a prompt: BOS, or EOS where the tokenizer has no BOS."""
    bos = tokenizer.bos_token_id
    return int(tokenizer.eos_token_id if bos is None else bos)


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """`templates.render` for one row of many.

    Raises:
        UnscorableRow: reason `template_error`, if the template fails on the conversation.
    """
    try:
        return render(tokenizer, messages, **options)
    except _faults() as error:
        raise UnscorableRow("template_error", f"{type(error).__name__}: {error}") from error


def complete(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    text: str,
    begin: int | None,
    *,
    template: str | None = None,
    tools: str | None = None,
) -> None:
    """Holds a rendered conversation to what the row says; see `templates`.

    Args:
        tokenizer: A fast transformers tokenizer.
        messages: The conversation.
        text: What the template made of it.
        begin: Where the response begins in `text`; None for a prompt without one.
        template: Jinja chat template; None takes the tokenizer's, else QUESTION_ANSWER.
        tools: JSON list of tools, as the row has it.

    Raises:
        UnscorableRow: with the reason in `templates.OMISSIONS`, if part of it is missing.
    """

    def probe(messages: Sequence[Mapping[str, Any]], tools: str | None) -> str | None:
        options: dict[str, Any] = {"template": template, "tools": tools}
        try:
            return render(tokenizer, messages, generation_prompt=begin is None, **options)
        except _faults():
            return None

    inforce = chat_template_of(tokenizer, template)
    reason = omission(tokenizer, inforce, messages, tools, text, begin, probe)
    if reason is not None:
        raise UnscorableRow(reason, f"the chat template leaves out {OMISSIONS[reason]}")


_SPECIALS: MutableMapping[Any, tuple[int, frozenset[int]]] = WeakKeyDictionary()
"""By tokenizer: its size when they were listed, for it may be given more, and its special ids."""


def _specials(tokenizer: Any) -> frozenset[int]:
    size, special = _SPECIALS.get(tokenizer, (-1, frozenset()))
    if size != len(tokenizer):
        added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        special = frozenset({*tokenizer.all_special_ids, *added})
        _SPECIALS[tokenizer] = len(tokenizer), special
    return special


def _turn_end(tokenizer: Any, tokens: list[int], start: int) -> int | None:
    """Position after the token that ends the turn, or None where the template writes none.

    It is the last special token, with nothing but white space after it: ChatML's <|im_end|> is
    followed by a newline that belongs to no turn.
    """
    special = _specials(tokenizer)
    for position in range(len(tokens) - 1, start - 1, -1):
        if tokens[position] in special:
            rest = tokens[position + 1 :]
            return position + 1 if not tokenizer.decode(rest).strip() else None
    return None


def _text_span(tokenizer: Any, text: str, max_length: int | None) -> tuple[list[int], Span]:
    inside = encode(tokenizer, text, max_length)
    tokens = [start_token(tokenizer), *inside, int(tokenizer.eos_token_id)]
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
        UnscorableRow: reason `too_long`, `template_error`, or what the template leaves out, one of
            `templates.OMISSIONS`.
    """
    assert messages[-1]["role"] == "assistant", f"last role is {messages[-1]['role']!r}"
    if len(messages) == 1 and not tools:
        message = native_message(messages[0])
        if "reasoning_content" in message or "tool_calls" in message:
            raise UnscorableRow("template_error", "reasoning or tool calls without a prompt")
        tokens, span = _text_span(tokenizer, message["content"], max_length)
    else:
        tokens, span = _turn_span(tokenizer, messages, template, tools, max_length)
    if max_length is not None and len(tokens) > max_length:
        detail = f"{len(tokens)} tokens, the model takes {max_length}"
        raise UnscorableRow("too_long", detail, len(tokens))
    if turns == "all" and len(messages) > 2:
        span = (*_earlier_turns(tokenizer, messages, tokens, template, tools), *span)
    return tokens, span


def trimmed(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], template: str | None = None
) -> bool:
    """Whether a template takes white space off the ends of a response, which is no omission."""
    content = messages[-1].get("content") or ""
    if len(messages) == 1 or content == content.strip():
        return False
    probe = [{"role": "user", "content": "1"}, {"role": "assistant", "content": content}]
    try:
        return content not in render(tokenizer, probe, template)
    except _faults():
        return False


def trimmed_ids(
    tokenizer: Any, rows: Iterable[Mapping[str, Any]], template: str | None = None
) -> set[str]:
    """Ids of the rows whose response is `trimmed`.

    Args:
        tokenizer: With the model's own template.
        rows: With id and messages.
        template: The one that is used instead.
    """
    return {row["id"] for row in rows if trimmed(tokenizer, row["messages"], template)}


def _shared(left: Sequence[Any], right: Sequence[Any]) -> int:
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

    A token that merges with what follows a turn belongs to that, as it does at a turn's start.

    Raises:
        UnscorableRow: if the template shows an earlier turn otherwise once others follow (some drop
            its reasoning): what the model saw there is then not what the turn said. Or if there is
            more to template than `MOST_TURNS`.
    """
    span: list[int] = []
    work = len(messages) * len(tokens)
    if work > MOST_TURNS:
        raise UnscorableRow("too_long", f"{len(messages)} turns of {len(tokens)} tokens in all")
    for i, message in enumerate(messages[:-1]):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        turn = messages[: i + 1]
        alone, (start, end) = _turn_span(tokenizer, turn, template, tools)
        shared = _shared(alone, tokens)
        if shared < end:
            # All that may be missing is an end: EOS we appended, a template's close of the whole
            # conversation behind the end of turn, or a token that merged with what follows.
            missing = tokenizer.decode(alone[shared:end], skip_special_tokens=True)
            options = {"template": template, "tools": tools}
            if missing.strip() and not rendered(tokenizer, messages, **options).startswith(
                rendered(tokenizer, turn, **options)
            ):
                raise UnscorableRow("template_error", f"the template rewrites turn {i} later on")
            end = _turn_end(tokenizer, alone[:shared], start) or shared
        if end > start:
            span += [start, end]
    return tuple(span)


def _turn_span(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    template: str | None,
    tools: str | None,
    max_length: int | None = None,
) -> tuple[list[int], tuple[int, int]]:
    """Tokens of a conversation up to the end of its last turn, and that turn's span.

    Raises:
        UnscorableRow: if what stands before the turn is written otherwise once the turn follows:
            the tokens then part within the prompt, and a span from there would hold some of it.
    """
    options: dict[str, Any] = {"template": template, "tools": tools}
    text = rendered(tokenizer, messages, **options)
    before = messages[:-1]
    if before:
        prompt = rendered(tokenizer, before, **options, generation_prompt=True)
    else:  # templates take no empty conversation: the turn without its content opens it as well
        prompt = rendered(tokenizer, [{"role": "assistant", "content": ""}], **options)
    begin = len(prompt) if text.startswith(prompt) else _shared(text, prompt)
    if before and begin < len(prompt):
        # They may part within the generation prompt (some open a thought), not before it.
        history = rendered(tokenizer, before, **options)
        if begin < _shared(history, prompt):
            raise UnscorableRow("template_error", "the template rewrites the prompt of a response")
        begin = _shared(text, history)
    tokens = encode(tokenizer, text, max_length)
    complete(tokenizer, messages, text, begin if before else 0, **options)
    start = _shared(tokens, encode(tokenizer, prompt))
    start = max(start, 1)  # nothing predicts the first token
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
        UnscorableRow: reason `template_error`, one of `templates.OMISSIONS`, or `too_long` when no
            room is left for an answer.
    """
    prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not prompt:
        return [start_token(tokenizer)]
    options: dict[str, Any] = {"template": template, "tools": tools}
    text = rendered(tokenizer, prompt, **options, generation_prompt=True)
    tokens = encode(tokenizer, text, max_length)
    complete(tokenizer, prompt, text, None, **options)
    if max_length is not None and len(tokens) >= max_length:
        raise UnscorableRow("too_long", f"{len(tokens)} tokens, the model takes {max_length}")
    return tokens


def stop_tokens(tokenizer: Any, template: str | None = None) -> frozenset[int]:
    """Tokens that end an assistant turn: EOS, and what the template writes behind a response.

    Those are two where a template ends the turn with one token and the conversation with another.
    """
    probe = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
    tokens, _ = response_span(tokenizer, probe, template)
    special = _specials(tokenizer)
    behind = takewhile(lambda t: t in special or not tokenizer.decode([t]).strip(), tokens[::-1])
    return frozenset({int(tokenizer.eos_token_id), *(t for t in behind if t in special)})

"""Chat templates: the default for base models, and how a message becomes a template's input.

A base model has no chat template. It gets `QUESTION_ANSWER`, whose generation prompt ends in
"Answer:" without the space: tokenizers with merges put that space into the first token of the
answer, so a prompt that ends in a lone space would ask for text the model has never seen. The space
belongs to the response, in scoring, in sampling and (by the generation marks) in training alike.

What a chat template leaves out of a conversation.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from siftline.rows.native import native_message, native_tools, text_calls
from siftline.scoring.engines.base import ModelSpec, check_directory

QUESTION_ANSWER = (
    "{%- if bos_token is defined and bos_token %}{{ bos_token }}{% endif %}"
    "{%- if tools %}{{ tools | tojson }}{{ '\\n' }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{{ 'Question: ' + message.content + '\\n' }}"
    "{%- elif message.role == 'assistant' %}{{ 'Answer:' }}"
    "{%- generation %}"
    "{%- if message.reasoning_content %}{{ ' ' + message.reasoning_content + '\\n' }}{% endif %}"
    "{%- if message.content %}{{ ' ' + message.content }}{% endif %}"
    "{%- if message.tool_calls %}{{ ' ' + (message.tool_calls | tojson) }}{% endif %}"
    "{{- eos_token }}{% endgeneration %}"
    "{%- if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}"
    "{%- else %}{{ message.content + '\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
"""Question: {user}\\nAnswer: {assistant}<eos>, system and tool messages as plain lines.

The form GSM8K evaluations give base models (lm-evaluation-harness), with the generation marks that
let TRL mask exactly the response and its end of sequence.
"""


def chat_template_of(tokenizer: Any, template: str | None) -> str:
    """The Jinja template in force: the recipe's, else the tokenizer's own, else QUESTION_ANSWER."""
    return template or own_template(tokenizer) or QUESTION_ANSWER


def own_template(tokenizer: Any) -> str | None:
    """The template that comes with a tokenizer, the default one where it has several by name."""
    own = tokenizer.chat_template
    found = own.get("default") if isinstance(own, dict) else own
    assert found is None or isinstance(found, str)
    return found


def load_tokenizer(spec: ModelSpec) -> Any:
    """Loads the tokenizer of `spec` with the template in force as its `chat_template`.

    Raises:
        ValueError: if the directory is missing, the tokenizer is not a fast one, or it has no
            end of sequence.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(check_directory(spec)),
        local_files_only=True,
        trust_remote_code=spec.trust_remote_code,
    )
    if not tokenizer.is_fast:
        raise ValueError(f"{spec.path!r} has no fast tokenizer: save one as tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {spec.path!r} has no eos_token: set one in it")
    tokenizer.chat_template = chat_template_of(tokenizer, spec.template)
    return tokenizer


def _template_message(message: Mapping[str, Any], nested: bool) -> dict[str, Any]:
    """One message as templates expect it, with its reasoning under every name in use.

    Args:
        message: Of a row or of a published version.
        nested: Whether the template reads calls as `function`; others show what the row has.
    """
    result = native_message(message)
    result.pop("weight", None)
    if "reasoning_content" in result:
        result |= dict.fromkeys(("reasoning", "thinking"), result["reasoning_content"])
    if not nested and isinstance(message.get("tool_calls"), str):
        result["tool_calls"] = json.loads(message["tool_calls"])
    return result


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": text_calls(calls)} if calls else message


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    template: str | None = None,
    *,
    tools: str | None = None,
    generation_prompt: bool = False,
) -> str:
    """Templates a conversation to text.

    Args:
        tokenizer: A transformers tokenizer.
        messages: Messages of `schema.MESSAGE`, or of a published version.
        template: Jinja chat template; None takes the tokenizer's.
        tools: JSON list of the tools the conversation may call.
        generation_prompt: Whether to open an assistant turn at the end.

    Raises:
        jinja2.TemplateError: if the template refuses the conversation (say, roles that do not
            alternate), or takes more steps than `template_limits.STEPS`.
    """
    from siftline.scoring.template_limits import apply_chat_template

    source = chat_template_of(tokenizer, template)
    told = [_template_message(message, "function" in source) for message in messages]

    def templated(conversation: list[dict[str, Any]]) -> str:
        return apply_chat_template(
            tokenizer,
            conversation,
            tools=native_tools(tools),
            chat_template=source,
            add_generation_prompt=generation_prompt,
        )

    try:
        text = templated(told)
    except TypeError:
        # Some templates (DeepSeek V3's) put the arguments into the text as they are.
        if not any(message.get("tool_calls") for message in told):
            raise
        text = templated([_with_text_arguments(message) for message in told])
    assert isinstance(text, str)
    return text


PROMPT, TOOLS = "template_drops_prompt", "template_drops_tools"
CONTENT, REASONING = "template_drops_content", "template_drops_reasoning"
CALLS = "template_drops_calls"
OMISSIONS = {
    CONTENT: "the response's content",
    REASONING: "the response's reasoning",
    CALLS: "the response's tool calls",
    PROMPT: "part of the prompt",
    TOOLS: "the tools",
}
"""Reasons, the gravest first, and what they say is missing."""

Render = Callable[[Sequence[Mapping[str, Any]], str | None], str | None]
"""Templates messages and tools (JSON); None where the template fails on them."""
Shape = tuple[tuple[Any, ...], ...]

_THOUGHT = re.compile(r"</?think(?:ing)?>")
_SWITCHES = re.compile(r"/(?:no_)?think\b")
"""Words by which a prompt turns reasoning on and off; templates take them out."""
_KEPT_SHAPES = 4096
_PROBED: MutableMapping[Any, dict[tuple[str, Shape, bool], frozenset[str]]] = WeakKeyDictionary()


def omission(
    tokenizer: Any,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: str | None,
    text: str,
    begin: int | None,
    render: Render,
) -> str | None:
    """The gravest omission of a rendered conversation, a key of `OMISSIONS`; None without one.

    Args:
        tokenizer: The tokenizer; probes are kept by it.
        template: The template in force.
        messages: The conversation; its last message is the response unless `begin` is None.
        tools: JSON of the tools.
        text: The rendered conversation.
        begin: Where the response begins in `text`; None for a prompt without one.
        render: The template, for the probe.
    """
    native = [native_message(message) for message in messages]
    found = set(_probed(tokenizer, template, native, bool(tools), render))
    said = text
    if begin is None:
        found -= {CONTENT, REASONING, CALLS}
    else:
        said = text[:begin]
        found |= missing_from_response(native[-1], text[begin:])
        native = native[:-1]
    kept = (m["content"] for m in native if m["role"] != "assistant")
    if not all(_mentions(said, content) for content in kept):
        found.add(PROMPT)
    if tools and not all(_spelled(name, text) for name in _tool_names(tools)):
        found.add(TOOLS)
    return next((reason for reason in OMISSIONS if reason in found), None)


def _probed(
    tokenizer: Any,
    template: str,
    native: Sequence[Mapping[str, Any]],
    tools: bool,
    render: Render,
) -> frozenset[str]:
    """What the template leaves out of every conversation of this shape."""
    shape = tuple(
        (
            m["role"],
            bool(m["content"]),
            "reasoning_content" in m,
            len(m.get("tool_calls", ())),
            "tool_call_id" in m,
            "name" in m,
        )
        for m in native
    )
    known = _PROBED.setdefault(tokenizer, {})
    key = (template, shape, tools)
    if key not in known:
        if len(known) >= _KEPT_SHAPES:
            known.clear()
        known[key] = _probe(shape, tools, render)
    return known[key]


def _probe(shape: Shape, tools: bool, render: Render) -> frozenset[str]:
    parts = [_probe_message(number, *of) for number, of in enumerate(shape)]
    offered = json.dumps([_TOOL]) if tools else None
    text = render([message for message, _ in parts], offered)
    if text is None:  # nothing can be told from a shape that fails with other words in it
        return frozenset()
    found = set()
    for number, (_, words) in enumerate(parts):
        missing = {part for part, needed in words.items() if any(w not in text for w in needed)}
        if number < len(parts) - 1:
            assistant = shape[number][0] == "assistant"
            own = {CALLS} | ({CONTENT} if not assistant or not shape[number][3] else set())
            missing = {PROMPT} if missing & own else set()
        found |= missing
    if tools and any(word not in text for word in _TOOL_WORDS):
        found.add(TOOLS)
    return frozenset(found)


_TOOL_WORDS = ("sentineltool", "sentinelparameter")
_TOOL = {
    "type": "function",
    "function": {
        "name": "sentineltool",
        "description": "Looks something up.",
        "parameters": {
            "type": "object",
            "properties": {"sentinelparameter": {"type": "string", "description": "What."}},
            "required": ["sentinelparameter"],
        },
    },
}


def _probe_message(
    number: int, role: str, content: bool, reasoning: bool, calls: int, link: bool, name: bool
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """A message of a shape, and the words of each of its parts."""
    message: dict[str, Any] = {"role": role, "content": ""}
    words: dict[str, list[str]] = {}
    if content:
        message["content"] = f"sentinel{number}content"
        words[CONTENT] = [message["content"]]
    if reasoning:
        message["reasoning_content"] = f"sentinel{number}reasoning"
        words[REASONING] = [message["reasoning_content"]]
    if calls:
        each = [[f"sentinel{number}{part}{i}end" for part in "fkv"] for i in range(calls)]
        message["tool_calls"] = [
            {
                "id": f"s{number:04d}{i:04d}",  # nine letters and digits, as Mistral's wants
                "type": "function",
                "function": {"name": function, "arguments": {key: value}},
            }
            for i, (function, key, value) in enumerate(each)
        ]
        words[CALLS] = [word for call in each for word in call]
    if link:
        message["tool_call_id"] = f"s{max(number - 1, 0):04d}0000"
    if name:
        message["name"] = f"sentinel{number}name"
    return message, words


def missing_from_response(message: Mapping[str, Any], said: str) -> set[str]:
    """Reasons of the parts of a native message that a text does not hold."""
    found = set()
    *thought, content = _THOUGHT.split(message["content"])
    place = 0
    for reason, piece in [*((REASONING, p) for p in thought), (CONTENT, content)]:
        place = _find(piece.strip(), said, place)
        if place < 0:
            found.add(reason)
            place = 0
    reasoning = _THOUGHT.split(message.get("reasoning_content", ""))
    if any(_find(piece.strip(), said, 0) < 0 for piece in reasoning):
        found.add(REASONING)
    if any(not _holds_call(call, said) for call in message.get("tool_calls", ())):
        found.add(CALLS)
    return found


def _spellings(text: str) -> Iterator[str]:
    """A text as it is, and as it stands in JSON."""
    yield text
    for ascii_only in (False, True):
        yield json.dumps(text, ensure_ascii=ascii_only)[1:-1]


def _find(text: str, within: str, start: int) -> int:
    """Where a spelling of `text` ends in `within`, or -1."""
    for spelling in _spellings(text):
        place = within.find(spelling, start)
        if place >= 0:
            return place + len(spelling)
    return -1


def _spelled(text: str, within: str) -> bool:
    return _find(text, within, 0) >= 0


def _mentions(said: str, content: str) -> bool:
    """Whether a prompt holds a content, whatever its white space and switches."""
    if _spelled(content.strip(), said):
        return True
    bare, within = ("".join(_SWITCHES.sub("", t).split()) for t in (content, said))
    return _spelled(bare, within)


def _tool_names(tools: str) -> Iterator[str]:
    for tool in native_tools(tools) or []:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            yield function["name"]


def _holds_call(call: Any, said: str) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return all(any(s in said for s in leaf) for leaf in _leaves(call))
    if not _spelled(str(function.get("name", "")), said):
        return False
    arguments = function.get("arguments")
    held = all(any(s in said for s in leaf) for leaf in _leaves(arguments))
    return held or arguments in _objects(said)


def _leaves(value: Any) -> Iterator[tuple[str, ...]]:
    """The spellings of each key and each simple value within a value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield tuple(_spellings(str(key)))
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        # Templates that write a value without quotes trim it; those that write Python repr it.
        yield (*_spellings(value), *_spellings(value.strip()), repr(value)[1:-1])
    else:
        yield (json.dumps(value), str(value))


def _objects(said: str) -> Iterator[Any]:
    """Every JSON object within a text, and every one that is the text of a JSON string there."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r'[{"]', said):
        try:
            value, _ = decoder.raw_decode(said, match.start())
            if isinstance(value, str) and value.startswith("{"):
                value = json.loads(value)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value

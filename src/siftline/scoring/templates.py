"""Chat templates: the default for base models, and how a message becomes a template's input.

A base model has no chat template. It gets `QUESTION_ANSWER`, whose generation prompt ends in
"Answer:" without the space: tokenizers with merges put that space into the first token of the
answer, so a prompt that ends in a lone space would ask for text the model has never seen. The space
belongs to the response, in scoring, in sampling and (by the generation marks) in training alike.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

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

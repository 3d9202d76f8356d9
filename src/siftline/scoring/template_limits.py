"""Chat templates compiled so that rendering ends: in bounded steps, with bounded values.

A template is a program that comes with a model. Jinja's sandbox keeps it from Python's internals,
not from looping over loops, doubling a string forty times or asking for ten thousand million
blanks. Here each round of a loop, each call, filter and operator costs steps, and more of them for
large values; who spends more than `STEPS`, or makes a value above `CHARS`, gets `TemplateLimit`.

Steps are counted, not seconds: the same row has the same end on every machine, under any load, in
threads and in child processes, where no signal could stop it.

The same row has the same text as well, whenever it is rendered. A template that asks for the date
gets `DATE`; one that draws at random, or writes an object's address, fails.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache, wraps
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, MethodWrapperType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

logger = logging.getLogger(__name__)

DATE = datetime(2024, 7, 26)
"""What `strftime_now` tells. Llama 3.1's template names this day where nobody gives it a date."""
STEPS = 2_000_000
"""Most steps of one rendering, some seconds. Templates of known models take some tens a message,
and one for every 64 characters they copy."""
CHARS = 64 << 20
"""Most characters of any text, or items of any list, that a template makes."""
CALL_STEPS = 4
"""What a call costs beside its arguments."""
STEP_CHARS = 64
"""Characters that are handled for one step."""
WIDEST = 1 << 20
"""Largest number a template may hand to a function: widths, counts, precisions."""
DIGITS = 1000
"""Most decimal digits of a number a template makes."""
_OPERATORS = frozenset(["+", "-", "*", "/", "//", "**", "%"])
_WIDE_FORMAT = re.compile(r"\d{7}|\*")
"""A width in a format string above `WIDEST`, or one that comes as an argument."""
_FORMATS = ("format", "format_map")
_MULTIPLYING = ("translate", "expandtabs", "wordwrap", "indent")
# fmt: off
_SHALLOW = frozenset([
    "attr", "batch", "boolean", "callable", "count", "d", "default", "defined", "even", "false",
    "filter", "first", "float", "integer", "items", "iterable", "last", "length", "list", "map",
    "mapping", "none", "number", "odd", "reject", "rejectattr", "reverse", "safe",
    "sameas", "select", "selectattr", "sequence", "slice", "test", "true", "undefined",
])
# fmt: on
"""Filters and tests that do not look into what the items of their value hold."""


class TemplateLimit(jinja2.TemplateRuntimeError):
    """A template takes more steps, or makes larger values, than any honest one."""


class _Meter(threading.local):
    """Steps left in the rendering that this thread is at."""

    left: float = 0.0

    def take(self, steps: float) -> None:
        self.left -= steps
        if self.left < 0:
            raise TemplateLimit(f"the template takes more than {STEPS:,} steps on this row")


_METER = _Meter()


def _size(value: Any) -> int:
    """Characters, items, or bytes of a number: what a value costs to copy."""
    if isinstance(value, int):
        return value.bit_length() // 8
    try:
        return len(value)
    except (TypeError, OverflowError, jinja2.UndefinedError):
        return 0


def _paid(value: Any) -> Any:
    """The value, its size paid for."""
    size = _size(value)
    _refuse(size)
    _METER.take(1 + size / STEP_CHARS)
    return value


def _weighed(value: Any) -> Any:
    """The value, all that it holds paid for: lists of the same list twice grow exponentially."""
    _METER.take(1 + _size(value) / STEP_CHARS)
    left = [value] if isinstance(value, dict | list | tuple | set | frozenset) else []
    while left:
        here = left.pop()
        _METER.take(CALL_STEPS + _size(here) / STEP_CHARS)
        if isinstance(here, dict):
            left += [*here.keys(), *here.values()]
        elif isinstance(here, list | tuple | set | frozenset):
            left += here
    return value


_ADDRESSED = (BuiltinFunctionType, FunctionType, GeneratorType, MethodType, MethodWrapperType, map,
              zip, filter)  # fmt: skip


def _check_text(value: Any) -> None:
    """Refuses to make a text of what shows its address, which is another one in each process."""
    left = [value]
    while left:
        here = left.pop()
        if isinstance(here, dict):
            left += [*here.keys(), *here.values()]
        elif isinstance(here, list | tuple):
            left += here
        elif isinstance(here, _ADDRESSED) or type(here).__repr__ is object.__repr__:
            raise TemplateLimit(f"the template writes a {type(here).__name__}, which is no text")


def _finalized(value: Any) -> Any:
    """What `{{ value }}` writes."""
    if not isinstance(value, str):
        _weighed(value)
        _check_text(value)
    return value


@cache
def _say_date() -> None:
    logger.warning(
        "a chat template asks for the date: it is told %s, always, so that equal rows are equal "
        "texts; name a template with a date of your own to change that", f"{DATE:%Y-%m-%d}"
    )  # fmt: skip


def _strftime_now(form: str) -> str:
    """The date of every rendering."""
    _say_date()
    return DATE.strftime(form)


def _refuse(size: float) -> None:
    """Refuses a value before it is made."""
    if size > CHARS:
        raise TemplateLimit(f"the template makes a value of {size:,.0f} characters or items")


def _check_arguments(arguments: Iterable[Any]) -> None:
    for value in arguments:
        if isinstance(value, int | float) and abs(value) > WIDEST:
            raise TemplateLimit(f"the template calls a function with {value:.3g}")
        _METER.take(1 + _size(value) / STEP_CHARS)


def _check_growth(name: str, value: Any, arguments: tuple[Any, ...]) -> None:
    """Refuses calls whose result is larger than what they are given, before they are made."""
    if name in _FORMATS and isinstance(value, str) and _WIDE_FORMAT.search(value):
        raise TemplateLimit(f"the template formats with a width in {value[:40]!r}")
    if name == "replace" and len(arguments) >= 2 and isinstance(value, str):
        old, new = str(arguments[0]), str(arguments[1])
        _refuse(len(value) + (value.count(old) if old else len(value) + 1) * len(new))
    if name in _MULTIPLYING:
        _refuse(_size(value) * max(map(_reach, arguments), default=8))
    if name == "join" and isinstance(value, list | tuple):
        between = _size(arguments[0]) if arguments else 0
        _refuse(sum(map(_size, value)) + between * len(value))


def _reach(argument: Any) -> int:
    """How often, or by how many characters, an argument may repeat a character of a text."""
    if isinstance(argument, int):
        return abs(argument)
    if isinstance(argument, dict):
        return max(map(_size, argument.values()), default=0)
    return _size(argument)


def _operate(sign: str, left: Any, right: Any) -> None:
    """Refuses an operation whose result is too large, before it is made."""
    whole = isinstance(left, int) and isinstance(right, int)
    if sign == "**" and (not whole or left.bit_length() * abs(right) > 3 * DIGITS):
        raise TemplateLimit("the template raises a number to a power too high")
    if sign == "*" and whole:
        _refuse(0 if left.bit_length() + right.bit_length() <= 3.4 * DIGITS else CHARS + 1)
    elif sign == "*":
        sides = (left, right)
        times = [side for side in sides if isinstance(side, int)]
        _refuse(
            max([_size(side) for side in sides if not isinstance(side, int)]) * max([1, *times])
        )
    elif sign == "%" and isinstance(left, str):
        if _WIDE_FORMAT.search(left):
            raise TemplateLimit(f"the template formats with a width in {left[:40]!r}")
        _weighed(right)
        _check_text(right)
    _METER.take(1 + (_size(left) + _size(right)) / STEP_CHARS)


def _rounds(items: Any) -> Any:
    """What a loop goes over, paid round by round; a sequence at once, and given as it is."""
    if isinstance(items, str | list | tuple | dict | range):
        _METER.take(len(items))
        return items
    return items if isinstance(items, jinja2.Undefined) else _counted(items)


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _METER.take(1)
        yield item


def _joined(parts: list[Any]) -> str:
    """`a ~ b`, as Jinja joins."""
    texts = [part if isinstance(part, str) else str(_finalized(part)) for part in parts]
    _refuse(sum(map(len, texts)))
    return str(_paid("".join(texts)))


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that pays for what it is given and what it makes."""

    @wraps(function)  # with the marks that tell Jinja to pass its context
    def called(*arguments: Any, **named: Any) -> Any:
        context = isinstance(arguments[0], jinja2.Environment | Context | nodes.EvalContext)
        given = arguments[1:] if context else arguments
        if name == "join" and isinstance(given[0], Iterator):
            given = (list(_counted(given[0])), *given[1:])
            arguments = (*arguments[:1], *given) if context else given
        _check_arguments([*given[1:], *named.values()])
        (_paid if name in _SHALLOW else _weighed)(given[0])
        _check_growth(name, given[0], (*given[1:], *named.values()))
        made = function(*arguments, **named)
        if isinstance(made, str):  # what is no text itself may be shown in it
            for value in (*given, *named.values()):
                _check_text(value)
        return _paid(made)

    return called


class _Counting(NodeTransformer):
    """Puts the steps of loops, joins and comparisons into a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, "_rounds")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides: list[Any] = [node, *node.ops]
        for side in sides:
            if not isinstance(side.expr, nodes.Const):
                side.expr = self._filtered(side.expr, "_weighed")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        sliced = isinstance(node.arg, nodes.Slice)
        return self._filtered(node, "_paid") if sliced else node

    @staticmethod
    def _filtered(node: Any, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that counts."""

    intercepted_binops = _OPERATORS

    def _generate(self, source: nodes.Template, *arguments: Any, **named: Any) -> str:
        return super()._generate(_Counting().visit(source), *arguments, **named)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Pays for an operation and does it."""
        _operate(operator, left, right)
        return _paid(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *arguments: Any, **named: Any) -> Any:
        """Pays for a call and makes it."""
        # The sandbox wraps a text's own format.
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        _METER.take(CALL_STEPS)
        if isinstance(function, LoopContext):  # the next level of a recursive loop
            arguments = (_rounds(arguments[0]), *arguments[1:]) if arguments else ()
        elif not (isinstance(function, Macro) or function in (dict, Namespace)):
            _check_arguments([*arguments, *named.values()])
        if isinstance(owner, str):
            name, given = function.__name__, (owner, (*arguments, *named.values()))
            for argument in (*arguments, *named.values()):
                _weighed(argument)
                if name in _FORMATS:
                    _check_text(argument)
            if name == "join" and arguments:
                given = arguments[0], (owner,)
            _check_growth(name, *given)
        return _paid(super().call(context, function, *arguments, **named))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Joins what a template, a macro or a block writes."""
        out, size = [], 0
        for part in parts:
            size += len(part)
            _refuse(size)
            _METER.take(1 + len(part) / STEP_CHARS)
            out.append(part)
        return "".join(out)


@lru_cache(maxsize=64)
def limited(template: str) -> jinja2.Template:
    """A chat template as transformers compiles it, under the limits.

    Raises:
        jinja2.TemplateSyntaxError: if it is none.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # What templates may call is transformers' to say; only the environment around it is ours.
    # Theirs is not compiled: a compiler computes constants, however large.
    theirs = _compile_jinja_template("").environment
    extensions = [type(extension) for extension in theirs.extensions.values()]
    ours = LimitedEnvironment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=extensions,
        finalize=_finalized,
    )
    ours.globals.update(theirs.globals)
    ours.globals.pop("lipsum")  # as much filler text as it is asked for, in one call
    ours.globals["strftime_now"] = _strftime_now
    for table, given in ((ours.filters, theirs.filters), (ours.tests, theirs.tests)):
        table.update({name: _limited(name, function) for name, function in given.items()})
    ours.filters.pop("random")
    ours.filters.update(_rounds=_rounds, _joined=_joined, _paid=_paid, _weighed=_weighed)
    return ours.from_string(template)


def render_limited(template: str, **given: Any) -> str:
    """Renders a template with its variables.

    Raises:
        TemplateLimit: if it takes too many steps, or makes too large a text.
        jinja2.TemplateError: as the template says.
    """
    compiled = limited(template)
    before, _METER.left = _METER.left, STEPS
    try:
        return compiled.render(**given)
    except RecursionError as error:
        raise TemplateLimit("the template, or the row, nests too deeply") from error
    except (MemoryError, ArithmeticError) as error:
        raise TemplateLimit(f"the template computes what can't be: {error!r}") from error
    finally:
        _METER.left = before


def apply_chat_template(
    tokenizer: Any,
    conversation: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    chat_template: str,
    add_generation_prompt: bool,
) -> str:
    """The text that `tokenizer.apply_chat_template` would give, made under the limits.

    Raises:
        ValueError: if the conversation is empty, or a tool is no JSON object.
        TemplateLimit: as `render_limited`.
    """
    if not conversation:
        raise ValueError("a conversation without a message")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise ValueError("tools are no list of JSON objects")
    return render_limited(
        chat_template,
        messages=conversation,
        tools=tools,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )

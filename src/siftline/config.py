"""Plain mappings into frozen dataclasses, with errors that say where and what instead.

Pydantic checks them; it is loaded when something is checked. The dataclasses themselves know
nothing of it: `accepted` gives the type that it checks for one of their hints. It takes a value for
what it is (3 is no text "3" read as a number, and true is no 1), except for what YAML itself blurs:
1e-4 is a string to YAML 1.1, off is false, a name may look like a number, and a key without a value
is a mapping without keys.
"""

import difflib
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from inspect import cleandoc, getdoc
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
"""What can be a folder and an asset."""
_WORDS = {"on", "off"}
_NUMBER = r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$"
_EXPECTED = {
    "int": "int",
    "float": "float",
    "bool": "bool",
    "string": "str",
    "dict": "a mapping",
    "tuple": "a list",
    "list": "a list",
}
"""How an error calls what was expected, by the first word of pydantic's error type."""


def nearest(name: str, known: Sequence[str]) -> str:
    """Phrase that names the closest known name, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def build(cls: type[T], data: Any, where: str) -> T:
    """Builds a frozen dataclass from a mapping.

    Args:
        cls: The dataclass.
        data: What the YAML held.
        where: Dotted path of `data`, for errors.

    Raises:
        ValueError: on an unknown key (naming the nearest one), a missing one, a wrong type, or
            whatever the dataclass's own validation says; always with the path.
    """
    if data is None or data == {}:  # all defaults: nothing to check, and no pydantic to load
        missing = [f.name for f in fields(cls) if f.init and required(f)]  # type: ignore[arg-type]
        if not missing:
            try:
                return cls()
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    found: T = convert(cls, data, where)
    return found


def convert(hint: Any, value: Any, where: str) -> Any:
    """Converts one value to a field's type; see `build`."""
    from pydantic import ValidationError

    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        raise ValueError(_told(error, value, where)) from error


@cache
def _adapter(hint: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(accepted(hint))


def accepted(hint: Any) -> Any:
    """The type that pydantic checks for a hint; it gives values of the hint's own type."""
    from pydantic import BeforeValidator

    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return _as_dataclass(hint)
    if origin is Literal:
        shown = hint | bool if set(args) >= _WORDS else hint
        return Annotated[hint, BeforeValidator(_one_of(args), json_schema_input_type=shown)]
    if origin is Annotated:
        return Annotated[(accepted(args[0]), *args[1:])]
    if origin is tuple and len(set(args)) == 1:  # how many, the class says, and why
        args = (*args[:1], ...)
    members = tuple(accepted(a) for a in args)
    if origin in (Union, types.UnionType):
        return Union[members]  # noqa: UP007  of a number known here only
    return origin[members] if members else _scalars().get(hint, hint)


@cache
def _scalars() -> dict[Any, Any]:
    from pydantic import BeforeValidator, Field, StrictBool, StrictInt, WithJsonSchema

    number = WithJsonSchema({"type": ["number", "string"], "pattern": _NUMBER})
    text = WithJsonSchema({"type": ["string", "number"]})
    return {
        int: StrictInt,
        bool: StrictBool,
        float: Annotated[float, BeforeValidator(_number), number],
        str: Annotated[str, Field(coerce_numbers_to_str=True), text],
    }


def _number(value: Any) -> Any:
    """Refuses what `float` would take and nobody means: true, text that is no number, nan."""
    from pydantic_core import PydanticCustomError

    text = isinstance(value, str) and not re.fullmatch(_NUMBER, value)
    if text or isinstance(value, bool) or value != value:
        raise PydanticCustomError("float_type", "a number")
    return value


def _one_of(choices: tuple[Any, ...]) -> Callable[[Any], Any]:
    """A check that a value is one of some, and of the same type: true is no 1."""

    def check(value: Any) -> Any:
        if isinstance(value, bool) and set(choices) >= _WORDS:  # YAML 1.1 reads off as false
            return "on" if value else "off"
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ValueError(f"{value!r} is not one of {', '.join(map(repr, choices))}")
        return value

    return check


@cache
def _as_dataclass(cls: type) -> Any:
    """A mapping of a dataclass's fields, made into one."""
    from pydantic import AfterValidator, BeforeValidator

    typed = mapping_type(cls.__name__, checked_fields(cls), summary(cls))
    known = [f.name for f in fields(cls) if f.init]
    optional = not any(required(f) for f in fields(cls) if f.init)

    def keys(data: Any) -> Any:
        for key in data if isinstance(data, Mapping) else ():
            if key not in known:
                raise ValueError(f"unknown key {key!r}: {nearest(str(key), known)}")
        return {} if data is None else data

    shown = typed | None if optional else typed
    before = BeforeValidator(keys, json_schema_input_type=shown)
    return Annotated[typed, before, AfterValidator(lambda values: cls(**values))]


def mapping_type(name: str, items: Mapping[str, Any], text: str, **extra: Any) -> Any:
    """A mapping of these keys alone.

    Args:
        name: Of the type, as JSON Schema calls it.
        items: Type by key, `NotRequired` where it may be left out.
        text: Its description.
        extra: More that its JSON Schema says.
    """
    from pydantic import ConfigDict, with_config
    from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

    made: Any = TypedDict(name, dict(items))  # type: ignore[misc]
    made.__doc__ = text
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    if extra:
        config["json_schema_extra"] = extra
    return with_config(config)(made)


def checked_fields(cls: type) -> dict[str, Any]:
    """Type by field of a dataclass, as `mapping_type` takes them, with text and default."""
    from pydantic import Field
    from pydantic_core import to_jsonable_python

    hints, texts = get_type_hints(cls, include_extras=True), field_texts(cls)
    found: dict[str, Any] = {}
    for f in fields(cls):
        if not f.init:
            continue
        extra = {}
        value = f.default if f.default_factory is MISSING else f.default_factory()
        if value is not MISSING and not is_dataclass(value):
            extra = {"default": to_jsonable_python(value)}
        shown = Field(description=texts.get(f.name), json_schema_extra=extra or None)
        typed: Any = Annotated[accepted(hints[f.name]), shown]
        found[f.name] = typed if required(f) else NotRequired[typed]
    return found


def required(f: Any) -> bool:
    """Whether a dataclass's field has no default."""
    return f.default is MISSING and f.default_factory is MISSING


def summary(cls: type) -> str:
    """What a docstring says before its sections, in one line."""
    text = (getdoc(cls) or "").split("\n\nAttributes:\n")[0]
    return " ".join(text.split())


def field_texts(cls: type) -> dict[str, str]:
    """The `Attributes:` section of a Google docstring: text by name, in words of YAML."""
    _, _, section = (getdoc(cls) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", cleandoc(section.split("\n\n")[0])):
        name, _, text = entry.partition(":")
        found[name] = re.sub(r"\bNone\b", "null", " ".join(text.split()))
    return found


def _told(error: "ValidationError", data: Any, where: str) -> str:
    """The first fault in one line; of a union, what each of its members says."""
    lines = []
    for fault in error.errors(include_url=False):
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, AssertionError):  # an invariant, no fault of the input
            raise cause
        lines.append((_place(fault["loc"], data, where), _what(fault)))
    at = lines[0][0]
    return "; or ".join(dict.fromkeys(f"{path}: {what}" for path, what in lines if path == at))


def _place(steps: Sequence[int | str], data: Any, where: str) -> str:
    """The dotted path of a fault; names of missing keys and of a union's members lead nowhere."""
    for step in steps:
        if isinstance(data, Mapping) and step in data:
            where, data = f"{where}.{step}", data[step]
        elif isinstance(data, list | tuple) and isinstance(step, int) and step < len(data):
            where, data = f"{where}[{step}]", data[step]
    return where


def _what(fault: Any) -> str:
    """What pydantic found, in the words of all our errors."""
    kind, value = fault["type"], fault["input"]
    if kind == "missing":
        return f"{fault['loc'][-1]!r} is missing"
    if kind == "value_error":
        return str(fault["ctx"]["error"])
    expected = _EXPECTED.get(kind.partition("_")[0])
    if expected and kind.endswith(("_type", "_parsing")):
        return f"expected {expected}, found {value!r}"
    said = " ".join(fault["msg"].split())
    return f"{said[:1].lower()}{said[1:]}, found {value!r}"


def check_names(names: Sequence[str], where: str) -> None:
    """Refuses names that can't be folders and asset names, and names that occur twice.

    Raises:
        ValueError: naming the first such name.
    """
    for name in names:
        if not re.fullmatch(NAME, name):
            raise ValueError(f"{where}: name {name!r}: use letters, digits and _ - .")
        if names.count(name) > 1:
            raise ValueError(f"{where}: {name!r} occurs twice: give one of them another name")


def read_yaml(text: str) -> Any:
    """What `yaml.safe_load` reads, in a tenth of the time where PyYAML was built with libyaml.

    Raises:
        yaml.YAMLError: if it is none.
    """
    import yaml

    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def override(data: dict[str, Any], assignment: str) -> None:
    """Applies one `a.b.c=value` to nested mappings, in place; the value is read as YAML.

    A list of one-key mappings (a recipe's stages) is entered by key or by the entry's `name`.

    Raises:
        ValueError: if the assignment has no `=`, or a step of the path doesn't exist.
    """
    import yaml

    path, sign, text = assignment.partition("=")
    if not sign or not path:
        raise ValueError(f"--set {assignment!r}: expected key=value, e.g. budget.size=1000")
    *steps, last = path.split(".")
    here: Any = data
    for step in steps:
        here = _enter(here, step, path)
    if isinstance(here, list):
        raise ValueError(f"--set {path}: {last!r} is an entry of a list: name one of its keys")
    try:
        here[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"--set {path}: {text!r} is not YAML: {detail}") from error


def _enter(here: Any, step: str, path: str) -> Any:
    if isinstance(here, list):
        entries = _entries(here)
        if step not in entries:
            raise ValueError(f"--set {path}: no entry {step!r}: {nearest(step, list(entries))}")
        return entries[step]
    if step not in here or here[step] is None:
        here[step] = {}
    if not isinstance(here[step], dict | list):
        raise ValueError(f"--set {path}: {step!r} holds {here[step]!r}, not a mapping")
    return here[step]


def _entries(items: list[Any]) -> dict[str, dict[str, Any]]:
    """Mappings in a list by name, else by their one key; what else it holds can't be entered."""
    keyed: dict[str, dict[str, Any]] = {}
    named: dict[str, dict[str, Any]] = {}
    for item in items:
        if not isinstance(item, dict):
            continue
        body = item
        if len(item) == 1:
            ((key, body),) = item.items()
            if body is None:
                body = item[key] = {}
            if isinstance(body, dict):
                keyed.setdefault(str(key), body)
        if isinstance(body, dict) and "name" in body:
            named.setdefault(str(body["name"]), body)
    return keyed | named

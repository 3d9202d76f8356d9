"""Plain mappings into frozen dataclasses, with errors that say where and what instead.

One function, `build`, covers what recipes need: nested dataclasses, optional fields, literals,
tuples and string-keyed mappings. It knows nothing about recipes.
"""

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


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
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected a mapping, found {data!r}")
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ValueError(f"{where}: unknown key {key!r}: {nearest(str(key), list(fields))}")
    values = {key: convert(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{where}: {name!r} is missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def convert(hint: Any, value: Any, where: str) -> Any:
    """Converts one value to a field's type; see `build`."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        return _convert_literal(args, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, found {value!r}")
        return tuple(convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected a mapping, found {value!r}")
        return {str(k): convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    return _convert_scalar(hint, value, where)


def _convert_literal(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if isinstance(value, bool) and {"on", "off"} <= set(args):  # YAML 1.1 reads off as false
        return "on" if value else "off"
    if value not in args:
        raise ValueError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
    return value


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is type(None):
            continue
        try:
            return convert(option, value, where)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(errors[-1] if len(errors) == 1 else "; or ".join(errors))


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and not isinstance(value, bool):
        try:  # YAML reads 1e-4 as a string
            if isinstance(value, int | float | str):
                return float(value)
        except ValueError:
            pass
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    name = getattr(hint, "__name__", str(hint))
    raise ValueError(f"{where}: expected {name}, found {value!r}")


def check_names(names: Sequence[str], where: str) -> None:
    """Refuses names that can't be folders and asset names, and names that occur twice.

    Raises:
        ValueError: naming the first such name.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
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

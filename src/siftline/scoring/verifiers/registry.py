"""Verifiers by name."""

from collections.abc import Callable
from functools import cache

from siftline.scoring.verifiers.choice import ChoiceVerifier
from siftline.scoring.verifiers.code import plain_code
from siftline.scoring.verifiers.instructions import InstructionsVerifier
from siftline.scoring.verifiers.json_schema import plain_json_schema
from siftline.scoring.verifiers.mathematics import plain_math
from siftline.scoring.verifiers.own import OwnVerifier
from siftline.scoring.verifiers.pattern import plain_regex
from siftline.scoring.verifiers.text import ExactVerifier, VerbatimVerifier
from siftline.scoring.verifiers.verdict import Verifier

NAMED: dict[str, Callable[[], Verifier]] = {
    "math": plain_math,
    "exact": ExactVerifier,
    "verbatim": VerbatimVerifier,
    "choice": ChoiceVerifier,
    "regex": plain_regex,
    "json_schema": plain_json_schema,
    "code": plain_code,
    "instructions": InstructionsVerifier,
}
"""How each named verifier is made; those that keep a process are made once."""


def get_verifier(name: str, *, steps: bool = True) -> Verifier:
    """Returns the verifier of that name.

    Args:
        name: A key of `NAMED`, or an import path `package.module:attribute` of a verifier, or of a
            class whose instances are verifiers; such a one runs in a process of its own.
        steps: Whether `math` looks for the first false step of what it refutes, which takes longer
            than refuting it.

    Raises:
        ValueError: if the name is unknown, can't be imported, or is not callable; or if what the
            verifier needs is not on this machine, as the sandbox of `code`.
    """
    if name == "math" and not steps:
        return plain_math(steps=False)
    if name in NAMED:
        return NAMED[name]()
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(
            f"unknown verifier {name!r}: use {', '.join(NAMED)} or an import path "
            "package.module:attribute"
        )
    return _own(name)


def isolation_of(name: str) -> dict[str, str]:
    """The walls that code runs behind, as a fact of a stage; empty where the verifier runs none."""
    return {"isolation": plain_code().sandbox.isolation} if name == "code" else {}


@cache
def _own(name: str) -> Verifier:
    """One for the process, since each keeps a child process."""
    return OwnVerifier(name)

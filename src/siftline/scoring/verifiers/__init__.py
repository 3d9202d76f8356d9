"""Verifiers: does a response reach the reference answer?

A verifier is a callable of (response, answer). It never raises on what it reads. A verdict is a
match, a mismatch (`correct=False`, a proof), or open: `correct=None`, with a reason. Strict by
default: what is not marked as the final answer is none. Reasoning blocks are left out. What may
cost unbounded time runs in a child process with an alarm; what runs code, in a sandbox with named
isolation; all others are linear in the response's length, or refuse what is too long.

Verifiers by name.
"""

from collections.abc import Callable
from functools import cache

from siftline.scoring.verifiers.choice import ChoiceVerifier
from siftline.scoring.verifiers.code import CodeVerifier, plain_code
from siftline.scoring.verifiers.instructions import InstructionsVerifier
from siftline.scoring.verifiers.mathematics import (
    LONGEST_EXPRESSION,
    MathVerifier,
    plain_math,
    verify_math,
)
from siftline.scoring.verifiers.own import OwnVerifier
from siftline.scoring.verifiers.text import (
    ExactVerifier,
    JsonSchemaVerifier,
    RegexVerifier,
    VerbatimVerifier,
    plain_json_schema,
    plain_regex,
)
from siftline.scoring.verifiers.verdict import Verdict, Verifier

__all__ = [
    "LONGEST_EXPRESSION",
    "NAMED",
    "ChoiceVerifier",
    "CodeVerifier",
    "ExactVerifier",
    "InstructionsVerifier",
    "JsonSchemaVerifier",
    "MathVerifier",
    "RegexVerifier",
    "VerbatimVerifier",
    "Verdict",
    "Verifier",
    "get_verifier",
    "isolation_of",
    "verify_math",
]


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

"""Verifiers: does a response reach the reference answer?

A verifier is a callable of (response, answer). It never raises on what it reads. A verdict is a
match, a mismatch (`correct=False`, a proof), or open: `correct=None`, with a reason. Strict by
default: what is not marked as the final answer is none. Reasoning blocks are left out. What may
cost unbounded time runs in a child process with an alarm; what runs code, in a sandbox with named
isolation; all others are linear in the response's length, or refuse what is too long.
"""

from siftline.scoring.verifiers.choice import ChoiceVerifier
from siftline.scoring.verifiers.code import CodeVerifier
from siftline.scoring.verifiers.instructions import InstructionsVerifier
from siftline.scoring.verifiers.json_schema import JsonSchemaVerifier
from siftline.scoring.verifiers.mathematics import LONGEST_EXPRESSION, MathVerifier, verify_math
from siftline.scoring.verifiers.pattern import RegexVerifier
from siftline.scoring.verifiers.registry import NAMED, get_verifier, isolation_of
from siftline.scoring.verifiers.text import ExactVerifier, VerbatimVerifier
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

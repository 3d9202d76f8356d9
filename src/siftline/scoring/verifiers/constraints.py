"""Whether a text satisfies a regular expression or a JSON schema, in a process that may be killed.

Both can cost exponential time or memory, and neither can be interrupted from Python. So they are
judged where mathematical expressions are (see `answers.equivalence`): in a child process that arms
a timer whose default action ends it, whatever it is doing.
"""

import json
import re
import resource
import sys
from collections.abc import Callable
from typing import IO, Any, Literal

from siftline.scoring.answers.equivalence import Equivalence, EquivalenceError, limited, prepare
from siftline.scoring.verifiers.verdict import Verdict

MEMORY = 1 << 30  # bytes of address space of the child


class Constraint(Equivalence):
    """Holds texts to references of one kind, in one long-lived child process.

    `constraint(reference, text)` is True or False; EquivalenceError tells a reference that can't be
    used, a time-out, or a child that ended. Safe to call from several threads.

    Attributes:
        kind: `regex` or `json_schema`.
        timeout: Seconds of processor time that one call may take.
    """

    def __init__(self, kind: Literal["regex", "json_schema"], timeout: float) -> None:
        super().__init__(timeout)
        self.kind = kind
        self.command = ("-c", f"import {__name__} as c; c.main()", kind)

    def verdict(self, reference: str, extracted: str) -> Verdict:
        """The verdict on a text; a call that fails leaves it open."""
        try:
            correct = self(reference, extracted)
        except EquivalenceError as error:
            return Verdict(None, extracted, f"verifier_error: {error}")
        return Verdict(correct, extracted, "match" if correct else "wrong_answer")


def matches(pattern: str, text: str) -> bool:
    """Whether the whole text matches a regular expression, here and without a limit on time."""
    return re.fullmatch(pattern, text) is not None


def satisfies(schema: str, text: str) -> bool:
    """Whether a text is one JSON value that satisfies a schema, here and without a limit on time.

    Formats are annotations, as the standard has it. Nothing is fetched: only references inside the
    schema and to the standard's own schemas are followed.

    Args:
        schema: JSON Schema of any published draft; 2020-12 where it doesn't say.
        text: The text; no number that JSON lacks, no key twice in an object.

    Raises:
        ValueError: if the schema is none.
        Exception: what jsonschema raises for a reference it can't follow.
    """
    import referencing
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    try:
        wanted = strict_json(schema)
        if not isinstance(wanted, dict | bool):
            raise ValueError("a schema is an object, true or false")
        validator = validator_for(wanted, default=Draft202012Validator)
        validator.check_schema(wanted)
    except (ValueError, SchemaError) as error:
        raise ValueError(f"no JSON schema: {str(error).splitlines()[0]}") from error
    try:
        value = strict_json(text)
    except ValueError:
        return False
    return bool(validator(wanted, registry=referencing.Registry()).is_valid(value))


def strict_json(text: str) -> Any:
    """Reads one JSON value as the standard has it: no NaN, no key twice.

    Raises:
        ValueError: if the text is not one JSON value.
    """

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key comes twice")
        return found

    return json.loads(text, parse_constant=no_constant, object_pairs_hook=no_key_twice)


JUDGES: dict[str, Callable[[str, str], bool]] = {"regex": matches, "json_schema": satisfies}


def serve(requests: IO[str], replies: IO[str], judge: Callable[[str, str], bool]) -> None:
    """Answers one JSON line `[seconds, reference, text]` with one JSON line, until end of file."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    judge("{}" if judge is satisfies else "", "")  # imports outside the first request's time
    for line in requests:
        seconds, reference, text = json.loads(line)
        with limited(seconds):
            try:
                reply: dict[str, object] = {"equal": judge(reference, text)}
            except (Exception, MemoryError) as error:
                reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    """Serves the kind that the first argument names, on standard input and output."""
    prepare()
    serve(sys.stdin, sys.stdout, JUDGES[sys.argv[1]])

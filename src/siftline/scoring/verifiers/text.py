"""Responses compared as text.

Whether a text satisfies a regular expression or a JSON schema, in a process that may be killed.

Responses held to a regular expression.

Responses held to a JSON schema.
"""

import importlib.util
import json
import re
import resource
import sys
from collections.abc import Callable
from functools import cache
from typing import IO, Any, Literal

from siftline.kernels.text.normalization import normalized
from siftline.scoring.answers.equivalence import Equivalence, EquivalenceError, limited, prepare
from siftline.scoring.answers.find import extract_answer
from siftline.scoring.answers.reasoning import blocks, without_reasoning
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


LONGEST_TEXT = 1_000_000
"""Characters of a response beyond which it is not compared."""
_WRAPPED = re.compile(r"\s*<(answer|final_?answer|response|output)>(.*)</\1>\s*", re.I | re.DOTALL)


class ExactVerifier:
    """Compares whole responses as text: for classification and short-answer tasks.

    Reasoning blocks are left out. Unicode form, case, white space, surrounding quotes and a final
    full stop do not count.
    """

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` against `answer`."""
        if len(response) > LONGEST_TEXT:
            return Verdict(None, None, f"unreadable: {len(response)} characters are too many")
        given, wanted = _plain(final_text(response)), _plain(answer)
        if not wanted:
            return Verdict(None, given or None, "no_reference")
        if not given:
            return Verdict(None, None, "no_final_answer")
        correct = given == wanted
        return Verdict(correct, given, "match" if correct else "wrong_answer")


class VerbatimVerifier:
    """Compares whole responses letter by letter: for code, identifiers, quotations, formats.

    Reasoning blocks are left out. Case, quotes and spaces count. Only what the pool itself does not
    keep does not: Unicode's composed or decomposed form, Windows' line ends, white space around the
    text.
    """

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` against `answer`."""
        from siftline.rows.schema import (
            canonical_text,  # needs pyarrow, which the sandbox's part has not
        )

        if len(response) > LONGEST_TEXT:
            return Verdict(None, None, f"unreadable: {len(response)} characters are too many")
        given, wanted = canonical_text(without_reasoning(response)), canonical_text(answer)
        if not wanted:
            return Verdict(None, given or None, "no_reference")
        if not given:
            return Verdict(None, None, "no_final_answer")
        return Verdict(given == wanted, given, "match" if given == wanted else "wrong_answer")


def final_text(response: str) -> str:
    """A response without its reasoning, and without `<answer>` tags around all of it."""
    left = without_reasoning(response)
    wrapped = _WRAPPED.fullmatch(left)
    return wrapped[2] if wrapped and f"</{wrapped[1]}>" not in wrapped[2] else left


def _plain(text: str) -> str:
    words = " ".join(normalized("NFKC", text).casefold().split())
    return words.strip("\"'`").removesuffix(".").strip("\"'` ")


class RegexVerifier:
    """Matches final answers against a regular expression, the reference answer.

    The whole final answer has to match: the marked one (see `extract_answer`), or the response
    without white space around it where nothing is marked. The syntax is Python's `re`; flags stand
    in the expression, `(?i)yes|no`. One that is no regular expression, or that takes too long
    (catastrophic backtracking), gives `verifier_error`.
    """

    def __init__(self, timeout: float = 2.0) -> None:
        """Makes a verifier; its child process starts with the first response.

        Args:
            timeout: Seconds one match may take; a sound expression takes milliseconds.

        Raises:
            ValueError: if timeout is not positive.
        """
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, not {timeout}: give seconds, e.g. 2")
        self._constraint = Constraint("regex", timeout)

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` against the expression `answer`."""
        response = final_text(response)
        marked = extract_answer(response)
        extracted = (response if marked is None else marked).strip() or None
        if not answer:
            return Verdict(None, extracted, "no_reference")
        if extracted is None:
            return Verdict(None, None, "no_final_answer")
        return self._constraint.verdict(answer, extracted)

    def close(self) -> None:
        """Ends the child process, if one was started."""
        self._constraint.close()


@cache
def plain_regex() -> RegexVerifier:
    """One for the process, since each keeps a child process."""
    return RegexVerifier()


LONGEST_JSON = 1_000_000
"""Characters beyond which a response is not read."""


class JsonSchemaVerifier:
    """Checks that a response holds one JSON value that satisfies a schema, the reference answer.

    The value is the whole response, or the one block fenced as ```json; with two blocks, or prose
    and no block, there is no final answer. A block that is no JSON is wrong. JSON is read strictly:
    no NaN, no key twice. References to other documents are never fetched, formats (`email`) are
    annotations, and a schema that costs too much gives `verifier_error`.
    """

    def __init__(self, timeout: float = 5.0) -> None:
        """Makes a verifier; its child process starts with the first response.

        Args:
            timeout: Seconds one validation may take.

        Raises:
            ValueError: if timeout is not positive, or jsonschema is not installed.
        """
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, not {timeout}: give seconds, e.g. 5")
        if importlib.util.find_spec("jsonschema") is None:
            raise ValueError(
                "verifier 'json_schema' needs jsonschema: python -m pip install jsonschema"
            )
        self._constraint = Constraint("json_schema", timeout)

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` against the schema `answer`."""
        extracted = json_value(final_text(response))
        if not answer.strip():
            return Verdict(None, extracted, "no_reference")
        if extracted is None:
            return Verdict(None, None, "no_final_answer")
        if len(extracted) > LONGEST_JSON:
            return Verdict(None, extracted, "verifier_error: response too long")
        return self._constraint.verdict(answer, extracted)

    def close(self) -> None:
        """Ends the child process, if one was started."""
        self._constraint.close()


def json_value(response: str) -> str | None:
    """The text of a response's one JSON value, fenced or bare; None where there is not just one."""
    fenced = [block for block in blocks(response) if block.language == "json"]
    if fenced:
        whole = len(fenced) == 1 and fenced[0].closed
        return fenced[0].text.strip() if whole else None
    text = response.strip()
    if not text or len(text) > LONGEST_JSON:
        return text or None
    try:
        strict_json(text)
    except ValueError:
        return None
    except RecursionError:
        return text  # the child says so
    return text


@cache
def plain_json_schema() -> JsonSchemaVerifier:
    """One for the process, since each keeps a child process."""
    return JsonSchemaVerifier()

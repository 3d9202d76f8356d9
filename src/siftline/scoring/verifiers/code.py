"""Responses that are programs, held to tests that run in a sandbox."""

from functools import cache

from siftline.scoring.verifiers.program import program_of
from siftline.scoring.verifiers.sandbox import Limits, Sandbox
from siftline.scoring.verifiers.verdict import Verdict

LONGEST_PROGRAM = 200_000
"""Characters of code or tests beyond which nothing is run."""
_NO_PYTHON = "the response raised SyntaxError"
LONGEST_RESPONSE = 2_000_000
"""Characters of a response beyond which no program is looked for."""


class CodeVerifier:
    """Runs a response's program with tests, the reference answer, in a sandbox.

    Which blocks of the response make the program stands in `program.program_of`. The tests are
    plain Python statements that see the program's names, and pass if they run to their end:
    `assert add(1, 2) == 3`. Python's standard library is there, nothing else.

    The walls and what they keep out stand in `isolation`, the limits in `sandbox`. A program that
    raises, exits, crashes, prints too much or whose tests fail is wrong; examples of its use
    (`sandboxed.statements`) may fail. The verdict is open, `unreadable`, where a failure proves
    nothing: a library is not there, the program wants input, or its own `__eq__` decided a
    comparison of the
    tests. A program that takes too long or is killed gives `verifier_error`, for that may be the
    machine; so do tests that can't be compiled, or that check nothing when they run.

    What `match` proves: the process that ran the program also ran the tests to their end and told
    the secret that came with them, after the program's module had run. Exiting early by any way,
    printing, writing to every open file, killing the parent, waiting threads, patched built-ins
    and objects that equal everything do not give it. What it can't prove: program and tests share
    one interpreter, so code written against this very harness, that looks through frames or memory
    for the secret, speaks the protocol itself, or patches modules that the tests use
    (`math.isclose`), could pass. Read what you train on if its author may gain by that.
    """

    def __init__(self, limits: Limits | None = None, isolation: str | None = None) -> None:
        """Makes a verifier and tries its walls once.

        Args:
            limits: What one run may use.
            isolation: `bubblewrap` or `unshare`; by default the first that works.

        Raises:
            ValueError: if no isolation works on this machine: code is not run without it.
        """
        self.sandbox = Sandbox(limits, isolation)

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` by the tests `answer`."""
        if len(response) > LONGEST_RESPONSE:
            return Verdict(None, None, f"unreadable: {len(response)} characters are too many")
        program = program_of(response)
        if not answer.strip():
            return Verdict(None, program.text if program else None, "no_reference")
        if program is None:
            return Verdict(None, None, "no_final_answer")
        parts = [(part.text, part.kind) for part in program.parts]
        if max(sum(len(text) for text, _ in parts), len(answer)) > LONGEST_PROGRAM:
            return Verdict(None, program.text, "verifier_error: program or tests too long")
        outcome = self.sandbox.run(parts, answer)
        if outcome.status == "passed":
            return Verdict(True, program.text, "match")
        if outcome.status != "failed":
            return Verdict(None, program.text, f"verifier_error: {outcome.detail}")
        if outcome.open:
            return Verdict(None, program.text, f"unreadable: {outcome.open}")
        if not program.fenced and outcome.detail.startswith(_NO_PYTHON):
            return Verdict(None, None, "no_final_answer")
        return Verdict(False, program.text, "wrong_answer")


def python_block(response: str) -> str | None:
    """The text of a response's program without its examples; None without one."""
    program = program_of(response)
    return program.text if program else None


@cache
def plain_code() -> CodeVerifier:
    """One for the process, since its walls are tried when it is made."""
    return CodeVerifier()

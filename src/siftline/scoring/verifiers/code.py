"""Responses that are programs, held to tests that run in a sandbox."""

from functools import cache

from siftline.scoring.fences import blocks
from siftline.scoring.verifiers.sandbox import Limits, Sandbox
from siftline.scoring.verifiers.verdict import Verdict

LONGEST_PROGRAM = 200_000
"""Characters of code or tests beyond which nothing is run."""
_PYTHON = ("python", "py", "python3")


class CodeVerifier:
    """Runs a response's program with tests, the reference answer, in a sandbox.

    The program is the last block fenced as ```python, or the only fenced block where that names no
    language. The tests are plain Python statements that see the program's names, and pass if they
    run to their end: `assert add(1, 2) == 3`. Python's standard library is there, nothing else.

    The walls and what they keep out stand in `isolation`, the limits in `sandbox`. A program that
    raises, exits, crashes, prints too much or whose tests fail is wrong. One that takes too long or
    is killed gives `verifier_error`, for that may be the machine; so do tests that can't be
    compiled, or that check nothing when they run.

    What `match` proves: the process that ran the program also ran the tests to their end and told
    the secret that came with them, after the program's module had run. Exiting early by any way,
    printing, writing to every open file, killing the parent, waiting threads and patched built-ins
    do not give it. What it can't prove: program and tests share one interpreter, so code written
    against this very harness, that looks through frames or memory for the secret, speaks the
    protocol itself, or patches modules that the tests use (`math.isclose`), could pass. Read what
    you train on if its author may gain by that.
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
        program = python_block(response)
        if not answer.strip():
            return Verdict(None, program, "no_reference")
        if program is None:
            return Verdict(None, None, "no_final_answer")
        if max(len(program), len(answer)) > LONGEST_PROGRAM:
            return Verdict(None, program, "verifier_error: program or tests too long")
        outcome = self.sandbox.run(program, answer)
        if outcome.status == "passed":
            return Verdict(True, program, "match")
        if outcome.status == "failed":
            return Verdict(False, program, "wrong_answer")
        return Verdict(None, program, f"verifier_error: {outcome.detail}")


def python_block(response: str) -> str | None:
    """The program in a response: see `CodeVerifier`; None without one."""
    found = blocks(response)
    marked = [block for block in found if block.language in _PYTHON]
    if not marked and len(found) == 1 and not found[0].language:
        marked = found
    if not marked or not marked[-1].closed:
        return None
    return marked[-1].text if marked[-1].text.strip() else None


@cache
def plain_code() -> CodeVerifier:
    """One for the process, since its walls are tried when it is made."""
    return CodeVerifier()

"""Verdicts on mathematical answers: siftline's beside math-verify's alone.

    SIFTLINE_TEST_DATA=DIR .venv/bin/python benchmarks/bench_verdicts.py [--each 50] [--seed 0]

Two tables. Generated pairs, whose equality is known by how they were made (`verdict_pairs.py`):
the answer stands in a box. GSM8K's test answers (DIR/gsm8k/test.jsonl): each label held against the
worked answer it is from, and against the same with another number, in four forms of marks.

    right           a match of what is equal, a mismatch of what is not
    false match     a match of what is not equal
    false mismatch  a mismatch of what is equal; math-verify says no more than True or False
    open            siftline alone: it can't tell

math-verify is asked as its readme has it: `verify(parse(reference), parse(response))`, with the
reference between dollar signs.
"""

import argparse
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from verdict_pairs import pairs

from siftline.scoring.verifiers import MathVerifier

Row = tuple[str, str, str, bool]
"""Kind, response, reference, and whether they are equal."""
Says = Callable[[str, str], bool | None]
FORMS = {
    "#### x": lambda body, label: f"{body}\n#### {label}",
    "\\boxed{x}": lambda body, label: f"{body}\nThe answer is $\\boxed{{{label}}}$.",
    "the answer is x": lambda body, label: f"{body}\nThe answer is {label}.",
    "**Answer**: x": lambda body, label: f"{body}\n\n**Answer**: {label}",
}


def outcome(said: bool | None, equal: bool) -> str:
    """One of the four columns."""
    if said is None:
        return "open"
    return "right" if said == equal else "false match" if said else "false mismatch"


def generated(each: int, seed: int) -> list[Row]:
    """The generated pairs as responses and references."""
    return [(p.kind, f"\\boxed{{{p.given}}}", p.wanted, p.equal) for p in pairs(each, seed)]


def gsm8k(path: Path) -> list[Row]:
    """Every test answer in every form, against its label and against another number."""
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        body, label = (part.strip() for part in json.loads(line)["answer"].rsplit("####", 1))
        other = str(int(label.replace(",", "")) + 1) if "." not in label else f"{label}1"
        for form, write in FORMS.items():
            rows += [
                (form, write(body, label), label, True),
                (form, write(body, label), other, False),
            ]
    return rows


def math_verify_alone() -> Says:
    """math-verify with its defaults."""
    from math_verify import parse, verify

    logging.disable(logging.WARNING)

    def says(response: str, reference: str) -> bool:
        return bool(verify(parse(f"${reference}$"), parse(response)))

    return says


def ours() -> Says:
    """siftline's `math` verifier."""
    verifier = MathVerifier(steps=False)
    return lambda response, reference: verifier(response, reference).correct


def compare(rows: Iterable[Row], sides: dict[str, Says]) -> tuple[list[tuple[str, ...]], list[str]]:
    """Counts by kind and side, and the pairs that only one of the two matches."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    notes: list[str] = []
    for kind, response, reference, equal in rows:
        said = {name: says(response, reference) for name, says in sides.items()}
        for name, answer in said.items():
            for key in (kind, "all"):
                counts.setdefault((key, name), Counter())[outcome(answer, equal)] += 1
        first, second = list(said.values())[:2]
        if second and not first:
            lost = "rightly" if not equal else f"{outcome(first, equal)}"
            counts[("all", "siftline")][f"refused: {lost}"] += 1
            if equal:
                notes.append(f"refused ({lost}) [{kind}] {response} | {reference}")
        if first and not second and not equal:
            counts[("all", "siftline")]["false match that math-verify refuses"] += 1
            notes.append(f"FALSE MATCH [{kind}] {response} | {reference}")
    lines = [
        (kind, name, *(str(n[c]) for c in ("right", "false match", "false mismatch", "open")))
        for (kind, name), n in counts.items()
    ]
    total = counts[("all", "siftline")]
    for key in sorted(total):
        if key not in ("right", "false match", "false mismatch", "open"):
            notes.insert(0, f"{key}: {total[key]}")
    return lines, notes


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--each", type=int, default=50, help="pairs of every kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sides = {"siftline": ours(), "math-verify": math_verify_alone()}
    tables = {"generated pairs": generated(arguments.each, arguments.seed)}
    data = os.environ.get("SIFTLINE_TEST_DATA")
    if data:
        tables["GSM8K test answers"] = gsm8k(Path(data) / "gsm8k" / "test.jsonl")
    for title, rows in tables.items():
        started = time.monotonic()
        lines, notes = compare(rows, sides)
        print(f"\n{title}: {len(rows)} ({time.monotonic() - started:.0f} s)")
        head = ("kind", "", "right", "false match", "false mismatch", "open")
        for line in [head, *lines]:
            print(f"{line[0]:26}{line[1]:13}" + "".join(f"{cell:>16}" for cell in line[2:]))
        print("\n".join(notes))


if __name__ == "__main__":
    main()

"""What the confidence gate and Auto-Correct do to word problems of which a fifth are swapped.

    .venv/bin/python benchmarks/bench_confidence.py --root DIR [--rows 300] [--steps 3000]
        [--base MODEL_DIR]

The world is the demo's, without its defects: one response per question, and a fifth of the
responses exchanged among themselves. The model is trained here from the demo's corpus, in which
some texts ask which of two answers is better, on other problems: without them so small a model
takes A and B for noise. Or it is the one at --base, such as the demo's. References are withheld
from the pool, but for the last line, where candidates are checked against them.

Printed are the AUROC of confidence and of its parts (95 %, DeLong), what the gate removes at
CLEAR's median, at the true share of swapped rows and where no sample supports a row, and what
Auto-Correct makes of the pool: swapped rows that end up right, and right rows that end up wrong. A
root that is used again trains nothing anew.
"""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from siftline.assets.shared import build, train_base
from siftline.demo.arithmetic import Rates, generate
from siftline.kernels.draws import hash64, uniforms
from siftline.ledger import KEPT, StageOutput
from siftline.recipe.parse import Recipe, parse
from siftline.scoring.pairwise import BETTER
from siftline.scoring.verifiers import verify_math
from siftline.stages.confidence.decide import auroc
from siftline.stages.run import run_stage
from siftline.workspace import Workspace

SWAPPED = 0.2
COLUMNS = {name: name for name in ("question", "response", "answer")}
CLEAN = dict.fromkeys(Rates.__dataclass_fields__, 0.0)


@dataclass(frozen=True)
class World:
    """Rows by question, and the questions whose response belongs to another."""

    rows: list[dict[str, Any]]
    swapped: frozenset[str]

    def right(self, question: str, response: str) -> bool:
        """Whether a response comes to the question's answer."""
        return bool(verify_math(response, self.answers[question]).correct)

    @property
    def answers(self) -> dict[str, str]:
        """The true answers."""
        return {row["question"]: row["answer"] for row in self.rows}


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make(folder: Path, rows: int, seed: int, corpus: int) -> World:
    """Writes pools, the dev set and the corpus; the same arguments give the same files."""
    sizes = {"test": 1, "dev": 100, "target": 1, "corpus": corpus}
    generate(folder / "world", folder / "truth", seed=seed, prompts=rows, **sizes, **CLEAN)
    first: dict[str, dict[str, Any]] = {}
    for row in sorted(read(folder / "world" / "pool.jsonl"), key=lambda r: hash64(seed, r)):
        first.setdefault(row["question"], row)
    questions = sorted(first)
    u = uniforms(seed, "swap", questions)
    picked = [questions[i] for i in np.argsort(u)[: round(SWAPPED * len(questions))]]
    spoiled = {
        q: first[other]["response"]
        for q, other in zip(picked, [*picked[1:], picked[0]], strict=True)
    }
    made = [{**first[q], "response": spoiled.get(q, first[q]["response"])} for q in questions]
    world = World(made, frozenset())
    # Some questions have the same answer: what another gives is then no fault.
    wrong = [q for q in picked if not world.right(q, spoiled[q])]
    write(folder / "checked.jsonl", made)
    write(folder / "withheld.jsonl", ({**row, "answer": None} for row in made))
    generate(folder / "more", folder / "truth_more", seed=seed + 1, prompts=rows, **sizes, **CLEAN)
    exercises = preferences(read(folder / "more" / "pool.jsonl"), set(first), seed)
    write(folder / "corpus.jsonl", [*read(folder / "world" / "corpus.jsonl"), *exercises])
    return World(made, frozenset(wrong))


def preferences(
    rows: Sequence[dict[str, Any]], held_out: set[str], seed: int
) -> list[dict[str, str]]:
    """Texts that ask for the better of a right answer and another question's, either first."""
    rows = [row for row in rows if row["question"] not in held_out]
    texts = []
    for i, row in enumerate(rows):
        other = rows[hash64(seed, "other", i) % len(rows)]
        pair = [row["response"], other["response"]]
        turned = hash64(seed, "turned", i) % 2
        first, second = pair[::-1] if turned else pair
        asked = BETTER.format(prompt=row["question"], first=first, second=second)
        texts.append({"text": f"Question: {asked}\nAnswer: {'B' if turned else 'A'}"})
    return texts


def model(folder: Path, steps: int, base: Path | None) -> dict[str, Any]:
    """The model that answers, judges and is trained: one at hand, or made here."""
    lengths = {"max_length": 512, "batch_tokens": 65536}
    if base is not None:
        window = json.loads((base / "config.json").read_text())["max_position_embeddings"]
        return {**lengths, "path": str(base.absolute()), "max_length": min(512, window)}
    sizes = {
        "vocab": 128, "hidden": 128, "layers": 2, "context": 512, "steps": steps,
        "batch_tokens": 2048, "lr": 3e-3,
    }  # fmt: skip
    return {**lengths, "pretrain": sizes, "corpus": str(folder / "corpus.jsonl")}


def recipe(
    folder: Path, pool: str, base: dict[str, Any], gate: dict[str, Any], fix: dict[str, Any]
) -> Recipe:
    """The chain: the gate, then Auto-Correct."""

    def spec(name: str, path: Path, buckets: int) -> dict[str, Any]:
        source = {"path": str(path), "layout": "question_answer", "columns": COLUMNS}
        return {"name": name, "buckets": buckets, "inputs": [source]}

    return parse(
        {
            "name": "bench_confidence",
            "pool": spec(pool, folder / f"{pool}.jsonl", 4),
            "sets": {"dev": [spec("bench_dev", folder / "world" / "dev.jsonl", 1)]},
            "models": {"base": base},
            "stages": [{"confidence": gate}, {"correct": fix}],
            "budget": {"size": 1, "unit": "rows"},
        }
    )  # fmt: skip


def quiet(line: str) -> None: ...


def run(workspace: Workspace, chosen: Recipe) -> tuple[StageOutput, StageOutput]:
    """Runs both stages."""
    for spec in (chosen.pool, *chosen.sets.dev):
        build(workspace, chosen, spec.name, quiet)
    if chosen.models["base"].pretrain:
        train_base(workspace, chosen, "base", quiet)
    gate, _ = run_stage(workspace, chosen, "confidence", quiet)
    fix, _ = run_stage(workspace, chosen, "correct", quiet)
    return gate, fix


def questions_of(workspace: Workspace, chosen: Recipe) -> dict[str, str]:
    """Question by prompt id."""
    from siftline.ingest.pool import Pool

    rows = Pool(workspace.pool(chosen.pool.name)).all_rows(["prompt_id", "messages"]).to_pylist()
    return {row["prompt_id"]: row["messages"][0]["content"] for row in rows}


def filter_lines(gate: StageOutput, asked: dict[str, str], world: World) -> list[str]:
    """AUROC of confidence and parts, precision and recall of what was removed."""
    table = gate.table("confidence")
    assert table is not None
    wrong = np.array([asked[i[:20]] in world.swapped for i in table["id"].to_list()])
    lines = []
    for name in table.columns[1:]:
        known = table[name].is_not_null().to_numpy()
        found = auroc(table[name].to_numpy()[known], ~wrong[known])
        lines.append(f"AUROC {name:<12} {found.value:.3f} ({found.low:.3f} to {found.high:.3f})")
    values = table["confidence"].to_numpy()
    cuts = {f"lowest {cut:.0%}": np.sort(values)[int(cut * len(values))] for cut in (0.5, SWAPPED)}
    cuts["without support"] = np.nextafter(0.0, 1.0)  # a small model supports few rows at all
    for name, at in cuts.items():
        gone = values < at
        caught = int((gone & wrong).sum())
        lines.append(
            f"{name}: removes {gone.sum()} rows, {caught} of {wrong.sum()} swapped; "
            f"precision {caught / max(1, gone.sum()):.2f}, recall {caught / wrong.sum():.2f}, "
            f"at random {gone.mean():.2f}"
        )
    return lines


def correct_line(name: str, fix: StageOutput, asked: dict[str, str], world: World) -> str:
    """What Auto-Correct made of swapped and of right rows."""
    table = fix.table("corrections")
    assert table is not None
    decided = fix.all_decisions()
    kept = set(decided.filter(pl.col("outcome") == KEPT)["id"].to_list())
    counts = dict.fromkeys(("restored", "still wrong", "spoiled"), 0)
    candidates = 0
    for line in table.to_dicts():
        question = asked[line["prompt_id"]]
        good = line["candidate"] is not None and world.right(question, line["candidate"])
        candidates += good
        taken = line["outcome"] in ("corrected", "rescued")
        if question in world.swapped:
            counts["restored"] += taken and good
            counts["still wrong"] += (taken and not good) or line["id"] in kept
        else:
            counts["spoiled"] += taken and not good
    judge = fix.facts["judge"]
    swapped = len(world.swapped)
    return (
        f"{name:<28} candidates right {candidates}/{table.height}, restored "
        f"{counts['restored']}/{swapped}, still wrong {counts['still wrong']}, spoiled "
        f"{counts['spoiled']}; judge undecided {judge['undecided']}/{judge['asked']}"
    )


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--steps", type=int, default=3000, help="of the base model")
    parser.add_argument("--base", type=Path, help="take this model")
    parser.add_argument("--corpus", type=int, default=12000)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of these")
    parser.add_argument("--epochs", type=float, default=3.0, help="of the models that propose")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.monotonic()
    folder = given.root / f"inputs-{given.rows}-{given.corpus}-{given.seed}"
    world = make(folder, given.rows, given.seed, given.corpus)
    workspace = Workspace(given.root / "root")
    gate = {"samples": 6, "max_new_tokens": 128, "threshold": "quantile", "cut": SWAPPED}
    made = model(folder, given.steps, given.base)
    training = {
        "learning_rate": given.rate, "batch_rows": 16, "max_length": made["max_length"],
        "epochs": given.epochs,
    }  # fmt: skip
    fix = {"max_new_tokens": 128, "training": training, "confidence": 0.8}
    print(f"{len(world.rows)} rows, {len(world.swapped)} swapped, seed {given.seed}")
    for name, pool, more in (
        ("folds 2, eta 0.8", "withheld", {}),
        ("folds 2, eta 0.5", "withheld", {"confidence": 0.5}),
        ("folds 1 (CLEAR), eta 0.8", "withheld", {"folds": 1}),
        ("folds 2, eta 0.5, checked", "checked", {"confidence": 0.5}),
    ):
        chosen = recipe(folder, pool, made, gate, fix | more)
        found, mended = run(workspace, chosen)
        asked = questions_of(workspace, chosen)
        if name.startswith("folds 2, eta 0.8"):
            print(f"weights {found.facts['weights']}, AUROC of reflection on dev "
                  f"{found.facts.get('auroc')}")  # fmt: skip
            print("\n".join(filter_lines(found, asked, world)))
        print(correct_line(name, mended, asked, world))
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

"""Verbs of the command line, one a module, as a table: a module is imported when its verb is asked.

So `siftline --help` costs what click costs, and a verb pays for what it does alone.
"""

from typing import NamedTuple


class Verb(NamedTuple):
    """Where a verb is, and what the list of verbs says of it.

    Attributes:
        module: Below `siftline.commands`.
        name: Of the command in it.
        help: The first sentence of its help.
    """

    module: str
    name: str
    help: str


VERBS: dict[str, Verb] = {
    "audit": Verb(
        "audit",
        "audit",
        "Draw removed rows of RECIPE's STAGE to label, and give the false-drop rate.",
    ),
    "cache": Verb(
        "cache", "cache", "List or clean the store, where every answer of a model is kept."
    ),
    "decontaminate": Verb(
        "judge",
        "decontaminate",
        "Remove rows of FILE... that overlap rows of other files, such as a test set.",
    ),
    "dedup": Verb(
        "dedup", "dedup", "Remove near duplicates from files of any format a recipe's pool reads."
    ),
    "demo": Verb(
        "demo",
        "demo",
        "Run the whole chain on generated data with planted defects; no GPU, no download.",
    ),
    "eval": Verb("eval", "evaluate", "Ask MODEL the questions in FILE... and grade its answers."),
    "explain": Verb(
        "explain",
        "explain",
        "Tell the whole story of a row: ID is its id (8 digits or more), or FILE:LINE.",
    ),
    "export": Verb(
        "export",
        "export",
        "Write the version in FOLDER for another trainer, with the configuration it wants.",
    ),
    "filter": Verb(
        "judge",
        "filter_rows",
        "Remove rows of FILE... whose text repeats itself, is of another language, or breaks a "
        "rule.",
    ),
    "plan": Verb("plan", "plan", "Say what RECIPE's rejection sampling will cost, from its pilot."),
    "report": Verb(
        "report",
        "report",
        "Show the funnel, accuracy and report page of RECIPE's newest version.",
    ),
    "rule": Verb(
        "rule",
        "rule",
        "Fit a rule for `siftline select linear_rule` on runs of your own (InstructMining).",
    ),
    "run": Verb("run", "run", "Run RECIPE, a name or a YAML file, from raw rows to the report."),
    "score": Verb(
        "score", "score", "Score the responses in FILE... under a model, without a recipe."
    ),
    "select": Verb(
        "select", "select", "Select a subset of the rows in FILE... by METHOD, without a recipe."
    ),
    "status": Verb(
        "status",
        "status",
        "Show what is under ROOT: pools, stages, score coverage, published versions.",
    ),
    "train": Verb("train", "train", "Fine-tune a model on CURATED and write a model directory."),
    "ui": Verb("ui", "ui", "Serve the Dagster UI on ROOT."),
    "verify": Verb(
        "judge",
        "verify",
        "Remove rows of FILE... whose response contradicts, or never reaches, their answer.",
    ),
}

"""One input of a pool, as a recipe states it.

Only the standard library is imported here, because recipes are parsed in processes that read no
data. Everything a mapping can get wrong without looking at a file is refused here.
"""

import difflib
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

Format = Literal["auto", "jsonl", "json", "csv", "parquet", "arrow", "datasets"]
Layout = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "text",
    "pairs",
]

Holds = Literal["responses", "prompts", "either"]
"""What the records are: answered, prompts alone, or (evaluation sets) whichever comes."""

LAYOUT_FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "input", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "response", "solution"),
    "pairs": ("prompt", "chosen", "rejected"),
    "text": ("text",),
}
"""The fields that belong to a layout; `answer` is common, yet may be a question's response."""

COMMON_FIELDS = (
    "answer",
    "source",
    "conversation_id",
    "system",
    "tools",
    "history",
    "label",
    "reasoning",
)
FIELDS = (*dict.fromkeys(f for fields in LAYOUT_FIELDS.values() for f in fields), *COMMON_FIELDS)
NAMES: dict[str, tuple[str, ...]] = {
    "input": ("input", "context"),
    "output": ("output", "response"),
    "completion": ("completion", "response"),
    "question": ("question", "query", "problem"),
    "chosen": ("chosen", "chosen_messages"),
    "rejected": ("rejected", "rejected_messages", "rejected_response"),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
    "label": ("label", "kto_tag"),
    "reasoning": ("reasoning_content", "thinking"),
}
"""Columns that mean a field, first come first taken, where it is not mapped; else its own name.

LLaMA-Factory, TRL, axolotl, OpenAI and ms-swift write them so; `context` is Dolly's."""
ANSWERS = (
    "answer",
    "ground_truth",
    "reward_model",
    "final_answer",
    "reference_answer",
    "solution",
    "constraints",
)
"""Columns that hold the reference answer of a prompt without a response, where none is mapped."""
DATASETS = "datasets:"

_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Source:
    """One input of a pool and how its columns become rows.

    Attributes:
        path: A file, folder, glob, fsspec URL (`file://`, `memory://`, `s3://` ...) or
            `datasets:NAME`, `datasets:NAME:CONFIG`. A folder gives every file of a known ending
            below it, dot files and dot folders left out; a glob gives exactly what it matches.
        format: How the files are written; `auto` goes by their ending. `.gz` and `.zst` endings of
            jsonl, json and csv are decompressed while reading.
        layout: How a record holds a conversation; `auto` goes by the columns and stops when none or
            several layouts fit.
        columns: Field -> input column, for columns that have another name than the field. Fields:
            those that `siftline score --help` lists under --field. A mapped column must exist.
        source: Constant source name. Without it the mapped `source` column, and where that is
            unmapped or empty the file's stem.
        instruction: Text put before every prompt with a newline, for tasks whose files lack it.
        answer_pattern: Regular expression with one group, searched in the response; the last match
            is the reference answer, and `answer_from` says `response`.
        split: Which split, for `datasets` and for folders that it saved.
        set_aside: Columns that are not to be read, whatever their name says.

    Raises:
        ValueError: for an unknown field, format or layout, or settings that contradict each other.
    """

    path: str
    format: Format = "auto"
    layout: Layout = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    source: str | None = None
    instruction: str | None = None
    answer_pattern: str | None = None
    split: str = "train"
    set_aside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("a source needs a path: a file, folder, glob, URL or datasets:NAME")
        for name, value, known in (
            ("format", self.format, get_args(Format)),
            ("layout", self.layout, get_args(Layout)),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; one of {', '.join(known)}")
        if self.path.startswith(DATASETS) and self.format not in ("auto", "datasets"):
            raise ValueError(f"{self.path!r} has format datasets, not {self.format!r}")
        self._check_columns()
        self._check_pattern()

    def _check_columns(self) -> None:
        for name in self.columns:
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(FIELDS)}"
                raise ValueError(f"columns maps the unknown field {name!r}; {hint}")
        both = set(self.set_aside) & set(self.columns.values())
        if both:
            raise ValueError(f"column {min(both)!r} is mapped and set aside: leave one out")
        foreign = self.mapped_layout_fields() - set(LAYOUT_FIELDS.get(self.layout, FIELDS))
        if foreign:
            raise ValueError(
                f"layout {self.layout!r} does not read the mapped field {sorted(foreign)[0]!r}; "
                f"it reads {', '.join(LAYOUT_FIELDS[self.layout])}, {', '.join(COMMON_FIELDS)}"
            )

    def _check_pattern(self) -> None:
        if self.answer_pattern is None:
            return
        try:
            groups = re.compile(self.answer_pattern).groups
        except re.error as error:
            raise ValueError(f"answer_pattern {self.answer_pattern!r}: {error}") from error
        if groups != 1:
            raise ValueError(f"answer_pattern {self.answer_pattern!r} has {groups} groups, needs 1")

    def mapped_layout_fields(self) -> set[str]:
        """The mapped fields that tell layouts apart."""
        return set(self.columns) - set(COMMON_FIELDS)

    @property
    def is_dataset(self) -> bool:
        """Whether the rows come from the `datasets` library instead of files."""
        return self.format == "datasets" or self.path.startswith(DATASETS)

    def dataset_name(self) -> tuple[str, str | None]:
        """Splits `datasets:NAME:CONFIG` into the name and the configuration, if any."""
        name, _, config = self.path.removeprefix(DATASETS).partition(":")
        return name, config or None


@dataclass(frozen=True)
class FileName:
    """What a file's name tells: its stem, its format if known, its compression if any."""

    stem: str
    format: str | None
    compression: str | None


def read_name(path: str) -> FileName:
    """Splits a path's last part: `a/b.jsonl.gz` -> stem b, format jsonl, compression gzip."""
    name = path.rstrip("/").rpartition("/")[2]
    base, dot, ending = name.rpartition(".")
    compression = _COMPRESSIONS.get(dot + ending.lower())
    if compression:
        name = base
        base, dot, ending = name.rpartition(".")
    return FileName(base or name, _ENDINGS.get(dot + ending.lower()), compression)


def file_format(source: Source, path: str) -> str:
    """The format a file is read as: the declared one, else by its ending.

    Raises:
        ValueError: for an unknown ending, or a compressed file of a binary format.
    """
    name = read_name(path)
    form = name.format if source.format == "auto" else source.format
    if form is None:
        known = ", ".join(_ENDINGS)
        raise ValueError(f"{path}: unknown ending; state its format, or use one of {known}")
    if name.compression and form in ("parquet", "arrow"):
        raise ValueError(f"{path}: a compressed {form} file can't be read; decompress it first")
    return form

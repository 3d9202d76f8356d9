"""The dataset card: the README.md of a curated version.

Its YAML header is what makes a folder with kept and removed rows load correctly: without
`configs:` `datasets` merges sibling folders into the training split. The text below it says how the
rows were chosen and how each trainer reads them. The card is part of the version's hash, so it
holds only what the recipe and the data determine: no date, no path, no version of its own.
"""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import yaml

SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**10, "1B<n<10B"),
    (10**11, "10B<n<100B"),
    (10**12, "100B<n<1T"),
)
"""The Hub's size categories, by exclusive upper bound."""

KNOWN_COLUMNS = {
    "id": "content hash of the row; the same in every version and on every machine",
    "messages": "the conversation; the last message is the assistant's response",
    "tools": "tool definitions the conversation may call, as JSON text",
}


@dataclass(frozen=True)
class StageCount:
    """One line of the funnel: what a stage did to the rows that reached it.

    Attributes:
        stage: Name of the stage instance in the recipe.
        kind: gate, shortlist, adds, budget, scores.
        rows_in: Rows that came in.
        added: Rows the stage made.
        kept: Rows that went on, added ones included.
        removed: Rows it dropped.
        failed: Rows it could not decide about; they are tried again next run.
        reasons: (reason, rows) of the removed and failed rows.
        vacuous: True when there was nothing to choose.
    """

    stage: str
    kind: str
    rows_in: int
    added: int
    kept: int
    removed: int
    failed: int
    reasons: tuple[tuple[str, int], ...] = ()
    vacuous: bool = False

    def __post_init__(self) -> None:
        out = self.kept + self.removed + self.failed
        if self.rows_in + self.added != out:
            raise ValueError(
                f"stage {self.stage}: in {self.rows_in} + added {self.added} is not"
                f" kept {self.kept} + removed {self.removed} + failed {self.failed}:"
                " rows were lost, run it again"
            )

    def top_reasons(self, limit: int = 3) -> list[tuple[str, int]]:
        """The most frequent reasons, ties by name."""
        return sorted(self.reasons, key=lambda pair: (-pair[1], pair[0]))[:limit]


@dataclass(frozen=True)
class CardInfo:
    """What the recipe says about the dataset it makes.

    Attributes:
        name: The recipe's name.
        license: Licence identifier of the Hub, from the recipe.
        description: One paragraph on what the data is for.
        language: Language codes.
        tags: Tags of the Hub.
        how: Sentences on how the rows were chosen: models, methods, budget.
        columns: (name, meaning) of the `sift_` columns.
        funnel: The stages in order.
        configs: (name, what it holds) of configs beside the rows and the removed ones.
    """

    name: str
    license: str
    description: str = ""
    language: tuple[str, ...] = ("en",)
    tags: tuple[str, ...] = ("sft", "curated")
    how: tuple[str, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    funnel: tuple[StageCount, ...] = ()
    configs: tuple[tuple[str, str], ...] = ()


def escape(text: str) -> str:
    """Makes `text` plain in Markdown and HTML, on one line, also inside a table cell."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(line, quote=False))


def size_category(rows: int) -> str:
    """The Hub's size category of a dataset of `rows` rows."""
    return next((name for bound, name in SIZES if rows < bound), "n>1T")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _header(info: CardInfo, rows: int, further: Iterable[str]) -> str:
    configs = [
        {
            "config_name": "default",
            "default": True,
            "data_files": [{"split": "train", "path": "data/train-*"}],
        }
    ]
    for name in further:
        files = [{"split": "train", "path": f"{name}/{name}-*"}]
        configs.append({"config_name": name, "data_files": files})
    fields = {
        "license": info.license,
        "pretty_name": info.name,
        "language": list(info.language),
        "task_categories": ["text-generation"],
        "size_categories": [size_category(rows)],
        "tags": list(info.tags),
        "configs": configs,
    }
    body = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{body}---"


def _funnel(stages: Sequence[StageCount]) -> str:
    header = ("stage", "kind", "in", "added", "kept", "removed", "failed", "top reasons")
    return _table(
        header,
        (
            (
                escape(s.stage),
                escape(s.kind),
                *(f"{n:,}" for n in (s.rows_in, s.added, s.kept, s.removed, s.failed)),
                ", ".join(f"{escape(reason)} {n:,}" for reason, n in s.top_reasons())
                or ("nothing to choose" if s.vacuous else ""),
            )
            for s in stages
        ),
    )


def _columns(info: CardInfo, schema: pa.Schema) -> str:
    meanings = KNOWN_COLUMNS | dict(info.columns)
    rows = [(escape(f.name), escape(str(f.type)), escape(meanings.get(f.name, ""))) for f in schema]
    return _table(("column", "type", "meaning"), rows)


@dataclass(frozen=True)
class _Holds:
    """What trainers must know of a version.

    Attributes:
        keys: Keys of its messages.
        tools: Whether rows come with tools.
        configs: Its further configs.
    """

    keys: tuple[str, ...]
    tools: bool
    configs: tuple[str, ...]

    @property
    def plain(self) -> bool:
        """Whether messages are role and content, which every trainer reads as they are."""
        return self.keys == ("role", "content") and not self.tools


def _holds(schema: pa.Schema, configs: Sequence[str]) -> _Holds:
    turn = schema.field("messages").type.value_type if "messages" in schema.names else pa.struct([])
    return _Holds(tuple(f.name for f in turn), "tools" in schema.names, tuple(configs))


def _loading(name: str, holds: _Holds) -> str:
    others = "".join(
        f'\n{name} = load_dataset(FOLDER, "{name}", split="train")' for name in holds.configs
    )
    parts = [
        f"""`FOLDER` is the folder that holds this file. Reached through the link `latest`,
resolve the link first: a new version may be published between two reads.

```python
from datasets import load_dataset
train = load_dataset(FOLDER, split="train"){others}

import polars as pl
frame = pl.scan_parquet(FOLDER + "/data/*.parquet")
```""",
        *_sft_lines(name, holds),
        *_other_lines(holds),
        _stacking(holds),
    ]
    return "\n\n".join(parts)


def _sft_lines(name: str, holds: _Holds) -> list[str]:
    last = (
        "TRL, loss on the last response of each row; works with any chat template that shows all "
        "of the row:"
    )
    code = """```python
import siftline
from trl import SFTTrainer
SFTTrainer(MODEL, train_dataset=siftline.load(FOLDER, form="prompt_completion"))
```"""
    axolotl = "`datasets: [{path: FOLDER, type: chat_template, field_messages: messages}]`"
    if not holds.plain:
        keys = ", ".join(f"`{key}`" for key in holds.keys if key not in ("role", "content"))
        return [
            "Some messages have " + (keys or "tools") + ", and Parquet gives the others nulls for "
            "them, which many chat templates take for values. `siftline.load(FOLDER)` gives "
            "messages without nulls, calls and tools as objects (`datasets` 4.7 or newer). "
            f"{last}",
            code,
            f"axolotl drops the nulls and parses the calls by itself: {axolotl}",
            "LLaMA-Factory, ms-swift, verl, OpenRLHF and open-instruct have forms of their own: "
            "`siftline export FOLDER --to llamafactory --out DIR` (or `swift`, `verl`, `openrlhf`, "
            "`open-instruct`) writes the data and the configuration.",
        ]
    # The recipe's name becomes a key of a JSON object and nothing else may come out of it.
    key = json.dumps(re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "curated")
    tags = {f"{role}_tag": role for role in ("role", "content", "user", "assistant", "system")}
    return [
        last,
        code,
        "Loss on all responses of a row, if the model's chat template has generation marks "
        "(`{% generation %}`): `SFTTrainer(MODEL, train_dataset=train, "
        "args=SFTConfig(assistant_only_loss=True))`",
        f"axolotl: {axolotl}",
        "ms-swift: `swift sft --dataset FOLDER/data`",
        "LLaMA-Factory, where user and assistant take turns: in your own `dataset_info.json`, with "
        "FOLDER as an absolute path; `mask_history: true` takes the loss on the last response",
        f"""```json
{{{key}: {{"file_name": "FOLDER/data", "formatting": "sharegpt",
  "columns": {{"messages": "messages"}},
  "tags": {json.dumps(tags)}}}}}
```""",
        "For these and verl, OpenRLHF, open-instruct: `siftline export FOLDER --to NAME --out DIR` "
        "writes data, masks and configuration.",
    ]


def _other_lines(holds: _Holds) -> list[str]:
    lines = []
    if "preferences" in holds.configs:
        lines.append(
            "Preferences, TRL: `DPOTrainer(MODEL, train_dataset=preferences)`; axolotl: "
            "`rl: dpo` and `datasets: [{path: FOLDER, name: preferences, split: train, "
            "type: chat_template.default, field_messages: prompt}]`"
        )
    if "rlvr" in holds.configs:
        lines.append(
            "Verifiable prompts, TRL: `GRPOTrainer(MODEL, train_dataset=rlvr, "
            "reward_funcs=siftline.training.rewards.verified)`, after `import "
            "siftline.training.rewards`"
        )
    return lines


def _stacking(holds: _Holds) -> str:
    keys = ", ".join(f"`{key}`" for key in holds.keys)
    return (
        f"Messages here have the keys {keys}. Versions with the same keys concatenate anywhere; "
        'with others stack by `siftline.load(A, B)`, `pl.concat([a, b], how="diagonal_relaxed")` '
        "or DuckDB's `union_by_name`."
    )


def render(
    info: CardInfo,
    *,
    rows: int,
    schema: pa.Schema,
    removed: int,
    further: Mapping[str, int] | None = None,
) -> str:
    """Renders the card.

    Args:
        info: What the recipe says.
        rows: Rows of the training split.
        schema: Schema of the training split.
        removed: Rows of the removed config; 0 leaves the config out.
        further: Rows of each further config; `info.configs` says what they are.

    Returns:
        Markdown with the YAML header of the Hub.
    """
    further = further or {}
    names = [*(["removed"] if removed else []), *further]
    parts = [_header(info, rows, names), f"# {escape(info.name)}"]
    if info.description:
        parts.append(escape(info.description))
    counts = f"{rows:,} rows" + (
        f", and {removed:,} removed ones with their reasons" * (removed > 0)
    )
    parts.append(f"{counts}. Made with Siftline; `manifest.json` names the version and every file.")
    if info.how or info.funnel:
        parts.append("## How it was made")
    if info.how:
        parts.append("\n".join(f"- {escape(line)}" for line in info.how))
    if info.funnel:
        parts.append(_funnel(info.funnel))
    parts += ["## Columns", _columns(info, schema)]
    if removed:
        parts.append(
            "The config `removed` holds every row that was dropped: the stage, the reason, the"
            " value and the threshold that decided, the kept row it lost to (`matched_id`), and"
            " excerpts."
        )
    meanings = dict(info.configs)
    for name, count in further.items():
        parts.append(f"The config `{name}` holds {count:,} {escape(meanings[name])}.")
    parts += ["## Loading", _loading(info.name, _holds(schema, names))]
    return "\n\n".join(parts) + "\n"

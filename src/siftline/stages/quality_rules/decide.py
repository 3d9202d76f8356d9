"""The quality gate: rules about a text's form, its language, listed words, bounds on scores.

Pure: what was found out about each row (`COLUMNS`) comes in as a narrow frame, from
`measures.degenerate`, `text_rules` and the recipe's scorers. A row's fate depends on nothing but
the row, and the first rule that speaks against it is its reason.

The published rules were tuned to tell prose from the rest of the web, on documents of 50 words and
more. Half of them are wrong about sound instruction data: of GSM8K's solutions that long, 99 % have
too few words with a letter, a third too few lines that end in punctuation, 6 % a 4-gram too many
(docs/stages/quality_rules.md). So `Rules` asks by default for faults of any text; the rest is
there by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import polars as pl

from siftline.rows.selection import Selection, decisions

COLUMNS = {
    "id": pl.String,
    "source": pl.String,
    "language": pl.String,  # of the text; null where it is too short to tell
    "in_kept": pl.Float64,  # probability of the languages to keep; null where nothing was asked
    "listed": pl.Int64,  # words and phrases of the user's list; null where there is none
    "broken": pl.String,  # the rule of the text's language that it breaks, or null
    "value": pl.Float64,  # the number that rule looked at
    "threshold": pl.Float64,
}
SCORE = "score_"
"""Prefix of the columns that hold the scores to be bounded; null where a row has none."""
SHORT_LINE = 30
"""Characters of a short line (FineWeb)."""
UNKNOWN = "unknown"
"""The language of a text too short to tell."""


@dataclass(frozen=True)
class Rules:
    """Thresholds of one language, named as datatrove names them; null switches a rule off.

    "Gopher" is Rae et al. 2021 (arXiv 2112.11446), table A1 and section A1.1; FineWeb is Penedo et
    al. 2024 (arXiv 2406.17557), FineWeb2 its configurations by language. *Off* means that the
    published value, in brackets, hits sound instruction data.

    Attributes:
        min_words: Shorter texts are held to `lorem_ipsum` and `curly_bracket` alone: Gopher's
            rules were made for documents of 50 words or more.
        dup_line_frac: Share of lines that repeat one (Gopher).
        dup_para_frac: Share of paragraphs that repeat one (Gopher).
        dup_line_char_frac: Share of characters in such lines (Gopher).
        dup_para_char_frac: Share of characters in such paragraphs (Gopher).
        top_n_grams: Share of characters in the commonest n-gram, by n. Measured: the highest in
            8,159 sound texts was 0.44 (Gopher: 2: 0.20, 3: 0.18, 4: 0.16).
        dup_n_grams: Share of characters in n-grams that repeat one, by n. Measured: the highest
            was 0.34, a loop comes near 1 (Gopher: 5: 0.15 down to 10: 0.10).
        line_punct_thr: Least share of lines that end in punctuation. Off (FineWeb: 0.12).
        short_line_thr: Share of lines of at most 30 characters. Off, also in FineWeb2 (FineWeb:
            0.67).
        char_duplicates_ratio: Share of characters in repeated lines (FineWeb2; FineWeb: 0.01).
        new_line_ratio: Line ends a word. Off: lists are answers (FineWeb: 0.3).
        min_doc_words: Least words; above `min_words`. Off: short answers are answers (Gopher: 50).
        max_doc_words: Gopher's.
        min_avg_word_length: Off: formulas (Gopher: 3).
        max_avg_word_length: Gopher's; German wants 15 (FineWeb2).
        max_symbol_word_ratio: Hashes, and ellipses, a word (Gopher).
        max_bullet_lines_ratio: Off: lists are answers (Gopher: 0.9).
        max_ellipsis_lines_ratio: Share of lines that end in an ellipsis (Gopher).
        max_non_alpha_words_ratio: Least share of words with a letter. Off: formulas (Gopher: 0.8).
        min_stop_words: Different stop words. Off: code has none (Gopher: 2).
        stop_words: Of the language; Gopher's eight.
        lorem_ipsum: Whether texts with that phrase go (C4, Raffel et al. 2020).
        curly_bracket: Whether texts with a curly bracket go. Off: code (C4).
    """

    min_words: int = 50
    dup_line_frac: float | None = 0.3
    dup_para_frac: float | None = 0.3
    dup_line_char_frac: float | None = 0.2
    dup_para_char_frac: float | None = 0.2
    top_n_grams: dict[str, float] = field(default_factory=lambda: {"4": 0.5})
    dup_n_grams: dict[str, float] = field(default_factory=lambda: {"10": 0.4})
    line_punct_thr: float | None = None
    short_line_thr: float | None = None
    char_duplicates_ratio: float | None = 0.1
    new_line_ratio: float | None = None
    min_doc_words: int | None = None
    max_doc_words: int | None = 100_000
    min_avg_word_length: float | None = None
    max_avg_word_length: float | None = 10.0
    max_symbol_word_ratio: float | None = 0.1
    max_bullet_lines_ratio: float | None = None
    max_ellipsis_lines_ratio: float | None = 0.3
    max_non_alpha_words_ratio: float | None = None
    min_stop_words: int | None = None
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    lorem_ipsum: bool = True
    curly_bracket: bool = False

    def __post_init__(self) -> None:
        if self.min_words < 1:
            raise ValueError(f"min_words is {self.min_words}: give 1 or more")
        if self.min_doc_words is not None and self.min_doc_words <= self.min_words:
            raise ValueError(
                f"min_doc_words {self.min_doc_words} is not above min_words {self.min_words}, "
                "below which no text is judged: lower min_words"
            )
        for name in ("top_n_grams", "dup_n_grams"):
            for n, share in getattr(self, name).items():
                if not n.isdecimal() or int(n) < 1 or not 0 < share <= 1:
                    raise ValueError(
                        f"{name}: {n!r}: {share}: give n: share, with n 1 or more and a share in "
                        "(0, 1]"
                    )
        for name, value in vars(self).items():
            # datatrove takes 0 for off here and for a threshold there.
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{name} is {value}: give a number above 0, or null for off")


@dataclass(frozen=True)
class ScoreBound:
    """What the value of one of the recipe's scorers may be.

    Attributes:
        min: Least value that stays; null is no limit.
        max: Largest value that stays; null is no limit.
    """

    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise ValueError("neither min nor max is given: give one")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}: nothing would stay")


@dataclass(frozen=True)
class QualityRules:
    """Removes rows whose text is of another language, repeats itself, or breaks another rule.

    Attributes:
        text: What is judged: the response, the prompt, or both in one text.
        languages: Rules by language code (ISO 639-1). Texts of other languages are held to none,
            those of unknown language go where they break a rule of every language here.
        keep: Languages to keep; empty keeps all. A text of unknown language stays.
        min_language: Least probability of all kept languages together; from there on, languages
            that are named here also go before others in telling a text's. Measured with
            `min_letters`: 1 of 11,972 English texts has less; the most among 195 sentences in
            other languages is 0.005.
        min_letters: The language of a text with fewer letters, those of a repeated word counted
            once, is that of prompt and response together, and unknown where those have few too.
        identify: Whether languages are looked for. If not, all texts are of the one in `languages`.
        words: File of words and phrases, one a line, that no text may have (Pretrainer's Guide,
            arXiv 2305.13169, on toxic text). Case and punctuation don't matter.
        scores: Bounds on the recipe's scorers by name: a classifier's probability of toxic text
            (`max`), a column with the year (`min`). A row without a score stays.
    """

    text: Literal["response", "prompt", "both"] = "response"
    languages: dict[str, Rules] = field(default_factory=lambda: {"en": Rules()})
    keep: tuple[str, ...] = ()
    min_language: float = 0.05
    min_letters: int = 60
    identify: bool = True
    words: str | None = None
    scores: dict[str, ScoreBound] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.text not in ("response", "prompt", "both"):
            raise ValueError(f"text is {self.text!r}: use 'response', 'prompt' or 'both'")
        if not 0 < self.min_language <= 1 or self.min_letters < 1:
            raise ValueError(
                f"min_language is {self.min_language}, min_letters {self.min_letters}: give a "
                "probability in (0, 1] and 1 letter or more"
            )
        if not self.identify and (self.keep or len(self.languages) != 1):
            raise ValueError(
                f"identify is off: name one language and keep none, not languages "
                f"{sorted(self.languages)} and keep {list(self.keep)}"
            )

    def summarise(self, bucket: pl.DataFrame) -> pl.DataFrame:
        """Rows by source, language and reason."""
        judged = self._judged(bucket)
        return judged.group_by("source", "language", "reason").agg(rows=pl.len().cast(pl.Int64))

    def decide(self, states: Sequence[pl.DataFrame]) -> "Plan":
        """Counts only: no row's fate depends on another."""
        counts = pl.concat([pl.DataFrame(schema=_COUNTS), *states])
        removed = counts.filter(pl.col("reason").is_not_null())
        reasons = removed.group_by("reason").agg(pl.col("rows").sum()).sort("reason")
        facts = {
            "judged": int(counts["rows"].sum()),
            "text": self.text,
            "removed": dict(reasons.iter_rows()),
            "unknown_language": _of(counts, UNKNOWN) if self.identify else 0,
            "without_rules": self._lawless(counts),
        }
        return Plan(facts, {f"mix_{by}": _mix(counts, by) for by in ("source", "language")})

    def apply(self, bucket: pl.DataFrame, plan: "Plan") -> Selection:
        """Says which rule removed a row, what it saw and where it draws the line."""
        judged = self._judged(bucket)
        decided = decisions(
            judged["id"],
            kept=judged["reason"].is_null(),
            reason=judged["reason"],
            value=judged["value"],
            threshold=judged["threshold"],
        )
        return Selection(decided, plan.facts)

    def _judged(self, bucket: pl.DataFrame) -> pl.DataFrame:
        """The first rule that each row breaks, its value and threshold; nulls where none."""
        tests = [
            ("other_language", "in_kept", self.min_language, pl.col("in_kept") < self.min_language),
            ("listed_words", "listed", 0.0, pl.col("listed") > 0),
        ]
        for name, bound in sorted(self.scores.items()):
            column = SCORE + name
            if bound.min is not None:
                tests.append((f"{name}_below", column, bound.min, pl.col(column) < bound.min))
            if bound.max is not None:
                tests.append((f"{name}_above", column, bound.max, pl.col(column) > bound.max))
        reason, value, threshold = pl.col("broken"), pl.col("value"), pl.col("threshold")
        for name, column, limit, broken in reversed(tests):
            hit = broken.fill_null(False)
            reason = pl.when(hit).then(pl.lit(name)).otherwise(reason)
            value = pl.when(hit).then(pl.col(column).cast(pl.Float64)).otherwise(value)
            threshold = pl.when(hit).then(pl.lit(limit, pl.Float64)).otherwise(threshold)
        return bucket.select(
            "id",
            pl.col("source").fill_null(""),
            pl.col("language").fill_null(UNKNOWN),
            reason.alias("reason"),
            value.alias("value"),
            threshold.alias("threshold"),
        )

    def _lawless(self, counts: pl.DataFrame) -> int:
        """Rows of known languages that have no rules."""
        held = [*self.languages, UNKNOWN]
        return int(counts.filter(~pl.col("language").is_in(held))["rows"].sum())


@dataclass(frozen=True)
class Plan:
    """What the gate saw in all: facts, and the tables `mix_source` and `mix_language`.

    Either table has a line a source or language: rows before and after with their shares of the
    whole, and how many were removed.
    """

    facts: dict[str, Any]
    tables: Mapping[str, pl.DataFrame]


_COUNTS = {
    "source": pl.String,
    "language": pl.String,
    "reason": pl.String,
    "rows": pl.Int64,
}


def _of(counts: pl.DataFrame, language: str) -> int:
    return int(counts.filter(pl.col("language") == language)["rows"].sum())


def _mix(counts: pl.DataFrame, by: str) -> pl.DataFrame:
    """Rows and shares by source or language, before and after."""
    kept = pl.col("rows").filter(pl.col("reason").is_null()).sum()
    table = counts.group_by(by).agg(before=pl.col("rows").sum(), after=kept).sort(by)
    shares = [
        (pl.col(name) / pl.max_horizontal(pl.col(name).sum(), 1)).alias(f"share_{name}")
        for name in ("before", "after")
    ]
    return table.with_columns(*shares, removed=pl.col("before") - pl.col("after"))

"""Self-answers: the target model's own verified words in the place of the reference's (S3FT)."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.progress import Progress
from siftline.rows import schema
from siftline.rows.ledger import StageResult
from siftline.rows.selection import decisions
from siftline.scoring.engines.base import Generation
from siftline.scoring.measures.samples import draw_samples, text_of
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import UnscorableRow, prompt_tokens
from siftline.scoring.verifiers import isolation_of
from siftline.stages.context import Context, StageRun, split_failed
from siftline.stages.models import over_buckets
from siftline.stages.rejection_sampling.drawing import Prompt
from siftline.stages.rejection_sampling.options import JUDGE
from siftline.stages.rejection_sampling.problems import (
    UNJUDGED,
    Grader,
    Problem,
    fault_of,
    grader,
    judge_draw,
)
from siftline.stages.s3ft.options import PARAPHRASE, SelfAnswers

ROUTES = ("own_answer", "paraphrase", "reference", "no_independent_answer", "too_long")


@dataclass
class _Found:
    """What was found for the rows of one bucket.

    Attributes:
        route: Where each row's response comes from, one of `ROUTES` or another reason that its
            prompt can't be asked, by id.
        text: The new response, by id of the row it replaces.
        failed: Reason by id of rows that the engine gave no draw for.
        verdicts: Draws by what came of them: match, wrong_answer, truncated, verifier_error, …
    """

    route: dict[str, str] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    verdicts: Counter[str] = field(default_factory=Counter)


def run(context: Context) -> StageRun:
    """Replaces rows by the target model's own verified answer, or paraphrase, where there is one.

    A replaced row is one removed, for `own_answer` or `paraphrase`, and one added.
    """
    options = context.stage.options
    assert isinstance(options, SelfAnswers)
    grade = grader(options.verifier, lambda: context.recorder(JUDGE))
    progress = Progress(context.stage.name, 0, context.emit, "draws")

    def work(recorder: Recorder, bucket: int, rows: pa.Table) -> _Found:
        return _answers(recorder, bucket, rows.to_pylist(), options, grade)

    found = _Found()
    buckets = context.store_buckets()
    models = context.recorders("target", progress)
    if options.verifier == JUDGE:  # one copy: the judge may be the same model, and not twice
        models = models[:1]
    for _, here in over_buckets(models, buckets, work):
        found.route |= here.route
        found.text |= here.text
        found.failed |= here.failed
        found.verdicts += here.verdicts
    progress.close()
    results = [_result(context, bucket, found) for bucket in context.buckets]
    shares = pl.Series(list(found.route.values()), dtype=pl.String).value_counts()
    counts = dict.fromkeys(ROUTES, 0) | dict(shares.iter_rows())
    table = pl.DataFrame(
        sorted(found.route.items()), schema={"id": pl.String, "route": pl.String}, orient="row"
    )
    facts: dict[str, Any] = {"routes": counts, "verdicts": dict(sorted(found.verdicts.items()))}
    facts |= {"vacuous": not (counts["own_answer"] + counts["paraphrase"])}
    facts |= isolation_of(options.verifier)
    return StageRun(results, {"routes": table}, facts)


def _answers(
    model: Recorder,
    bucket: int,
    rows: Sequence[Mapping[str, Any]],
    options: SelfAnswers,
    grade: Grader,
) -> _Found:
    """Routes of the rows of one store bucket.

    The n-th row of a prompt gets the n-th distinct verified draw, so that no two become the same.
    """
    found = _Found()
    mine: dict[str, list[Problem]] = {}
    for row in rows:  # sorted by id
        proven = row["answer_from"] == "independent"
        if not proven and options.verifier != JUDGE:
            found.route[row["id"]] = "no_independent_answer"
            continue
        tokens = _tokens(model, row["messages"], row["tools"])
        if isinstance(tokens, str):
            found.route[row["id"]] = tokens
        else:
            # What a judge holds a draw against, where there is no answer to a rule.
            reference = row["answer"] if proven else row["messages"][-1]["content"] or ""
            problem = Problem(Prompt(bucket, tokens), {**row, "answer": reference})
            mine.setdefault(row["prompt_id"], []).append(problem)
    wanted = {prompt: range(options.draws * len(own)) for prompt, own in mine.items()}
    prompts = {prompt: own[0].home.tokens for prompt, own in mine.items()}
    drawn, lost = draw_samples(model, bucket, prompts, wanted, options.sampling, options.seed)
    texts = _by_name(drawn)
    asked: list[tuple[Problem, Sequence[Generation]]] = []
    said: dict[str, set[str]] = {prompt: set() for prompt in mine}
    for prompt, own in mine.items():
        if prompt in lost:
            found.failed |= {problem.parent["id"]: lost[prompt] for problem in own}
        else:
            asked += [(problem, texts.get(prompt, [])) for problem in own]
    chosen = _chosen(asked, options, grade, said, found.verdicts)
    for problem, _ in asked:
        if problem.parent["id"] in chosen:
            _take(found, problem, chosen[problem.parent["id"]], "own_answer")
    left = [problem for problem, _ in asked if problem.parent["id"] not in chosen]
    _paraphrase(model, bucket, left, options, grade, found, said)
    return found


def _paraphrase(
    model: Recorder,
    bucket: int,
    left: Sequence[Problem],
    options: SelfAnswers,
    grade: Grader,
    found: _Found,
    used: Mapping[str, set[str]],
) -> None:
    """Asks for the reference in the model's own words, for rows without an own answer."""
    asked: dict[str, Sequence[int]] = {}
    for problem in left:
        if len(problem.parent["messages"]) < 2:  # plain text asks nothing
            continue
        *before, last, response = problem.parent["messages"]
        text = PARAPHRASE.format(prompt=last["content"] or "", response=response["content"] or "")
        question = [*before, schema.message("user", text), response]
        tokens = _tokens(model, question, problem.parent["tools"])
        if not isinstance(tokens, str):
            asked[problem.parent["id"]] = tokens
    wanted = dict.fromkeys(asked, range(options.paraphrases))
    if not options.paraphrases:
        wanted = {}
    drawn, lost = draw_samples(model, bucket, asked, wanted, options.sampling, options.seed)
    texts = _by_name(drawn)
    found.failed |= {p.parent["id"]: lost[p.parent["id"]] for p in left if p.parent["id"] in lost}
    again = [(p, texts.get(p.parent["id"], [])) for p in left if p.parent["id"] not in lost]
    chosen = _chosen(again, options, grade, used, found.verdicts)
    for problem, _ in again:
        row = problem.parent["id"]
        if row not in chosen:
            found.route[row] = "reference"
        else:
            _take(found, problem, chosen[row], "paraphrase")


def _tokens(
    model: Recorder, messages: Sequence[Mapping[str, Any]], tools: str | None
) -> list[int] | str:
    """Tokens of a prompt, or why there are none."""
    spec = model.spec
    try:
        return prompt_tokens(
            model.engine.tokenizer,
            messages,
            spec.template,
            tools=tools,
            max_length=model.engine.max_length,
        )
    except UnscorableRow as error:
        return error.reason


def _by_name(drawn: pl.DataFrame) -> dict[str, list[Generation]]:
    texts: dict[str, list[Generation]] = {}
    for line in drawn.sort("prompt_id", "draw").to_dicts():
        texts.setdefault(line["prompt_id"], []).append(text_of(line))
    return texts


def _chosen(
    asked: Sequence[tuple[Problem, Sequence[Generation]]],
    options: SelfAnswers,
    grade: Grader,
    used: Mapping[str, set[str]],
    verdicts: Counter[str],
) -> dict[str, str]:
    """The first verified draw of each row that no other row of its prompt has, by the row's id.

    All rows' first draws are graded together, then the second ones of those without an answer, and
    so on: a judge is asked in batches, and never about a draw that is not needed.

    Args:
        asked: Rows with their draws.
        options: How draws are screened.
        grade: Verifies draws.
        used: Draws that are taken, by prompt; those chosen are added.
        verdicts: Takes what came of each draw.
    """
    chosen: dict[str, str] = {}
    left = list(asked)
    for draw in range(max((len(texts) for _, texts in asked), default=0)):
        left = [(p, texts) for p, texts in left if p.parent["id"] not in chosen]
        here = [(p, texts[draw]) for p, texts in left if draw < len(texts)]
        faults = [fault_of(p, given, screen=options.screen) for p, given in here]
        whole = [pair for pair, fault in zip(here, faults, strict=True) if fault is None]
        told = iter(grade(whole))
        for (problem, given), fault in zip(here, faults, strict=True):
            verdict = UNJUDGED if fault else next(told)
            line = judge_draw(problem, draw, given, fault, verdict)
            verdicts[line["reason"]] += 1
            taken = used[problem.parent["prompt_id"]]
            if line["correct"] and line["dedup_key"] not in taken:
                taken.add(line["dedup_key"])
                chosen[problem.parent["id"]] = str(line["text"])
    return chosen


def _take(found: _Found, problem: Problem, text: str, route: str) -> None:
    row = problem.parent
    found.route[row["id"]] = route
    if text != schema.canonical_text(
        row["messages"][-1]["content"]
    ):  # the model says what stands there
        found.text[row["id"]] = text


def _result(context: Context, bucket: int, found: _Found) -> StageResult:
    added: dict[str, dict[str, Any]] = {}
    lost_to: dict[str, str] = {}
    ids, known = context.in_play(bucket), context.known(bucket)
    for row in _replaced(context, bucket, found):
        new = schema.make_row(
            [*row["messages"][:-1], schema.message("assistant", found.text[row["id"]])],
            answer=row["answer"],
            answer_from=row["answer_from"],
            source="self",
            tools=row["tools"],
        )
        if new["id"] in known:  # written before, and kept or removed as itself: this row stays
            continue
        lost_to[row["id"]] = new["id"]
        route = found.route[row["id"]]
        added[new["id"]] = {**new, "parent_id": row["id"], "origin": f"s3ft {route}"}
    frame = decisions(
        ids,
        kept=[i not in lost_to for i in ids],
        reason=[found.route.get(i, "") for i in ids],
        matched_id=[lost_to.get(i) for i in ids],
    )
    new_rows = [row for _, row in sorted(added.items())]
    here = set(ids)
    failed = {i: why for i, why in found.failed.items() if i in here}
    result = split_failed(frame, failed)
    return StageResult(
        result.decisions, result.failed, pa.Table.from_pylist(new_rows, schema=schema.ADDED)
    )


def _replaced(context: Context, bucket: int, found: _Found) -> Iterator[dict[str, Any]]:
    yield from (row for row in context.rows(bucket).to_pylist() if row["id"] in found.text)

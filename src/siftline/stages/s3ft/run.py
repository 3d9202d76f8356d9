"""Self-answers: the target model's own verified words in the place of the reference's (S3FT)."""

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
from siftline.scoring.verifiers import Verifier, get_verifier, isolation_of
from siftline.stages.context import Context, StageRun, split_failed
from siftline.stages.models import over_buckets
from siftline.stages.rejection_sampling.drawing import Prompt
from siftline.stages.rejection_sampling.problems import Problem, fault_of, judge_draw
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
    """

    route: dict[str, str] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run(context: Context) -> StageRun:
    """Replaces rows by the target model's own verified answer, or paraphrase, where there is one.

    A replaced row is one removed, for `own_answer` or `paraphrase`, and one added.
    """
    options = context.stage.options
    assert isinstance(options, SelfAnswers)
    check = get_verifier(options.verifier)
    progress = Progress(context.stage.name, 0, context.emit, "draws")

    def work(recorder: Recorder, bucket: int, rows: pa.Table) -> _Found:
        return _answers(recorder, bucket, rows.to_pylist(), options, check)

    found = _Found()
    buckets = context.store_buckets()
    for _, here in over_buckets(context.recorders("target", progress), buckets, work):
        found.route |= here.route
        found.text |= here.text
        found.failed |= here.failed
    progress.close()
    results = [_result(context, bucket, found) for bucket in context.buckets]
    shares = pl.Series(list(found.route.values()), dtype=pl.String).value_counts()
    counts = dict.fromkeys(ROUTES, 0) | dict(shares.iter_rows())
    table = pl.DataFrame(
        sorted(found.route.items()), schema={"id": pl.String, "route": pl.String}, orient="row"
    )
    facts = {"routes": counts, "vacuous": not (counts["own_answer"] + counts["paraphrase"])}
    facts |= isolation_of(options.verifier)
    return StageRun(results, {"routes": table}, facts)


def _answers(
    model: Recorder,
    bucket: int,
    rows: Sequence[Mapping[str, Any]],
    options: SelfAnswers,
    check: Verifier,
) -> _Found:
    """Routes of the rows of one store bucket.

    The n-th row of a prompt gets the n-th distinct verified draw, so that no two become the same.
    """
    found = _Found()
    mine: dict[str, list[Problem]] = {}
    for row in rows:  # sorted by id
        if row["answer_from"] != "independent":
            found.route[row["id"]] = "no_independent_answer"
            continue
        tokens = _tokens(model, row["messages"], row["tools"])
        if isinstance(tokens, str):
            found.route[row["id"]] = tokens
        else:
            problem = Problem(Prompt(bucket, tokens), dict(row))
            mine.setdefault(row["prompt_id"], []).append(problem)
    wanted = {prompt: range(options.draws * len(own)) for prompt, own in mine.items()}
    prompts = {prompt: own[0].home.tokens for prompt, own in mine.items()}
    drawn, lost = draw_samples(model, bucket, prompts, wanted, options.sampling, options.seed)
    texts = _by_name(drawn)
    left: list[Problem] = []
    said: dict[str, set[str]] = {prompt: set() for prompt in mine}
    for prompt, own in mine.items():
        if prompt in lost:
            found.failed |= {problem.parent["id"]: lost[prompt] for problem in own}
            continue
        for problem in own:
            text = _first(problem, texts.get(prompt, []), options, check, said[prompt])
            if text is None:
                left.append(problem)
            else:
                _take(found, problem, text, "own_answer")
    _paraphrase(model, bucket, left, options, check, found, said)
    return found


def _paraphrase(
    model: Recorder,
    bucket: int,
    left: Sequence[Problem],
    options: SelfAnswers,
    check: Verifier,
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
    for problem in left:
        row = problem.parent["id"]
        if row in lost:
            found.failed[row] = lost[row]
            continue
        mine = used[problem.parent["prompt_id"]]
        said = _first(problem, texts.get(row, []), options, check, mine)
        if said is None:
            found.route[row] = "reference"
        else:
            _take(found, problem, said, "paraphrase")


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


def _first(
    problem: Problem,
    texts: Sequence[Generation],
    options: SelfAnswers,
    check: Verifier,
    used: set[str],
) -> str | None:
    """The first verified text that is not used yet; it is then."""
    for draw, given in enumerate(texts):
        if fault_of(problem, given, screen=options.screen) is not None:
            continue
        verdict = check(schema.canonical_text(given.text), problem.parent["answer"])
        line = judge_draw(problem, draw, given, None, verdict)
        if line["correct"] and line["dedup_key"] not in used:
            used.add(line["dedup_key"])
            return str(line["text"])
    return None


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
            answer_from="independent",
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

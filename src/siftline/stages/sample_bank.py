"""Preference pairs and verifiable prompts: from the draws of rejection sampling, and from labels.

The same draws give three datasets. The rows for fine-tuning are the published ones; a pair holds a
verified answer against a refuted one to the same prompt; and a prompt that the sampler solves
sometimes, but not always, is one that reinforcement learning with a verifier learns from. Each is
a config of its own, since a trainer takes a column called `prompt` for its task. Responses that the
input labels as bad ones make pairs as well, with good ones to the same prompt.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.ingest.pool import PROVENANCE, REJECTED
from siftline.kernels.draws import uniforms
from siftline.recipe.kinds import Stage
from siftline.rows import schema
from siftline.rows.ledger import KEPT, StageOutput
from siftline.stages.context import Context
from siftline.stages.rejection_sampling.options import JUDGE, NONE, RejectionSampling

PREFERENCES = "preferences"
RLVR = "rlvr"
MEANINGS = {
    PREFERENCES: "pairs of a good and a bad answer to one prompt, verified and refuted or labelled "
    "so, for preference training",
    RLVR: "prompts that the sampler solves sometimes but not always, with answer and verifier, for "
    "reinforcement learning",
}


def sample_bank(context: Context) -> dict[str, pa.Table]:
    """Preference pairs and verifiable prompts of a recipe, by config name.

    A chosen answer passed every gate after it was drawn; that the budget left it out is no fault. A
    rejected answer was whole and sound, and its final answer is another than the reference; no gate
    reads it beside its prompt's. A prompt whose row a later gate removed is left out. Of labelled
    responses the good one stayed to the end, or went for the budget alone.

    Args:
        context: After the last stage.

    Returns:
        Tables in the order of hash(seed, id), both without rows where nothing was sampled or
        labelled. Columns of preferences: id, prompt, chosen, rejected, sift_prompt_id, sift_answer,
        sift_chosen_id, sift_rejected_id (of labelled ones), sift_rejected_draw, sift_first_error,
        sift_last_right (of draws). Of rlvr: id, prompt, answer, verifier, pass_rate, n_trials.
    """
    seed = context.recipe.seed
    pairs, prompts = list(_labelled(context)), []
    for i, (stage, output) in enumerate(context.before):
        if stage.kind == "rejection_sampling":
            spoiled = _spoiled(context.before[i + 1 :], context)
            pairs += list(_pairs(context, output, spoiled))
            if stage.options.verifier not in (JUDGE, NONE):
                prompts += list(_verifiable(context, stage, output, spoiled))
    return {PREFERENCES: _table(pairs, _PAIR, seed), RLVR: _table(prompts, _PROMPT, seed)}


_MESSAGES = pa.list_(pa.struct([(name, pa.string()) for name in ("role", "content")]))
_PAIR = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", _MESSAGES),
        ("chosen", _MESSAGES),
        ("rejected", _MESSAGES),
        ("sift_prompt_id", pa.string()),
        ("sift_answer", pa.string()),
        ("sift_chosen_id", pa.string()),
        ("sift_rejected_id", pa.string()),
        ("sift_rejected_draw", pa.int64()),
        ("sift_first_error", pa.int64()),
        ("sift_last_right", pa.string()),
    ]
)
_PROMPT = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", _MESSAGES),
        ("answer", pa.string()),
        ("verifier", pa.string()),
        ("pass_rate", pa.float64()),
        ("n_trials", pa.int64()),
    ]
)


def _spoiled(later: Sequence[tuple[Stage, StageOutput]], context: Context) -> set[str]:
    """Ids of rows that a gate behind the draws removed, or could not judge."""
    gone: set[str] = set()
    for stage, output in later:
        if stage.of.role == "gate":
            for bucket in context.buckets:
                decided = output.decisions(bucket)
                gone |= set(decided.filter(pl.col("outcome") != KEPT)["id"].to_list())
    return gone


def _labelled(context: Context) -> Iterator[dict[str, Any]]:
    """Responses labelled bad, each against a good one to its prompt that stayed.

    Halves of one input line belong together; what is left on either side meets in order of id.
    """
    for bucket in context.buckets:
        bad = context.pool.read(REJECTED, bucket)
        if not bad.num_rows:
            continue
        of: dict[str, list[dict[str, Any]]] = {}
        for row in bad.to_pylist():
            of.setdefault(row["prompt_id"], []).append(row)
        good: dict[str, list[dict[str, Any]]] = {}
        for row in context.everything(bucket, _stayed(context, bucket)).to_pylist():
            if row["prompt_id"] in of and row["origin"] is None:
                good.setdefault(row["prompt_id"], []).append(row)
        places: dict[str, set[tuple[str, int]]] = {}
        for line in context.pool.read(PROVENANCE, bucket, ["id", "file", "line"]).to_pylist():
            places.setdefault(line["id"], set()).add((line["file"], line["line"]))
        for prompt, rows in sorted(good.items()):
            for row, worse in _matched(rows, of[prompt], places):
                if not _calls_tools(row) and not _calls_tools(worse):
                    yield {
                        "id": schema.digest("pair", row["id"], worse["id"]),
                        "prompt": _plain(row["messages"][:-1]),
                        "chosen": _plain(row["messages"][-1:]),
                        "rejected": _plain(worse["messages"][-1:]),
                        "sift_prompt_id": prompt,
                        "sift_answer": row["answer"],
                        "sift_chosen_id": row["id"],
                        "sift_rejected_id": worse["id"],
                        "sift_rejected_draw": None,
                        "sift_first_error": None,
                        "sift_last_right": None,
                    }


def _stayed(context: Context, bucket: int) -> list[str]:
    """Ids of one bucket that no stage removed but for the budget."""
    ids = set(context.known(bucket))
    for stage, output in context.before:
        decided = output.decisions(bucket).filter(pl.col("outcome") != KEPT)
        if stage.of.role != "budget":
            ids -= set(decided["id"].to_list())
    return sorted(ids)


def _matched(
    good: Sequence[dict[str, Any]],
    bad: Sequence[dict[str, Any]],
    places: dict[str, set[tuple[str, int]]],
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    left = {row["id"]: row for row in good}
    alone = []
    for worse in bad:
        here = places.get(worse["id"], set())
        same = next((row for i, row in left.items() if here & places.get(i, set())), None)
        if same is None:
            alone.append(worse)
        else:
            yield left.pop(same["id"]), worse
    yield from zip(left.values(), alone, strict=False)


def _pairs(context: Context, output: StageOutput, spoiled: set[str]) -> Iterator[dict[str, Any]]:
    """The i-th good draw of a prompt against its i-th refuted one, in draw order."""
    refuted: dict[str, list[dict[str, Any]]] = {}
    negatives = output.table("negatives")
    if negatives is None:  # a table without lines is not written
        return
    for line in negatives.sort("prompt_id", "draw").to_dicts():
        refuted.setdefault(line["prompt_id"], []).append(line)
    for bucket in context.buckets:
        good: dict[str, list[dict[str, Any]]] = {}
        for row in output.added(bucket).to_pylist():
            if row["id"] not in spoiled and not _calls_tools(row):
                good.setdefault(row["prompt_id"], []).append(row)
        for prompt, rows in good.items():
            rows.sort(key=lambda row: int(row["origin"].rsplit(" ", 1)[1]))
            for row, bad in zip(rows, refuted.get(prompt, []), strict=False):
                yield {
                    "id": schema.digest("pair", row["id"], bad["text"]),
                    "prompt": _plain(row["messages"][:-1]),
                    "chosen": _plain(row["messages"][-1:]),
                    "rejected": [{"role": "assistant", "content": bad["text"]}],
                    "sift_prompt_id": prompt,
                    "sift_answer": row["answer"],
                    "sift_chosen_id": row["id"],
                    "sift_rejected_id": None,
                    "sift_rejected_draw": bad["draw"],
                    "sift_first_error": bad["first_error"],
                    "sift_last_right": bad["last_right"],
                }


def _verifiable(
    context: Context, stage: Stage, output: StageOutput, spoiled: set[str]
) -> Iterator[dict[str, Any]]:
    assert isinstance(stage.options, RejectionSampling)
    rates = output.table("difficulty")
    if rates is None:
        return
    # By the value that is published, so that none is 0 or 1 whatever it was corrected for.
    sometimes = (pl.col("sampler_difficulty") > 0) & (pl.col("sampler_difficulty") < 1)
    some = rates.filter(sometimes & ~pl.col("parent_id").is_in(list(spoiled)))
    parents = {line["parent_id"]: line for line in some.to_dicts()}
    for bucket in context.buckets:
        here = [i for i in parents if schema.bucket_of(i, context.pool.buckets) == bucket]
        for row in context.everything(bucket, here).to_pylist():
            if not _calls_tools(row):
                line = parents[row["id"]]
                yield {
                    "id": line["prompt_id"],
                    "prompt": _plain(row["messages"][:-1]),
                    "answer": row["answer"],
                    "verifier": stage.options.verifier,
                    "pass_rate": 1 - line["sampler_difficulty"],
                    "n_trials": line["n_trials"],
                }


def _calls_tools(row: dict[str, Any]) -> bool:
    """Rows whose conversation is more than text stay out: the trainers' formats have no place."""
    return bool(row["tools"]) or any(m["tool_calls"] or m["reasoning"] for m in row["messages"])


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"role": m["role"], "content": m["content"] or ""} for m in messages]


def _table(lines: list[dict[str, Any]], columns: pa.Schema, seed: int) -> pa.Table:
    unique = {line["id"]: line for line in lines}
    ids = sorted(unique)
    draws = uniforms(seed, "sample bank", ids)
    ordered = [unique[i] for _, i in sorted(zip(draws.tolist(), ids, strict=True))]
    return pa.Table.from_pylist(ordered, schema=columns)

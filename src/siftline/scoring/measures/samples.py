"""Samples of a model's answers: draw j of a prompt is a recorded fact.

Draw j has the seed hash(run seed, prompt id, j), so it is the same draw whoever asks for it, in
which round, and beside which others. Confidence and rejection sampling share draws that way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.kernels.draws import hash64
from siftline.scoring.engines.base import Failed, Generation, Sampling
from siftline.scoring.recorder import Recorder
from siftline.store.store import Namespace, Store, score_key

SCORER = "samples"
VERSION = 1
RECORD = pa.schema(
    [
        ("key", pa.string()),
        ("text", pa.string()),
        ("n_tokens", pa.int32()),
        ("finish_reason", pa.string()),
    ]
)
COLUMNS = {
    "prompt_id": pl.String,
    "draw": pl.Int64,
    "text": pl.String,
    "n_tokens": pl.Int32,
    "finish_reason": pl.String,
}


def seed_of(seed: int, prompt: str, draw: int) -> int:
    """Seed of one draw, whoever asks for it."""
    return hash64(seed, prompt, draw)


def sample_store(recorder: Recorder, sampling: Sampling) -> Store:
    """Where draws of this model made so are kept."""
    fingerprint = recorder.engine.fingerprint()
    return Store(recorder.root, Namespace(SCORER, VERSION, fingerprint, asdict(sampling)), RECORD)


def text_of(line: Mapping[str, Any]) -> Generation:
    """The text that a line of samples, or a record of the store, holds."""
    return Generation(line["text"], line["n_tokens"], line["finish_reason"])


def draw_samples(
    recorder: Recorder,
    bucket: int,
    prompts: Mapping[str, Sequence[int]],
    draws: Mapping[str, Sequence[int]],
    sampling: Sampling,
    seed: int,
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Draws answers to the prompts of one store bucket.

    Args:
        recorder: The sampler.
        bucket: Store bucket that all prompts belong to.
        prompts: Token ids by prompt id.
        draws: Indices of the wanted draws by prompt id.
        sampling: Temperature, top-p, length.
        seed: The run's seed.

    Returns:
        One line of `COLUMNS` per draw, sorted by prompt and draw; and reasons by prompt id of
        those the engine gave nothing for.
    """
    questions: dict[str, tuple[int, tuple[str, Sequence[int], int]]] = {}
    asked: dict[tuple[str, int], str] = {}
    order: dict[str, str] = {}
    for prompt, indices in draws.items():
        for j in indices:
            draw_seed = seed_of(seed, prompt, j)
            key = score_key(prompts[prompt], draw_seed)
            length = len(prompts[prompt]) + sampling.max_new_tokens
            questions[key] = (length, (prompt, prompts[prompt], draw_seed))
            order[key] = f"{prompt}-{j:08d}"  # a prompt's draws share a batch, and its prefill
            asked[prompt, j] = key

    def answer(batch: Sequence[tuple[str, Sequence[int], int]]) -> list[dict[str, Any] | str]:
        return _generate(recorder.engine, batch, sampling)

    records, reasons = recorder.ask(
        SCORER, VERSION, asdict(sampling), RECORD, bucket, questions, answer, order
    )
    by_key = {r["key"]: r for r in records.to_dicts()}
    lines = [
        {"prompt_id": prompt, "draw": j, **{k: by_key[key][k] for k in list(COLUMNS)[2:]}}
        for (prompt, j), key in sorted(asked.items())
        if key in by_key
    ]
    failed = {p: reasons[key] for (p, _), key in asked.items() if key in reasons}
    return pl.DataFrame(lines, schema=COLUMNS), failed


def _generate(
    engine: Any, batch: Sequence[tuple[str, Sequence[int], int]], sampling: Sampling
) -> list[dict[str, Any] | str]:
    prompts: dict[str, Sequence[int]] = {}
    seeds: dict[str, list[int]] = {}
    for prompt, tokens, draw_seed in batch:
        prompts[prompt] = tokens
        seeds.setdefault(prompt, []).append(draw_seed)
    drawn = engine.generate(list(prompts.values()), list(seeds.values()), sampling)
    texts = {
        (prompt, draw_seed): generation
        for prompt, generations in zip(prompts, drawn, strict=True)
        for draw_seed, generation in zip(seeds[prompt], generations, strict=True)
    }
    out: list[dict[str, Any] | str] = []
    for prompt, _, draw_seed in batch:
        given = texts[prompt, draw_seed]
        out.append(given.reason if isinstance(given, Failed) else asdict(given))
    return out

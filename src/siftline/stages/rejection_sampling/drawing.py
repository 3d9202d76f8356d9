"""Runs campaigns of draws on a model: streaming where its engine can, else in planned batches.

An engine that runs batches gets one store bucket after another, each in batches that follow from
the draws before them alone. A resumed run plans the same batches and finds the committed ones, so
it makes the same draws to the last bit; several devices take a bucket each. Under a limit such an
engine goes as far as there was room for when it began; a stream gains room with every draw that
ends. Both read the same draws.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence

from siftline.scoring.engines import Sampling
from siftline.scoring.recorder import MAX_ROWS, REFUSED, Recorder
from siftline.scoring.samples import draw_samples, text_of
from siftline.scoring.streaming import Streaming
from siftline.stages.rejection_sampling.campaign import Campaign, run
from siftline.stages.rejection_sampling.streaming import Judge, Made, Prompt, stream_campaign
from siftline.stages.rejection_sampling.trials import Outcome
from siftline.stages.spread import over_buckets


def run_campaign(
    recorders: Sequence[Recorder],
    campaign: Campaign,
    prompts: Mapping[str, Prompt],
    sampling: Sampling,
    seed: int,
    judge: Judge,
    *,
    guess: bool,
    stream: bool = True,
) -> Made:
    """Runs a campaign to its end, or as far as it has room for, on the copies of one model.

    Args:
        recorders: One for each copy.
        campaign: What to draw.
        prompts: By prompt id; may hold more than the campaign's.
        sampling: How to draw.
        seed: The run's seed.
        judge: Says what draws are worth; called from one thread at a time.
        guess: Also make draws that may turn out not to be needed, rather than leave slots idle.
        stream: Let engines that can take new draws at any moment do so.

    Raises:
        RuntimeError: if the engine gave no draw for some prompt, other than by refusing it, or
            refused all of them; what was drawn is kept.
    """
    if stream and all(isinstance(r.engine, Streaming) for r in recorders):
        made = stream_campaign(recorders, campaign, prompts, sampling, seed, judge, guess=guess)
    else:
        made = _in_batches(recorders, campaign, prompts, sampling, seed, judge, guess)
    lost = {prompt: why for prompt, why in made.lost.items() if why != REFUSED}
    if lost:
        first = min(lost)
        raise RuntimeError(
            f"{len(lost)} prompts got no draw, first {first} ({lost[first]}): run again, what "
            "was drawn is kept"
        )
    if made.lost and len(made.lost) == len(campaign.trials):
        raise RuntimeError(
            f"the sampler refused all {len(made.lost)} prompts: check the model and max_new_tokens"
        )
    return made


def _in_batches(
    recorders: Sequence[Recorder],
    campaign: Campaign,
    prompts: Mapping[str, Prompt],
    sampling: Sampling,
    seed: int,
    judge: Judge,
    guess: bool,
) -> Made:
    homes: dict[int, list[str]] = {}
    for prompt in campaign.trials:
        homes.setdefault(prompts[prompt].bucket, []).append(prompt)
    before = [(r.tally.computed, r.tally.found) for r in recorders]
    made, one_at_a_time = Made(), threading.Lock()

    def work(recorder: Recorder, bucket: int, mine: list[str]) -> Made:
        here = Made()
        part = campaign.part(mine)

        def draw(batch: list[tuple[str, int]]) -> Iterator[tuple[str, int, Outcome | None]]:
            wanted: dict[str, list[int]] = {}
            for prompt, index in sorted(batch):
                wanted.setdefault(prompt, []).append(index)
            tokens = {prompt: prompts[prompt].tokens for prompt in wanted}
            drawn, lost = draw_samples(recorder, bucket, tokens, wanted, sampling, seed)
            here.lost |= lost
            ended = [(line["prompt_id"], line["draw"], text_of(line)) for line in drawn.to_dicts()]
            here.tokens += sum(text.n_tokens for _, _, text in ended)
            with one_at_a_time:
                outcomes = judge(ended)
            for (prompt, index, _), outcome in zip(ended, outcomes, strict=True):
                yield prompt, index, outcome
            for prompt, index in sorted(set(batch) - {(p, j) for p, j, _ in ended}):
                yield prompt, index, None

        run(part, draw, MAX_ROWS, guess=guess)
        return here

    for _, here in over_buckets(recorders, sorted(homes.items()), work):
        made.lost |= here.lost
        made.tokens += here.tokens
    for recorder, (computed, found) in zip(recorders, before, strict=True):
        made.computed += recorder.tally.computed - computed
        made.found += recorder.tally.found - found
    return made

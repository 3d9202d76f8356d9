"""What a fine-tuned model learned that its base did not know: novelty by row, and named clusters.

The score of a row is the mean log-probability of its response under the fine-tuned model minus
that under its base. Contrastive generative exploration (misonuma/cge) samples from that contrast;
on texts that are there already nothing has to be generated. The newest rows are clustered and the
clusters named by the words that set them apart, which shows what a pool brings along that nobody
asked for.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.kernels.vectors.kmeans import kmeans
from siftline.scoring.measures.likelihood import Likelihood, score_likelihood
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import Turns

EXEMPLARS = 5
"""Rows listed per cluster, newest first."""
NAME_TERMS = 3
VOCABULARY = 20_000
"""Most terms of the TF-IDF vectors: the most frequent."""
_TERM = r"(?u)\w+|[^\w\s]+"
NOVELTY = {
    "id": pl.String(),
    "contrast": pl.Float64(),
    "novelty_rank": pl.Int64(),
    "novelty_cluster": pl.Int32(),
}
"""Rank 1 is the newest row; the cluster is null outside the newest share."""
CLUSTERS: dict[str, Any] = {
    "cluster": pl.Int32,
    "name": pl.String,
    "rows": pl.Int64,
    "contrast_mean": pl.Float64,
    "exemplars": pl.List(pl.String),
}
"""Cluster 0 holds the newest row, and so on. Exemplars are row ids."""


@dataclass(frozen=True)
class Contrast:
    """Novelty of a row to a base model.

    Attributes:
        model: Name of the fine-tuned model in the recipe.
        reference: Name of the model it was tuned from; same tokenizer and template.
        turns: The last assistant turn, or all of them.
    """

    model: str
    reference: str
    turns: Turns = "last"

    def __post_init__(self) -> None:
        if self.model == self.reference:
            raise ValueError(f"model and reference are both {self.model!r}: name two models")
        if self.turns not in ("last", "all"):
            raise ValueError(f"turns is {self.turns!r}: choose last or all")


def score_contrast(
    config: Contrast, model: Recorder, reference: Recorder, bucket: int, rows: pa.Table
) -> tuple[dict[str, tuple[float, float, float]], dict[str, str]]:
    """Contrasts the rows of one store bucket.

    Args:
        config: Which turns.
        model: The fine-tuned model.
        reference: Its base.
        bucket: Store bucket that all rows belong to.
        rows: Columns id, messages, tools.

    Returns:
        By id: the contrast in nats a token, and both mean log-probabilities; reasons by id of rows
        that one of the two could not score.

    Raises:
        ValueError: if the two do not see the same tokens: then the difference is no contrast.
    """
    asked = Likelihood(turns=config.turns)
    new, failed = score_likelihood(model, bucket, rows, asked)
    old, lacking = score_likelihood(reference, bucket, rows, asked)
    columns = ["id", "key", "logprob_mean"]
    both = new.select(columns).join(old.select(columns), on="id", suffix="_reference")
    other = both.filter(pl.col("key") != pl.col("key_reference"))["id"].sort()
    if len(other):
        raise ValueError(
            f"models {config.model!r} and {config.reference!r} see other tokens in row {other[0]}: "
            "they need one tokenizer; set the same template for both"
        )
    values = {
        line["id"]: (
            line["logprob_mean"] - line["logprob_mean_reference"],
            line["logprob_mean"],
            line["logprob_mean_reference"],
        )
        for line in both.to_dicts()
    }
    return values, lacking | failed


def novel_clusters(
    contrasts: pl.DataFrame,
    texts: Mapping[str, str],
    embeddings: Mapping[str, np.ndarray] | None = None,
    *,
    top: float = 0.01,
    k: int = 8,
    seed: int = 0,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Ranks rows by novelty, clusters the newest and names the clusters.

    A cluster is named by the terms whose mean TF-IDF weight in it exceeds that in all other given
    texts most. Give texts of ordinary rows too: then words that stand everywhere name nothing.

    Args:
        contrasts: Columns id and contrast, finite; ids are distinct.
        texts: Text by id; of the newest share at least.
        embeddings: Vectors (d,) by id of the newest share. They are clustered instead of TF-IDF.
        top: Newest share to cluster, rounded up to at least one row.
        k: Most clusters; fewer where there are fewer different texts (or vectors).
        seed: The recipe's seed.

    Returns:
        Columns of `NOVELTY` sorted by id, and of `CLUSTERS` sorted by cluster. Ties in contrast go
        by id.

    Raises:
        ValueError: if top or k is out of range, a contrast is not finite, an id repeats, or a text
            or vector of the newest share is missing.
    """
    _check(contrasts, top, k)
    ranked = contrasts.select("id", "contrast").sort(["contrast", "id"], descending=[True, False])
    ranked = ranked.with_row_index("novelty_rank", offset=1)
    newest = ranked["id"].head(math.ceil(round(top * ranked.height, 9))).to_list()
    for given in (texts, *([] if embeddings is None else [embeddings])):
        lacking = sorted(set(newest) - set(given))
        if lacking:
            raise ValueError(f"the newest row {lacking[0]} has no text or vector: give them all")
    if not newest:
        return pl.DataFrame(schema=NOVELTY), pl.DataFrame(schema=CLUSTERS)
    order = sorted(texts)
    weights, terms = _tfidf([texts[i] for i in order])
    place = {identity: position for position, identity in enumerate(order)}
    labels = _labels(newest, weights[[place[i] for i in newest]], embeddings, k, seed)
    table = ranked.with_columns(
        pl.col("id")
        .replace_strict(labels, default=None, return_dtype=pl.Int32)
        .alias("novelty_cluster")
    )
    lines = []
    for (cluster,), members in table.head(len(newest)).group_by("novelty_cluster"):
        ids = members.sort("novelty_rank")["id"].to_list()
        name = _name(weights, terms, [place[i] for i in ids])
        mean = members["contrast"].sort().mean()
        lines.append((cluster, name, len(ids), mean, ids[:EXEMPLARS]))
    clusters = pl.DataFrame(lines, schema=CLUSTERS, orient="row").sort("cluster")
    table = table.select(pl.col(name).cast(dtype) for name, dtype in NOVELTY.items())
    return table.sort("id"), clusters


def _check(contrasts: pl.DataFrame, top: float, k: int) -> None:
    if not 0 < top <= 1:
        raise ValueError(f"top is {top}: give a share above 0, at most 1")
    if k < 1:
        raise ValueError(f"k is {k}: ask for at least 1 cluster")
    bad = contrasts.filter(~pl.col("contrast").is_finite().fill_null(False))["id"].sort()
    if len(bad):
        raise ValueError(f"row {bad[0]} has no finite contrast: leave out the failed rows")
    repeated = contrasts.filter(pl.col("id").is_duplicated())["id"].sort()
    if len(repeated):
        raise ValueError(f"row {repeated[0]} stands twice: give each row once")


def _tfidf(texts: Sequence[str]) -> tuple[Any, np.ndarray]:
    """Sparse TF-IDF weights of unit length (texts, terms), and the terms."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        token_pattern=_TERM, max_features=VOCABULARY, sublinear_tf=True, dtype=np.float64
    )
    weights = vectorizer.fit_transform(texts)
    return weights.tocsr(), vectorizer.get_feature_names_out()


def _labels(
    newest: Sequence[str],
    weights: Any,
    embeddings: Mapping[str, np.ndarray] | None,
    k: int,
    seed: int,
) -> dict[str, int]:
    """Cluster by id; numbered by the newest member. `newest` and `weights` are in rank order."""
    # Trained in order of id, so that ranks decide the names of clusters and not their borders.
    order = np.argsort(np.asarray(newest))
    ids = [newest[i] for i in order]
    if embeddings is not None:
        vectors = np.stack([np.asarray(embeddings[i], np.float32) for i in ids])
        found = kmeans(vectors, min(k, len(np.unique(vectors, axis=0))), seed, ids).labels
    else:
        found = _cluster_sparse(weights[order], k, seed)
    by_id = dict(zip(ids, found.tolist(), strict=True))
    numbers: dict[int, int] = {}
    return {i: numbers.setdefault(by_id[i], len(numbers)) for i in newest}


def _cluster_sparse(weights: Any, k: int, seed: int) -> np.ndarray:
    """k-means labels, int (n,), of sparse rows (n, d)."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    distinct = Counter(
        (row.indices.tobytes(), row.data.tobytes())
        for row in (weights[i] for i in range(weights.shape[0]))
    )
    # One thread: sums in another order could move a row from one cluster to another.
    with threadpool_limits(limits=1):
        model = KMeans(min(k, len(distinct)), n_init=4, random_state=seed).fit(weights)
    return np.asarray(model.labels_)


def _name(weights: Any, terms: np.ndarray, members: Sequence[int]) -> str:
    """The terms that set the members apart from all other texts, words before signs."""
    inside = np.zeros(weights.shape[0], bool)
    inside[members] = True
    gain = np.asarray(weights[inside].mean(axis=0)).ravel()
    if not inside.all():
        gain = gain - np.asarray(weights[~inside].mean(axis=0)).ravel()
    gain = np.round(gain, 9)  # a word as common inside as outside may differ by a last bit
    wordless = np.array([not any(sign.isalpha() for sign in term) for term in terms])
    best = np.lexsort((-gain, wordless))  # stable, and terms are sorted
    return ", ".join([str(terms[i]) for i in best if gain[i] > 0][:NAME_TERMS])

"""Forward passes without padding: rows in one line, attention within each row only.

A pass holds rows of all lengths. Put into a rectangle, most of it may be padding; put end to end,
every product but attention's sees real tokens alone, and `packed_attention` runs over one row at a
time, so that no token sees another row. It needs no FlashAttention: on a GPU in half precision it
is torch's variable-length kernel, elsewhere torch's own attention, row by row.

Models whose layers look across tokens in other ways (state spaces, capped or windowed attention,
learned prompts) can't be packed. `exact` asks the model itself, and those that differ get
`padded_groups`: rows of like length stand together, a rectangle each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from siftline.training.objectives import States
from siftline.training.schedule import IGNORED

NAME = "siftline_packed"
PADDING = 0.1
"""Most padding of a group, as a share of its rectangle."""
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of attention that change its values in ways `packed_attention` does not know."""


@dataclass(frozen=True)
class Row:
    """Token ids of one row and their labels, -100 where no loss is taken; both int64, shape (n,).

    The first token has no label: nothing precedes it.
    """

    tokens: torch.Tensor
    labels: torch.Tensor


def packed(rows: Sequence[Row]) -> dict[str, Any]:
    """A model's arguments for rows end to end, shape (1, tokens)."""
    lengths = torch.tensor([len(row.tokens) for row in rows])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return {
        "input_ids": torch.cat([row.tokens for row in rows])[None],
        "labels": torch.cat([row.labels for row in rows])[None],
        "position_ids": torch.cat([torch.arange(len(row.tokens)) for row in rows])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def padded(rows: Sequence[Row], pad: int, *, left: bool = False) -> dict[str, Any]:
    """A model's arguments for rows in a rectangle, shape (rows, longest), padded on one side."""
    width = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), IGNORED)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        n = len(row.tokens)
        place = slice(width - n, width) if left else slice(0, n)
        tokens[i, place], labels[i, place], mask[i, place] = row.tokens, row.labels, 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {
        "input_ids": tokens,
        "labels": labels,
        "attention_mask": mask,
        "position_ids": positions,
    }


def length_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Groups rows of like length, longest first, so that padding stays below `PADDING`.

    Args:
        lengths: Tokens of each of n rows.

    Returns:
        Positions into `lengths`, each once; equal lengths in order.
    """
    groups: list[list[int]] = []
    real = 0
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        area = (len(groups[-1]) + 1) * lengths[groups[-1][0]] if groups else 0
        if groups and real + lengths[position] >= (1 - PADDING) * area:
            groups[-1].append(position)
            real += lengths[position]
        else:
            groups.append([position])
            real = lengths[position]
    return groups


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row, as transformers' attention interface calls it.

    Args:
        module: The attention layer.
        query: Shape (1, heads, tokens, d).
        key: Shape (1, key heads, tokens, d).
        value: Shape (1, key heads, tokens, d).
        attention_mask: None: rows are told by their bounds.
        dropout: Of attention weights.
        scaling: Factor of the logits; None is 1 / sqrt(d).
        sliding_window: Tokens each token looks back on, itself included.
        cu_seq_lens_q: Bounds of the rows, shape (rows + 1,).
        max_length_q: Tokens of the longest row.
        **more: What other kinds of attention take.

    Returns:
        Shape (1, tokens, heads, d), and no attention weights.

    Raises:
        ValueError: for attention of another kind.
    """
    strange = [name for name in UNSUPPORTED if more.get(name) is not None]
    if strange or cu_seq_lens_q is None or attention_mask is not None or len(query) != 1:
        raise ValueError(f"attention with {', '.join(strange) or 'no row bounds'} can't be packed")
    if not getattr(module, "is_causal", True):
        raise ValueError("attention that is not causal can't be packed")
    assert max_length_q is not None
    window = sliding_window if sliding_window and sliding_window < max_length_q else None
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
        back = -1 if window is None else window - 1
        out: Any = varlen_attn(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(back, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[None], None
    cuts = cu_seq_lens_q.diff().tolist()
    rows = zip(*(part.split(cuts, dim=2) for part in (query, key, value)), strict=True)
    pieces = [_attention(q, k, v, dropout, scaling, window) for q, k, v in rows]
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention over one row, shape (1, heads, n, d)."""
    mask = None
    if window is not None:
        places = torch.arange(query.shape[2], device=query.device)
        back = places[:, None] - places[None, :]
        mask = (back >= 0) & (back < window)
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def register() -> None:
    """Makes `packed_attention` known to transformers by `NAME`; without a mask function."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def _probe(model: Any) -> list[Row]:
    """Two short rows of different lengths, all labels but the first's taken."""
    entries = model.get_input_embeddings().num_embeddings
    rows = []
    for start, length in ((3, 5), (11, 9)):
        tokens = (torch.arange(length) * 7 + start) % entries
        labels = tokens.clone()
        labels[0] = IGNORED
        rows.append(Row(tokens, labels))
    return rows


def _states(model: Any, arguments: dict[str, Any]) -> States:
    """States of a forward pass in evaluation mode, no gradient."""
    device = model.device
    moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    with torch.no_grad():
        states: States = model(**moved, reader=lambda states: states)
    return states


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results are the same up to rounding in their type."""
    loose = {torch.float64: 1e-9, torch.float32: 1e-4}.get(one.dtype, 3e-2)
    if one.shape != other.shape:
        return False
    scale = float(other.float().abs().max()) + 1e-12
    return float((one.float() - other.float()).abs().max()) <= loose * scale


def choose(model: Any) -> str | None:
    """Switches a model to packed attention where that gives the same states as row by row.

    Args:
        model: With `objectives.read_tokens`; it may be wrapped by peft.

    Returns:
        None if it was switched, else why it was left as it is.
    """
    register()
    before = model.config._attn_implementation
    training = model.training
    rows = _probe(model)
    model.eval()
    try:
        alone = torch.cat([_states(model, padded([row], 0)).hidden for row in rows])
        try:
            model.set_attn_implementation(NAME)
            together = _states(model, packed(rows)).hidden
            if _agree(together, alone):
                return None
            reason = "its rows see each other when packed"
        except (ValueError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())
        model.set_attn_implementation(before)
        return reason
    finally:
        model.train(training)


def check_head(model: Any) -> None:
    """Compares the log-probabilities of `token_scores` with those of the model's own logits.

    Raises:
        ValueError: if they differ: the model does something to its logits that is not known here.
    """
    from siftline.training.objectives import token_scores

    training = model.training
    model.eval()
    row = _probe(model)[1]
    arguments = {k: v.to(model.device) for k, v in padded([row], 0).items()}
    with torch.no_grad():
        scores: torch.Tensor = model(**arguments, reader=token_scores).logprobs
        arguments.pop("labels")
        logits = model(**arguments).logits[0, -len(row.tokens) : -1].float().log_softmax(dim=1)
    model.train(training)
    own = logits.gather(1, row.tokens[1:, None].to(logits.device))[:, 0]
    if not _agree(scores.to(logits.dtype), own):
        raise ValueError(
            f"{type(model).__name__} changes its logits in a way that training does not know: "
            f"log-probabilities differ by {float((scores - own).abs().max()):.3g}"
        )

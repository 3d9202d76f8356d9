"""Tokenizers made from text on the spot: one token a character, or byte-level BPE.

Both carry <pad>, <eos> and <bos> and the default chat template, so a model saved with them is a
complete model directory. One token a character suits models of a few million parameters that do
arithmetic: digits stay apart and almost no parameter goes into an embedding table. BPE keeps digits
apart as well, and writes any text.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

SPECIALS = ("<pad>", "<eos>", "<bos>")
UNKNOWN = "<unk>"
BYTES = 256
CORE = " \n.,:;?!'\"()+-*/=%$#0123456789"
"""Characters always known, so that a model whose corpus lacks one can still be asked with it."""


def _wrap(backend: Any, context: int, unknown: str | None = None) -> Any:
    """A transformers tokenizer around `backend`, with the template and no post-processing."""
    from transformers import PreTrainedTokenizerFast

    from siftline.scoring.templates import QUESTION_ANSWER

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token=unknown,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = QUESTION_ANSWER
    return tokenizer


def char_tokenizer(texts: Sequence[str], vocab: int, context: int) -> Any:
    """One token a character; the rarest characters beyond `vocab` become <unk>.

    Args:
        texts: The corpus.
        vocab: Most tokens, specials included.
        context: Most tokens of a row, recorded as `model_max_length`.

    Returns:
        A PreTrainedTokenizerFast; the same for the same multiset of characters.

    Raises:
        ValueError: if `vocab` can't hold the specials and `CORE`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    specials = (*SPECIALS, UNKNOWN)
    room = vocab - len(specials)
    if room < len(CORE):
        raise ValueError(
            f"vocab is {vocab}: one token a character needs {len(specials) + len(CORE)}"
        )
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    frequent = sorted(set(counts) - set(CORE), key=lambda c: (-counts[c], c))[: room - len(CORE)]
    pieces = [*specials, *sorted({*CORE, *frequent})]
    # BPE without merges is the model that splits into characters by itself, no regular expression.
    model = models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token=UNKNOWN)
    backend = Tokenizer(model)
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in specials])
    return _wrap(backend, context, UNKNOWN)


def bpe_tokenizer(texts: Sequence[str], vocab: int, context: int) -> Any:
    """Byte-level BPE learned from `texts`, with single digits.

    Args:
        texts: The corpus.
        vocab: Most tokens, specials and the 256 bytes included.
        context: Most tokens of a row, recorded as `model_max_length`.

    Raises:
        ValueError: if `vocab` can't hold the specials and the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab < BYTES + len(SPECIALS):
        raise ValueError(f"vocab is {vocab}: byte-level BPE needs {BYTES + len(SPECIALS)} or more")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Ties between pairs are settled by the order of first sight: sorted, input order has no say.
    backend.train_from_iterator(sorted(texts), trainer=trainer)
    return _wrap(backend, context)

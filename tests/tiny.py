"""Makes tiny random models on the spot, so that no test needs a download.

The tokenizer is byte-level without merges: every text is representable, one token a byte, so
`tokenizer.encode(text)` has `len(text.encode())` tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPECIALS = ("<pad>", "<eos>", "<bos>")


def make_tokenizer(
    *, bos: bool = False, merges: Sequence[tuple[str, str]] = (), template: str | None = None
) -> Any:
    """A byte-level fast tokenizer with <pad>, <eos> and, if asked, <bos>.

    `merges` are pairs of already known tokens in byte-level spelling (a space is "Ġ").
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIALS, *alphabet, *("".join(pair) for pair in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>" if bos else None,
        model_max_length=2048,
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    bos: bool = False,
    template: str | None = None,
    merges: Sequence[tuple[str, str]] = (),
) -> Path:
    """Writes a seeded random Llama of about 50,000 parameters with its tokenizer to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(bos=bos, merges=merges, template=template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,  # the usual 0.02 gives nearly uniform predictions: nothing to test
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""The least number of tokens of a text: never above the true one, and near enough to be of use."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.engines.batching import least_tokens, longest_token
from siftline.scoring.spans import UnscorableRow, encode, prompt_tokens, response_span
from siftline.training.pretrain import bpe_tokenizer, char_tokenizer

LONG = "a very long token of its own"
WORDS = ["the answer is 42 because six times seven makes forty two " * 3, "    ", "aaaa " * 20]


def wrapped(backend, **special):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **special)


def made(model, normalizer=None, pre=None, added=()):
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre is not None:
        backend.pre_tokenizer = pre
    backend.add_tokens([AddedToken(text, **how) for text, how in added])
    return wrapped(backend)


@pytest.fixture(scope="module")
def known(tiny):
    """Tokenizers with a bound, of the kinds in use."""
    from tokenizers import models, normalizers, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_vocab = {x: i for i, x in enumerate([*letters, "Ġ" * 2, "Ġ" * 4, "aa", "aaaa"])}
    merges = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("a", "a"), ("aa", "aa")]
    fallback = [f"<0x{i:02X}>" for i in range(256)] + ["▁", "a", "▁▁", "aa"]
    fall_vocab = {x: i for i, x in enumerate(fallback)}
    space = normalizers.Replace(" ", "▁")
    return {
        "tiny": tiny.make_tokenizer(merges=[("a", "b"), ("ab", "c")]),
        "letters": char_tokenizer(WORDS, 60, 100),
        "bpe": bpe_tokenizer(WORDS, 400, 100),
        "qwen": made(
            models.BPE(vocab=byte_vocab, merges=merges), normalizers.NFC(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ),
        "llama 2": made(
            models.BPE(
                vocab=fall_vocab, merges=[("▁", "▁"), ("a", "a")], byte_fallback=True, fuse_unk=True
            ),
            normalizers.Sequence([normalizers.Prepend("▁"), space]),
        ),
        "added": made(
            models.BPE(vocab=byte_vocab, merges=merges), None,
            pre_tokenizers.ByteLevel(add_prefix_space=False), [(LONG, {})],
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def unknown():
    """Tokenizers of which nothing can be proved: a long text may be one token, or none."""
    from tokenizers import models, normalizers, pre_tokenizers

    letters = {x: i for i, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    few = {"<unk>": 0, "a": 1, "b": 2}
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "fused": made(models.BPE(vocab=few, merges=[], unk_token="<unk>", fuse_unk=True)),
        "dropped": made(models.BPE(vocab=few, merges=[])),
        "words": made(models.WordLevel(few, unk_token="<unk>")),
        "pieces": made(models.WordPiece(few, unk_token="<unk>"), None, pre_tokenizers.Whitespace()),
        "unigram": made(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
        "stripped": made(models.BPE(vocab=letters, merges=[]), normalizers.Strip(), level),
        "rules": made(
            models.BPE(vocab=letters, merges=[]), normalizers.Replace("aaaaaaaa", "a"), level
        ),
        "split": made(
            models.BPE(vocab=letters, merges=[]), None,
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), level]),
        ),
        "space eater": made(
            models.BPE(vocab=letters, merges=[]), None, level, [("<x>", {"rstrip": True})]
        ),
        "bytes missing": made(models.BPE(vocab={"a": 0}, merges=[]), None, level),
    }  # fmt: skip


TEXTS = st.lists(
    st.sampled_from(["a", "aaaa", " ", "    ", "abc", "é", "e\u0301", "ᾂ",
                     "\u03b1\u0313\u0300\u0345",
                     "漢", "🙂", "\u1112\u1161\u11ab", "\x00", LONG,
                     "<eos>", "\ufb01", "\u00ad", "\u200d"]) | st.text(max_size=5),
    max_size=40,
).map("".join)  # fmt: skip


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_no_text_has_fewer_tokens_than_it_is_said_to_have_at_least(known, text):
    for name, tokenizer in known.items():
        assert longest_token(tokenizer) is not None, name
        assert least_tokens(tokenizer, text) <= len(encode(tokenizer, text)), name


def test_nothing_is_said_where_a_long_text_may_be_few_tokens(unknown):
    long = {
        "fused": "z" * 999, "dropped": "z" * 999, "words": "z" * 999, "pieces": "z" * 999,
        "unigram": "z" * 999, "stripped": " " * 999, "rules": "a" * 9999, "split": " " * 999,
        "space eater": "<x>" + " " * 999, "bytes missing": "z" * 999,
    }  # fmt: skip
    for name, tokenizer in unknown.items():
        most = max(map(len, tokenizer.get_vocab()))
        short = len(encode(tokenizer, long[name])) < len(long[name]) / most
        assert short, f"{name} would be sound"
        assert longest_token(tokenizer) is None, name


def test_a_token_that_is_added_later_counts(tiny):
    tokenizer = tiny.make_tokenizer()
    assert longest_token(tokenizer) == len("<pad>")
    tokenizer.add_tokens(["x" * 40])
    assert longest_token(tokenizer) == 40
    assert least_tokens(tokenizer, "x" * 400) == len(encode(tokenizer, "x" * 400)) == 10


def test_a_prompt_of_megabytes_is_refused_before_it_is_tokenised(tokenizer):
    class Watched:
        def __init__(self, inner):
            self.inner, self.longest = inner, 0

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __len__(self):
            return len(self.inner)

        def __call__(self, text, **options):
            self.longest = max(self.longest, len(text))
            return self.inner(text, **options)

    watched = Watched(tokenizer)
    huge = "word" * 1_500_000
    rows = [
        [{"role": "user", "content": huge}, {"role": "assistant", "content": "yes"}],
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": huge}],
        [{"role": "assistant", "content": huge}],
    ]
    start = time.process_time()
    for messages in rows:
        with pytest.raises(UnscorableRow, match=r"too_long: [\d,]+ characters, above 2048 tokens"):
            response_span(watched, messages, max_length=2048)
    with pytest.raises(UnscorableRow, match="too_long"):
        prompt_tokens(watched, rows[0], max_length=2048)
    assert watched.longest == 0
    assert time.process_time() - start < 10
    # Space behind the last turn belongs to no turn, however much there is.
    tokens, _ = response_span(
        watched, [*rows[0][1:], {"role": "user", "content": "?"}, rows[0][1]],
        "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
        "{{ ' ' * 99999 if messages[-1].role == 'assistant' }}", max_length=2048,
    )  # fmt: skip
    assert len(tokens) < 20


def test_a_row_at_the_limit_is_measured_in_tokens(tokenizer):
    for size in (1990, 2000, 2100):
        row = [{"role": "assistant", "content": "x" * size}]
        whole, _ = response_span(tokenizer, row)
        if len(whole) <= 2048:
            assert response_span(tokenizer, row, max_length=2048)[0] == whole
        else:
            with pytest.raises(UnscorableRow, match=f"too_long: {len(whole)} tokens"):
                response_span(tokenizer, row, max_length=2048)

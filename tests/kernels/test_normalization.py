"""Normal forms are Python's, but for runs of marks that no script writes."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.kernels.text.normalization import JOINER, LONGEST_RUN, SHORT, normalized

MARKS = st.sampled_from("\u0301\u0316\u0344\u0f71\u0f73\u3099\uff9e\U0001d165a ")


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_texts_come_out_as_pythons(form):
    @given(st.text(max_size=30), st.integers(1, 3))
    @settings(max_examples=50, deadline=None)
    def check(text, times):
        long = (text + " e\u0301" + "\u0316\u0301" * 12 + " ") * times * (SHORT // 20)
        assert normalized(form, long) == unicodedata.normalize(form, long)

    check()


@settings(max_examples=50, deadline=None)
@given(st.lists(MARKS, min_size=1, max_size=8).map("".join))
def test_no_run_of_marks_is_long_and_nothing_else_is_added(unit):
    text = "a" + unit * (2 * SHORT // len(unit)) + "b"
    found = normalized("NFKC", text)
    run = longest = 0
    for character in unicodedata.normalize("NFKD", found):
        run = run + 1 if unicodedata.combining(character) else 0
        longest = max(longest, run)
    assert longest <= 3 * LONGEST_RUN  # one character may be three marks
    plain = unicodedata.normalize("NFKC", text)
    assert sorted(unicodedata.normalize("NFKD", found.replace(JOINER, ""))) == sorted(
        unicodedata.normalize("NFKD", plain)
    )
    assert normalized("NFKC", unit) == unicodedata.normalize("NFKC", unit)

"""Unicode normalisation in time that is linear in the text, whatever the text.

Python sorts each run of combining marks by insertion, so a hundred thousand alternating accents
take ten seconds, and four times as many sixteen times as long. Unicode's stream-safe form (UAX #15,
section 13) ends such runs: behind thirty marks stands U+034F, which joins nothing and shows
nothing. No script writes so many, so texts that are texts come out as Python's.
"""

import re
import unicodedata
from functools import cache
from typing import Literal

LONGEST_RUN = 30
"""Marks in a row that stay as they are: UAX #15's number."""
SHORT = 1000
"""Characters of a text that may be anything: sorting them all takes a millisecond."""
JOINER = "\u034f"
_LAST_MARK = 0x1F000


def normalized(form: Literal["NFC", "NFKC"], text: str) -> str:
    """A text in a normal form; runs of more than `LONGEST_RUN` combining marks are parted."""
    if len(text) > SHORT and not text.isascii():
        text = _long_run().sub(rf"\g<0>{JOINER}", text)
    return unicodedata.normalize(form, text)


@cache
def _long_run() -> re.Pattern[str]:
    """As many marks, or characters that fall apart into marks, as may stand together."""
    marks, last = [], -2
    for code in range(0x300, _LAST_MARK):
        if unicodedata.combining(unicodedata.normalize("NFKD", chr(code))[0]):
            if code != last + 1:
                marks.append([code, code])
            marks[-1][1] = last = code
    ranges = "".join(f"{chr(first)}-{chr(end)}" for first, end in marks)
    return re.compile(f"[{ranges}]{{{LONGEST_RUN}}}(?=[{ranges}])")

"""Text reduced to what duplicate and overlap tests compare: plain strings in, plain strings out.

Three reductions, each as strict as its use allows. `plain` keeps punctuation, because "3 + 4" and
"3 * 4" differ in nothing else. `words` drops it, because a leaked test question is still leaked
when its commas change. `numbers` keeps only the quantities in order, so that two instances of one
word problem template are told apart however similar the words around the numbers are.
"""

import re

from siftline.kernels.normalization import normalized

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# Scripts written without spaces: each character is a word, or a whole sentence would be one.
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W_{_IDEOGRAPHS}]+")
_QUANTITY = re.compile(r"([-+*/^<>=≤≥]+ ?)?(\d+(?:,\d{3})*(?:\.\d+)?)( ?%)?|[^\W\d_]+")
_OPERATORS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00d7": "*", "\u00f7": "/"})
_NUMBER_WORDS = frozenset(
    (  # noqa: SIM905, forty lines as a list
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy "
        "eighty ninety hundred thousand million billion half quarter third dozen twice double "
        "triple thrice"
    ).split()
)


def plain(text: str) -> str:
    """Folds compatibility forms (NFKC), case and runs of white space; keeps punctuation."""
    return " ".join(normalized("NFKC", text).casefold().split())


def words(text: str) -> str:
    """The words of `text` joined by single spaces: NFKC, case folded, punctuation dropped.

    Numbers stay as words. Han and kana characters count as one word each.
    """
    return " ".join(_WORD.findall(normalized("NFKC", text).casefold()))


def numbers(plain_text: str) -> tuple[str, ...]:
    """The quantities of a text in order, as written but without thousands separators.

    A quantity is a number with the operator before it and the percent sign after it ("-4", "*3",
    "20%"), or an English number word ("three", "half", "twice"). Number words of other languages
    are not known, nor are operators between letters.

    Args:
        plain_text: Output of `plain`.
    """
    found = []
    for match in _QUANTITY.finditer(plain_text.translate(_OPERATORS)):
        operator, number, percent = match.groups()
        if number is not None:
            sign = operator.rstrip() if operator else ""
            found.append(sign + number.replace(",", "") + ("%" if percent else ""))
        elif match[0] in _NUMBER_WORDS:
            found.append(match[0])
    return tuple(found)

r"""LaTeX of an answer, as text: its shell, and what math-verify's grammar can't read as written.

math-verify gets an answer as it is written, but for `NORMALISATIONS`: one table, each line with
the public case that asks for it. None changes a value; a property test says so of each. What is
not in the table is not touched: rewriting LaTeX by patterns is how `\frac{1+i}{2}` once became
`1+i/2`.

Whatever the grammar would read as something else is named in `MISREAD`, and is not read at all.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from siftline.scoring.answers.quantities import JOINING, NOT_UNITS, SCALES

_SPACE = r"(?:\\[,;:! ]|~|\s|\\q?quad(?![A-Za-z]))"


def shell(text: str) -> str:
    r"""An answer without what stands around it: math and bold marks, spaces, a full stop.

    `$18$ dollars` is `18 dollars`, `$18` stays: a dollar sign opens a formula only where another
    closes it, with no space inside of the two and no digit behind.
    """
    text = text.strip()
    text = re.sub(r"\$\$(.+?)\$\$", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"(?<!\\)\$(?=\S)([^$]*?[^$\s\\])\$(?!\d)", r"\1", text)
    text = re.sub(r"\\\((.*?)\\\)|\\\[(.*?)\\\]", _inside, text, flags=re.DOTALL)
    text = re.sub(r"\*\*(?=\S)([^*]+?)\*\*|__(?=\S)([^_]+?)__", _inside, text)
    text = re.sub(
        r"\\begin\{(equation|align|gather)\*?\}|\\end\{(equation|align|gather)\*?\}", "", text
    )
    text = re.sub(r"^\\(?:displaystyle|textstyle)\s*", "", text.strip().strip("*`"))
    return re.sub(r"(?:(?<![.\s])[.,;:]|\\{1,2}[,;:! ]?)+\s*$", "", text.rstrip()).strip()


def _inside(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None)


@dataclass(frozen=True)
class Normalisation:
    r"""One thing that math-verify's grammar does not read, or reads as something else.

    Attributes:
        name: What it is.
        written: An example.
        rewritten: What the example becomes.
        case: The public case that asks for it.
        apply: Rewrites a text.
    """

    name: str
    written: str
    rewritten: str
    case: str
    apply: Callable[[str], str]


def _sub(*pairs: tuple[str, str | Callable[[re.Match[str]], str]]) -> Callable[[str], str]:
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in pairs]

    def apply(text: str) -> str:
        for pattern, replacement in compiled:
            text = pattern.sub(replacement, text)
        return text

    return apply


_SIGNS: dict[str, str | int | None] = {
    "\u2212": "-", "\u2013": "-", "\u2010": "-", "\u2011": "-", "\u00d7": "\\times ",
    "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u2217": "\\cdot ", "\u00f7": "\\div ",
    "\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ", "\u221e": "\\infty ",
    "\u03c0": "\\pi ", "\u222a": "\\cup ", "\u2229": "\\cap ", "\u2208": "\\in ",
    "\u00b0": "^\\circ ", "\u2205": "\\emptyset ", "\u00b1": "\\pm ", "\u2213": "\\mp ",
    "\u211d": "\\mathbb{R}", "\u03b8": "\\theta ", "\u03b1": "\\alpha ", "\u03b2": "\\beta ",
    "\u03bb": "\\lambda ", "\u2044": "/", "\u00bd": "\\frac{1}{2}", "\u00bc": "\\frac{1}{4}",
    "\u00be": "\\frac{3}{4}", "\u2153": "\\frac{1}{3}", "\u2154": "\\frac{2}{3}",
    "\u2248": "\\approx ", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
}  # fmt: skip
_SIGN_TABLE = str.maketrans(_SIGNS)
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a",
                        "0123456789-+")  # fmt: skip
_LOWERED = str.maketrans("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089",
                         "0123456789")  # fmt: skip


def _unicode(text: str) -> str:
    text = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+",
                  lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)  # fmt: skip
    text = re.sub("[\u2080-\u2089]+", lambda m: f"_{{{m[0].translate(_LOWERED)}}}", text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|π)", r"\\sqrt{\1}", text)
    text = re.sub(r"√\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    return text.translate(_SIGN_TABLE)


_STYLE = (
    r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf|normal)|mbox|operatorname\*?|boldsymbol|bm)"
)
_JOINT = re.compile(rf"{_STYLE}\s*\{{\s*,?\s*(and|or)\s*\}}")
_STYLED = re.compile(rf"{_STYLE}\s*\{{\s*([^A-Za-z{{}}\\]+|[A-Za-z]|sin|cos|tan|log|ln)\s*\}}")


def _styles(text: str) -> str:
    text = re.sub(r"(?<!\\)\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits)(?![A-Za-z])",
                  " ", text)  # fmt: skip
    text = _JOINT.sub(r" \1 ", text)

    def bare(match: re.Match[str]) -> str:
        word = match[1].strip()
        if word in ("i", "j", "k") and re.match(r"\\(?:mathbf|bm|boldsymbol|textbf)", match[0]):
            return match[0]  # a vector
        return f"\\{word} " if word in ("sin", "cos", "tan", "log", "ln") else f" {word} "

    return _STYLED.sub(bare, text)


def _spaces(text: str) -> str:
    """Thin and other spaces; the break between rows, two backslashes, stays."""
    text = re.sub(r"(?<!\\)((?:\\\\)*)\\!\s*", r"\1", text)

    def space(match: re.Match[str]) -> str:
        return match[0] if match[0] == "\\\\" else " "

    return re.sub(r"\\\\|\\[,;:> ]|~|\\q?quad(?![A-Za-z])|\\hspace\*?\{[^{}]*\}", space, text)


_FENCE = re.compile(
    r"\\(?:left|right|middle)\s*(\.)|\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*"
)


def _group(text: str, place: int) -> int:
    """Where the group in braces that begins at a place ends."""
    depth = 0
    for end in range(place, len(text)):
        if text[end] in "{}" and text[end - 1 : end] != "\\":
            depth += 1 if text[end] == "{" else -1
            if not depth:
                return end + 1
    return len(text)


def _argument(text: str, place: int) -> int:
    """Where the TeX argument that begins at a place ends: a group, a command, or one character."""
    if place >= len(text):
        return place
    if text[place] == "{":
        return _group(text, place)
    if text[place] == "\\":
        command = re.compile(r"\\([A-Za-z]+|.)\s*").match(text, place)
        if command is None:
            return len(text)
        end = command.end()
        if command[1] in ("sqrt", "frac", "dfrac", "tfrac", "binom", "overline"):
            if command[1] == "sqrt" and text[end : end + 1] == "[":
                end = text.find("]", end) + 1 or len(text)
            for _ in range(1 if command[1] in ("sqrt", "overline") else 2):
                end = _argument(text, _blank(text, end))
            return end
        return place + len(command[1]) + 1
    return place + 1


def _blank(text: str, place: int) -> int:
    while place < len(text) and text[place] == " ":
        place += 1
    return place


def _arguments(text: str) -> str:
    r"""Braces around arguments that TeX takes without: \frac12, \frac{22}7, \sqrt2, x^\frac12."""
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\[dt]binom(?![A-Za-z])", r"\\binom", text)
    out, place = [], 0
    for match in re.finditer(
        r"\\(frac|binom|sqrt)(?![A-Za-z])\s*|\^\s*(?=[-+]?[\\\d(A-Za-z])", text
    ):
        if match.start() < place:
            continue
        out.append(text[place : match.start()])
        place = match.end()
        if match[1] is None:
            piece, place = _power(text, place)
            out.append(piece)
            continue
        out.append(f"\\{match[1]}")
        if match[1] == "sqrt" and text[place : place + 1] == "[":
            end = text.find("]", place) + 1 or len(text)
            out.append(text[place:end])
            place = _blank(text, end)
        for _ in range(1 if match[1] == "sqrt" else 2):
            place = _blank(text, place)
            if match[1] == "sqrt" and text[place : place + 1] == "(":
                end = _bracket(text, place)  # \sqrt(2), no LaTeX, and what is meant is plain
            else:
                end = _argument(text, place)
            out.append(f"{{{_arguments(_inner(text[place:end]))}}}")
            place = end
    out.append(text[place:])
    return "".join(out)


def _inner(argument: str) -> str:
    argument = argument.strip()
    outer = argument[:1] + argument[-1:]
    return argument[1:-1] if outer in ("{}", "()") and len(argument) > 1 else argument


def _bracket(text: str, place: int) -> int:
    depth = 0
    for end in range(place, len(text)):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        if not depth:
            return end + 1
    return len(text)


def _power(text: str, place: int) -> tuple[str, int]:
    r"""An exponent in braces: ^-3, ^(2/3), ^\frac12; a number without braces is taken whole."""
    whole = re.compile(r"[-+]?\d+|[-+][A-Za-z]").match(text, place)
    if whole:
        return f"^{{{whole[0]}}}", whole.end()
    end = _bracket(text, place) if text[place] == "(" else _argument(text, place)
    if text[place : place + 5] in ("\\circ", "\\prim") or text[place : place + 4] == "\\deg":
        return f"^{{{text[place:end]}}}", end
    return f"^{{{_arguments(_inner(text[place:end]))}}}", end


def _repeating(match: re.Match[str]) -> str:
    whole, fixed = match["whole"] or "0", match["fixed"] or ""
    cycle = match["bar"] or match["dots"] or match["round"]
    cycle = re.sub(r"\D", "", cycle)
    scale = 10 ** len(fixed)
    value = Fraction(int(whole + fixed), scale)
    value += Fraction(int(cycle), scale * (10 ** len(cycle) - 1))
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


_REPEATING = (
    r"(?<![\d.])(?P<whole>\d*)\.(?P<fixed>\d*)(?:\\(?:overline|bar|dot)\s*\{?(?P<bar>\d+)\}?"
    r"(?!\d*\\dot)|(?P<dots>\\dot\{?\d\}?\d*\\dot\{?\d\}?)|\((?P<round>\d{1,9})\)(?![\d(]))"
)


def _based(match: re.Match[str]) -> str:
    base = int(match["base"])
    try:
        return str(int(match["digits"], base)) if 2 <= base <= 36 else match[0]
    except ValueError:
        return match[0]


DEGREES = r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|\\deg(?![A-Za-z])"
_TRIG = r"\\(?:sin|cos|tan|cot|sec|csc)(?:\s*\^\s*\{?\d\}?)?"


def _degrees(text: str) -> str:
    """Degrees inside of a function are an angle in radians."""
    angle = r"(\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\})"
    angle += rf"\s*(?:{DEGREES})\s*"
    shut = rf"({_TRIG})\s*(?:\(\s*{angle}\)|\{{\s*{angle}\}}|{angle})"
    return re.sub(
        shut, lambda m: f"{m[1]}(\\frac{{\\pi \\cdot {m[2] or m[3] or m[4]}}}{{180}})", text
    )


_NAMED_UNIT = (
    r"(?:(?:square|sq|cubic|cu)[. ]+)?(?:units?|meters?|metres?|centimeters?|centimetres?|feet|foot"
    r"|inch(?:es)?|miles?|kilometers?|kilometres?|yards?|degrees?|dollars?|cents?|hours?|minutes?"
    r"|seconds?|days?|weeks?|months?|years?|grams?|kilograms?|liters?|litres?|gallons?|pounds?"
    r"|ounces?|cm|mm|km|kg|ft|mph|radians?)"
)
_TEXT_UNIT = r"\\(?:text(?:bf|it|rm)?|mathrm|mbox|operatorname)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
_UNIT_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
_UNIT = (
    rf"(?:\\[dt]?frac\{{\s*{_TEXT_UNIT}\s*\}}\{{\s*{_TEXT_UNIT}\s*\}}|{_TEXT_UNIT}{_UNIT_POWER})"
)
_UNIT_TAIL = re.compile(
    rf"(?P<value>.*?[\w}})\]!]){_SPACE}*(?P<unit>{_UNIT}"
    rf"(?:(?:{_SPACE}|\\cdot|\\times|/|\\%)*{_UNIT})*)\.?",
    re.DOTALL,
)
_WORD_TAIL = re.compile(
    rf"(?P<value>.*?[\d}})\]!A-Za-z])\s+{_NAMED_UNIT}{_UNIT_POWER}(?:\s+(?:per|/)\s+{_NAMED_UNIT})?",
    re.DOTALL,
)
_LETTER_UNITS = frozenset(
    ["m", "g", "s", "h", "L", "l", "C", "F", "J", "N", "V", "W", "A", "K", "H"]
)


def _is_unit(words: str) -> bool:
    """Whether words in a text command are a unit: they change no value and are no variable."""
    words = re.sub(r"\\[,;:! ]|\\cdot|\\times|~|\^|[{}]", " ", words).strip()
    names = re.findall(r"[^\s/.\-]+", words)
    if not names or not re.fullmatch(
        r"[A-Za-z\u00b5\u03a9\u00b0$\u20ac\u00a3 ./\-\u00b7^0-9]+", words
    ):
        return False
    if len(words) == 1:
        return words in _LETTER_UNITS
    lowered = {name.lower() for name in names}
    return not lowered & (NOT_UNITS - JOINING | set(SCALES) | {"and", "or", "if", "odd", "even"})


def without_unit(text: str) -> str:
    """An expression without the unit behind it; the expression itself is not looked into."""
    match = _UNIT_TAIL.fullmatch(text)
    if match and all(map(_is_unit, re.findall(_TEXT_UNIT, match["unit"]))):
        return match["value"].strip()
    match = _WORD_TAIL.fullmatch(text)
    return match["value"].strip() if match else text


NORMALISATIONS = (
    Normalisation("signs of Unicode", "2√5·π", r"2\sqrt{5}\cdot \pi ", "Math-Verify issue 76",
                  _unicode),
    Normalisation("braces around a comma", "32{,}349", "32,349", "MATH, answer 10{,}080",
                  _sub((r"\{\s*,\s*\}", ","))),
    Normalisation("spaces", r"32,\! 349", "32,349", r"MATH, answer 10,\!080", _spaces),
    Normalisation("digits in groups by a space", "12 345", "12345", r"MATH, answer 1\,000",
                  _sub((r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d,])",
                        lambda m: m[0].replace(" ", "")))),
    Normalisation("fonts around numbers, letters, and, or", r"\text{13}", " 13 ",
                  "Math-Verify issue 37", _styles),
    Normalisation("sizes of brackets", r"\left( 3, 4 \right)", "( 3, 4 )", "Math-Verify issue 56",
                  lambda text: _FENCE.sub("", text)),
    Normalisation("other names", r"x \leqslant 3", r"x \le 3", "AMC answers at AoPS",
                  _sub((r"\\leqslant(?![A-Za-z])|\\leq(?![A-Za-z])|<=", r"\\le"),
                       (r"\\geqslant(?![A-Za-z])|\\geq(?![A-Za-z])|>=", r"\\ge"),
                       (r"\\lt(?![A-Za-z])", "<"), (r"\\gt(?![A-Za-z])", ">"),
                       (r"\\neq(?![A-Za-z])", r"\\ne"),
                       (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
                       (r"\\l?angle(?=.*\\rangle)|\\langle", "("), (r"\\rangle", ")"),
                       (r"\\[lr]vert(?![A-Za-z])", "|"), (r"\\imath(?![A-Za-z])", "i"),
                       (r"\\colon(?![A-Za-z])", ":"), (r"\*\*", "^"))),
    Normalisation("numbers in groups of two", "10,00,000", "1000000", "Indian examination papers",
                  _sub((r"(?<![\d,.])\d{1,2}(?:,\d\d)+,\d{3}(?![\d,])",
                        lambda m: m[0].replace(",", "")))),
    Normalisation("powers of ten", "2.5e-3", r"2.5\cdot 10^{-3}", "lm-evaluation-harness outputs",
                  _sub((r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,4})(?![\w.])",
                        r"\1\\cdot 10^{\2}"))),
    Normalisation("names without a backslash", "2*sqrt(3)", r"2*\sqrt(3)", "Math-Verify issue 41",
                  _sub((r"(?<![A-Za-z\\{])(sqrt|pi|sin|cos|tan|log|ln)(?![A-Za-z}])", r"\\\1"))),
    Normalisation("arguments without braces", r"\frac{22}7", r"\frac{22}{7}",
                  r"MATH, answers \frac{22}7, \sqrt2; Math-Verify issue 41", _arguments),
    Normalisation("repeating decimals", r"0.\overline{3}", r"\frac{1}{3}",
                  r"MATH, answer 0.\overline{14}", _sub((_REPEATING, _repeating))),
    Normalisation("mixed numbers", r"2\frac{1}{2}", r"(2+\frac{1}{2})", "Math-Verify issues 3, 34",
                  _sub((r"(?<![\w}).^\\])(\d+)\s*(\\frac\{\d+\}\{\d+\})(?!\s*\^)", r"(\1+\2)"),
                       (r"(?<![\w}).^\\/])(\d+) (\d+)\s*/\s*(\d+)(?![\w(^])",
                        r"(\1+\\frac{\2}{\3})"))),
    Normalisation("numbers in another base", "1010_{2}", "10", "MATH, answer 2516_8",
                  _sub((r"(?<![\w.\\}])(?P<digits>[0-9A-F]*\d[0-9A-F]*|[A-F]{2,}(?=_\{?1[1-6]))_\{?(?P<base>\d{1,2})\}?"
                        r"(?![\d\w^])", _based))),
    Normalisation("a number times a bracket", "3(4)", r"3\cdot (4)", "Math-Verify reads 3(4) as 7",
                  _sub((r"(?<![\w\\^.])((?:\d+\.)?\d+)\s*\(", r"\1\\cdot ("),
                       (r"\)\s*(?=\d|\()", r")\\cdot "))),
    Normalisation("degrees inside a function", r"\cos(60^\circ)", r"\cos(\frac{\pi \cdot 60}{180})",
                  r"MATH, answers in \cos 60^\circ", _degrees),
)  # fmt: skip
"""In this order: a later one sees what an earlier one wrote."""

MISREAD = re.compile(
    r"\\(?:p?mod|bmod|equiv|[lc]?dots|vdots|mid|forall|exists|implies|Rightarrow|iff|to|mapsto"
    r"|parallel|perp|sim|cong|angle|triangle|overset|underset|prime|Gamma|gamma|begin\{cases\}"
    r"|overline|text(?:bf|it|rm)?|mathrm|mbox)(?![A-Za-z])"
    r"|\.\.\.|\u2026|['\u2032]|(?<![_^\d.])\d[\d.]*\s+\d|[?@#&]\s*$"
    r"|\\\{\s*\(?[A-Za-z][^:|{}]*[:|]|[CAP]_\{?\d+\}?\s*\^"
)
"""What the grammar reads as something else, or drops: an answer with it is not read."""


def normalise(text: str) -> str:
    """An answer's LaTeX as math-verify gets it."""
    for line in NORMALISATIONS:
        text = line.apply(text)
    return " ".join(text.split())

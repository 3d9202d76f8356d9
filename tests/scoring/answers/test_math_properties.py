"""What holds for all expressions: rewriting changes no verdict, regrouping always does."""

from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
import sympy
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from siftline.scoring.answers.latex import MISREAD, NORMALISATIONS, normalise, without_unit
from siftline.scoring.answers.value_equality import Decimals, compare, same
from siftline.scoring.answers.values import Unreadable, read

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
LETTERS = {name: sympy.Symbol(name, real=True) for name in "xyab"}
QUIET = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

# Expressions as trees: ("int", 3), ("sym", "x"), or an operator with its operands.
leaves = st.one_of(
    st.tuples(st.just("int"), st.integers(1, 9)), st.tuples(st.just("sym"), st.sampled_from("xyab"))
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(st.just("add"), inner, inner),
        st.tuples(st.just("sub"), inner, inner),
        st.tuples(st.just("mul"), inner, inner),
        st.tuples(st.just("frac"), inner, inner),
        st.tuples(st.just("pow"), inner, st.tuples(st.just("int"), st.integers(2, 3))),
        st.tuples(st.just("sqrt"), inner),
    ),
    max_leaves=6,
)


def value(tree):
    """The tree's value by SymPy, which the reader under test has no part in."""
    kind, *parts = tree
    if kind == "int":
        return sympy.Integer(parts[0])
    if kind == "sym":
        return LETTERS[parts[0]]
    a, *b = map(value, parts)
    return {
        "add": lambda: a + b[0],
        "sub": lambda: a - b[0],
        "mul": lambda: a * b[0],
        "frac": lambda: a / b[0],
        "pow": lambda: a ** b[0],
        "sqrt": lambda: sympy.sqrt(a),
    }[kind]()


def written(tree, dice):
    """The tree as LaTeX, in one of the ways that people write it."""
    kind, *parts = tree
    if kind in ("int", "sym"):
        return str(parts[0])
    a, *rest = (written(part, dice) for part in parts)
    b = rest[0] if rest else ""
    fence = dice.choice([("(", ")"), ("\\left(", "\\right)"), ("\\big(", "\\big)"), ("{(", ")}")])

    def group(text, part):
        return text if part[0] in ("int", "sym") else f"{fence[0]}{text}{fence[1]}"

    if kind == "add":
        return f"{a} + {b}"
    if kind == "sub":
        minus = dice.choice(["-", "\u2212"])
        return f"{a} {minus} {group(b, parts[1])}"
    if kind == "mul":
        sign = dice.choice(["\\cdot ", "\\times ", " \\cdot "])
        glued = parts[0][0] == "int" and parts[1][0] in ("sym", "sqrt")
        return (
            group(a, parts[0]) + (dice.choice([sign, ""]) if glued else sign) + group(b, parts[1])
        )
    if kind == "frac":
        short = all(len(text) == 1 and text.isdigit() for text in (a, b))
        if short and dice.random() < 0.5:
            return f"\\frac{a}{b}"
        command = dice.choice(["\\frac", "\\dfrac", "\\tfrac"])
        slash = f"({a})/({b})"
        return dice.choice([f"{command}{{{a}}}{{{b}}}", f"{{{slash}}}"])
    if kind == "pow":
        space = dice.choice(["", " "])
        return f"{{{group(a, parts[0])}}}^{space}{{{b}}}"
    return dice.choice([f"\\sqrt{{{a}}}", f"\\sqrt {{{a}}}"])


def regrouped(tree):
    """Trees with one operand moved into, or out of, its neighbour's bracket."""
    kind, *parts = tree
    if kind in ("int", "sym"):
        return
    for place, part in enumerate(parts):
        for other in regrouped(part):
            yield (kind, *parts[:place], other, *parts[place + 1 :])
    if kind in ("frac", "sqrt", "pow", "mul") and parts[0][0] in ("add", "sub"):
        inner, a, b = parts[0]
        yield (inner, a, (kind, b, *parts[1:]))
    if kind == "frac" and parts[1][0] in ("add", "sub"):
        inner, a, b = parts[1]
        yield (inner, (kind, parts[0], a), b)
    if kind == "frac" and parts[1][0] == "mul":
        _, a, b = parts[1]
        yield ("mul", ("frac", parts[0], a), b)


def differ(first, second):
    """Whether two values differ at a point, by SymPy alone."""
    at = dict(
        zip(LETTERS.values(), map(sympy.Rational, ("7/3", "11/5", "13/4", "17/6")), strict=True)
    )
    numbers = [sympy.N(v.subs(at), 30) for v in (first, second)]
    if not all(n.is_finite and n.is_real for n in numbers):
        return None
    return bool(abs(numbers[0] - numbers[1]) > 1e-9 * max(map(abs, numbers)))


def sound(found):
    return found.is_finite is not False and not found.has(sympy.zoo, sympy.nan, sympy.I)


@QUIET
@given(trees, st.integers(0, 2**32))
def test_two_ways_to_write_one_expression_are_equal(tree, seed):
    assume(sound(value(tree)))
    dice = Random(seed)
    first, second = (normalise(written(tree, dice)) for _ in range(2))
    assert compare(first, second) is True


@QUIET
@given(trees, st.integers(0, 2**32))
def test_the_reader_gives_the_value_that_was_written(tree, seed):
    assume(sound(value(tree)))
    found = read(normalise(written(tree, Random(seed))))
    assert same(value(tree), found, Decimals()) is True


@QUIET
@given(trees, st.integers(0, 2**32))
def test_what_sympy_rewrites_stays_equal(tree, seed):
    exact = value(tree)
    assume(sound(exact))
    rewrite = Random(seed).choice([sympy.expand, sympy.factor, sympy.together, sympy.cancel])
    try:
        other = sympy.latex(rewrite(exact))
    except (sympy.PolynomialError, ZeroDivisionError):
        assume(False)
    assume(not differ(exact, rewrite(exact)))
    # Roots of squares and the like are equal where letters are positive, and then it is open.
    assert compare(normalise(written(tree, Random(seed))), normalise(other)) is not False


@QUIET
@given(trees, st.integers(0, 2**32))
def test_an_expression_with_a_bracket_moved_never_matches(tree, seed):
    others = list(regrouped(tree))
    assume(others)
    dice = Random(seed)
    other = dice.choice(others)
    assume(sound(value(tree)))
    assume(sound(value(other)))
    assume(differ(value(tree), value(other)))
    assert compare(normalise(written(tree, dice)), normalise(written(other, dice))) is False


@QUIET
@given(st.fractions(min_value=Fraction(-(10**6)), max_value=10**6, max_denominator=10**4),
       st.integers(1, 9), st.integers(-40, 40))  # fmt: skip
def test_numbers_are_exact_at_every_size(number, step, power):
    scale = Fraction(10) ** power
    first, near = number * scale, number * scale + step * scale / 10**12
    forms = [f"\\frac{{{v.numerator}}}{{{v.denominator}}}" for v in (first, near)]
    assert compare(forms[0], forms[0]) is True
    assert compare(*forms) is False


@QUIET
@given(st.integers(1, 10**6), st.integers(3, 7), st.integers(-3, 3))
def test_a_reference_is_rounded_to_the_digits_that_it_shows(top, places, off):
    number = Fraction(top, 7 * 9 * 11 * 13)
    assume(10**60 % number.denominator)
    shown = f"{float(number):.{places}f}"
    moved = Fraction(shown) + Fraction(off, 10**places)
    assume(moved > 0)
    reference = f"{moved.numerator * 10**places // moved.denominator / 10**places:.{places}f}"
    assume(Fraction(reference) == moved)
    distance = abs(number - moved) * 10**places
    answer = f"\\frac{{{number.numerator}}}{{{number.denominator}}}"
    found = compare(reference, answer)
    assert found is True if distance <= Fraction(1, 2) else found is not True
    assert distance < 1 or found is False
    assert compare(answer, reference) is False  # the answer is what may not be rounded


digits = st.integers(1, 9)
numbers = st.integers(10**3, 10**7)


def groups(number, mark):
    return f"{number:,}".replace(",", mark)


def in_twos(number):
    head, tail = str(number)[:-3], str(number)[-3:]
    pieces = []
    while head:
        head, piece = head[:-2], head[-2:]
        pieces.insert(0, piece)
    return ",".join([*pieces, tail])


def to_base(number, base):
    out = ""
    while number:
        number, digit = divmod(number, base)
        out = str(digit) + out
    return out


def cycle(whole, fixed, repeated):
    scale = 10 ** len(fixed)
    exact = Fraction(int(f"{whole}{fixed}"), scale)
    return exact + Fraction(int(repeated), scale * (10 ** len(repeated) - 1))


rational = lambda v: sympy.Rational(v.numerator, v.denominator)  # noqa: E731
digit_texts = st.text("0123456789", max_size=3)
cycles = st.text("0123456789", min_size=1, max_size=4)
# By the name of its line in the table: something it is for, and its value by SymPy.
WRITTEN = {
    "signs of Unicode": st.tuples(digits, digits).map(
        lambda p: (f"{p[0]}√{p[1]} \u2212 π·{p[0]}²", p[0] * (sympy.sqrt(p[1]) - sympy.pi * p[0]))
    ),
    "braces around a comma": numbers.map(lambda n: (groups(n, "{,}"), sympy.Integer(n))),
    "spaces": st.tuples(numbers, st.sampled_from([",\\!", "\\,", "\\ ", "~", ",\\! "])).map(
        lambda p: (groups(*p), sympy.Integer(p[0]))
    ),
    "digits in groups by a space": numbers.map(lambda n: (groups(n, " "), sympy.Integer(n))),
    "fonts around numbers, letters, and, or": st.tuples(
        digits, st.sampled_from(["text", "mathrm", "mathbf", "textbf", "mbox"])
    ).map(lambda p: (f"\\{p[1]}{{{p[0]}}}+\\{p[1]}{{x}}", p[0] + LETTERS["x"])),
    "sizes of brackets": st.tuples(
        digits, st.sampled_from([("\\left", "\\right"), ("\\big", "\\big"), ("\\Bigl", "\\Bigr")])
    ).map(lambda p: (f"2{p[1][0]}(x+{p[0]}{p[1][1]})", 2 * (LETTERS["x"] + p[0]))),
    "other names": digits.map(lambda n: (f"\\lvert x \\rvert + {n}**2", abs(LETTERS["x"]) + n**2)),
    "numbers in groups of two": st.integers(10**5, 10**9).map(
        lambda n: (in_twos(n), sympy.Integer(n))
    ),
    "powers of ten": st.tuples(digits, digits, st.integers(-30, 30)).map(
        lambda p: (f"{p[0]}.{p[1]}e{p[2]}", rational(Fraction(f"{p[0]}.{p[1]}e{p[2]}")))
    ),
    "names without a backslash": st.tuples(digits, digits).map(
        lambda p: (f"{p[0]}*sqrt({p[1]}) + pi/{p[0]}", p[0] * sympy.sqrt(p[1]) + sympy.pi / p[0])
    ),
    "arguments without braces": st.tuples(
        digits, digits, st.sampled_from(["\\frac{0}{1}", "\\frac{{{0}}}{1}", "\\frac{0}{{{1}}}",
                                         "\\sqrt{0}^{1}", "x^{0}", "x^-{0}", "x^\\frac{0}{1}"])
    ).map(
        lambda p: (p[2].format(*p[:2]), {
            "\\frac{0}{1}": sympy.Rational(p[0], p[1]),
            "\\frac{{{0}}}{1}": sympy.Rational(p[0], p[1]),
            "\\frac{0}{{{1}}}": sympy.Rational(p[0], p[1]),
            "\\sqrt{0}^{1}": sympy.sqrt(p[0]) ** p[1],
            "x^{0}": LETTERS["x"] ** p[0],
            "x^-{0}": LETTERS["x"] ** -p[0],
            "x^\\frac{0}{1}": LETTERS["x"] ** sympy.Rational(p[0], p[1]),
        }[p[2]])
    ),
    "repeating decimals": st.tuples(
        st.integers(0, 99), digit_texts, cycles, st.sampled_from(["\\overline{%s}", "(%s)"])
    ).map(lambda p: (f"{p[0]}.{p[1]}" + p[3] % p[2], rational(cycle(*p[:3])))),
    "mixed numbers": st.tuples(digits, digits, digits).map(
        lambda p: (f"-{p[0]}\\frac{{{p[1]}}}{{{p[2]}}}", -(p[0] + sympy.Rational(p[1], p[2])))
    ),
    "numbers in another base": st.tuples(st.integers(1, 999), st.integers(2, 9)).map(
        lambda p: (f"{to_base(*p)}_{{{p[1]}}}", sympy.Integer(p[0]))
    ),
    "a number times a bracket": st.tuples(digits, digits).map(
        lambda p: (f"{p[0]}({p[1]})({p[0]})", sympy.Integer(p[0] ** 2 * p[1]))
    ),
    "degrees inside a function": st.tuples(
        st.integers(1, 89), st.sampled_from(["\\cos({0}^\\circ)", "\\cos {0}^{{\\circ}}",
                                             "\\cos({0}\\degree)", "\\cos {0}°"])
    ).map(lambda p: (p[1].format(p[0]), sympy.cos(sympy.pi * p[0] / 180))),
}  # fmt: skip


def test_every_line_of_the_table_is_proven():
    assert set(WRITTEN) == {line.name for line in NORMALISATIONS}
    for line in NORMALISATIONS:
        assert line.apply(line.written) == line.rewritten
        assert line.case


@pytest.mark.parametrize("name", WRITTEN)
def test_a_line_of_the_table_changes_no_value(name):
    """What it is for has its value behind it; and it leaves other expressions as they were."""
    line = next(line for line in NORMALISATIONS if line.name == name)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(WRITTEN[name], trees, st.integers(0, 2**32))
    def holds(pair, tree, seed):
        text, exact = pair
        assert same(exact, read(normalise(text)), Decimals()) is True
        other = written(tree, Random(seed))
        assume(sound(value(tree)))
        assert same(value(tree), read(normalise(line.apply(other))), Decimals()) is True

    holds()


UNITS = [
    "\\text{ cm}", "\\text{ cm}^2", "\\ \\text{units}", "\\,\\mathrm{m/s}", " square meters",
    "\\text{ kg}\\cdot\\text{m}^{-2}", "\\text{ hours}",
]  # fmt: skip


@QUIET
@given(trees, st.integers(0, 2**32), st.sampled_from(UNITS))
def test_a_unit_goes_and_the_expression_stays(tree, seed, unit):
    text = written(tree, Random(seed))
    assert without_unit(text + unit) == text.strip()
    assert without_unit(text) == text


@pytest.mark.parametrize(
    "text",
    ["3 \\pmod{5}", "f'(x)", "1, 2, \\ldots, n", "\\{x \\mid x>3\\}", "0.333...", "3 4", "C_5^2",
     "5\\text{ or so many}", "\\text{if } x", "x_{\\text{max}}", "\\overline{AB}", "\\frac{1}{"],
)  # fmt: skip
def test_what_the_grammar_misreads_is_not_read(text):
    with pytest.raises(Unreadable):
        read(normalise(text))
    assert MISREAD.search(text) or text == "\\frac{1}{"


@pytest.fixture
def pairs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import verdict_pairs

    return verdict_pairs.pairs


def refused(made, ours, theirs):
    """False matches that math-verify refuses, and its right matches that we refuse."""
    false, lost, matched = [], [], 0
    for pair in made:
        our, their = ours(pair), theirs(pair)
        false += [pair] if our and not pair.equal and not their else []
        lost += [pair] if their and pair.equal and not our else []
        matched += their
        assert our is None or our == pair.equal or their == our, pair
    return false, lost, matched


def judged(pair):
    from siftline.scoring.answers.equality import judge

    def ask(reference, answer):
        try:
            return compare(reference, answer)
        except Unreadable:
            return None

    return judge(pair.given, pair.wanted, ask).equal


def math_verify(pair):
    from math_verify import parse, verify

    return bool(verify(parse(f"${pair.wanted}$"), parse(f"\\boxed{{{pair.given}}}")))


def test_beside_math_verify(pairs):
    made = list(pairs(3, seed=1))
    false, lost, matched = refused(made, judged, math_verify)
    assert (false, lost) == ([], [])
    assert matched > len(made) / 4


@pytest.mark.slow
def test_beside_math_verify_on_all_pairs(pairs):
    made = list(pairs(50, seed=2))
    assert len(made) >= 1000
    false, lost, matched = refused(made, judged, math_verify)
    assert false == []
    assert len(lost) <= matched / 100, lost

"""Pairs of answers whose equality is known by how they were made.

SymPy makes an expression and rewrites it; what is equal, is so by construction. What differs was
changed: a number, a sign, a bracket that moved. Nothing here knows of math-verify or of siftline.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import sympy
from sympy import Rational, latex, sqrt
from sympy.abc import n, t, x, y


@dataclass(frozen=True)
class Pair:
    """Two answers and the truth about them.

    Attributes:
        kind: What was done; a key of `KINDS`.
        given: The answer.
        wanted: The reference.
        equal: Whether they are equal.
    """

    kind: str
    given: str
    wanted: str
    equal: bool


Made = tuple[str, str, bool]


def _small(dice: Random, least: int = 1, most: int = 12) -> int:
    return dice.randint(least, most)


def _other(dice: Random, value: int) -> int:
    return value + dice.choice([-2, -1, 1, 2])


def _fractions(dice: Random) -> Made:
    top, bottom, by = _small(dice, 1, 40), _small(dice, 2, 12), _small(dice, 2, 5)
    value = Rational(top, bottom)
    forms = [
        f"\\frac{{{by * top}}}{{{by * bottom}}}", f"{top}/{bottom}", latex(value),
        f"\\dfrac{{{top}}}{{{bottom}}}", f"\\tfrac{{{top}}}{{{bottom}}}",
    ]  # fmt: skip
    if value > 1 and value.q > 1:
        forms.append(f"{value.p // value.q}\\frac{{{value.p % value.q}}}{{{value.q}}}")
    if 10**6 % value.q == 0:
        forms.append(str(sympy.N(value, 8)).rstrip("0").rstrip("."))
    equal = dice.random() < 0.6
    wrong = Rational(_other(dice, top) or 3, bottom)
    return dice.choice(forms), latex(value if equal else wrong), equal or wrong == value


def _bare_arguments(dice: Random) -> Made:
    top, bottom = _small(dice, 1, 9), _small(dice, 2, 9)
    given = dice.choice(
        [f"\\frac{top}{bottom}", f"\\frac{{{top}}}{bottom}", f"\\frac{top}{{{bottom}}}"]
    )
    equal = dice.random() < 0.6
    wrong = Rational(top, bottom + 1)
    return given, latex(Rational(top, bottom) if equal else wrong), equal


def _radicals(dice: Random) -> Made:
    outer, inner = _small(dice, 2, 9), dice.choice([2, 3, 5, 6, 7, 10])
    equal = dice.random() < 0.6
    under = outer**2 * inner if equal else outer * inner
    forms = [f"{outer}\\sqrt{{{inner}}}", f"{outer}\\sqrt{inner}" if inner < 10 else "",
             f"\\frac{{{outer * inner}}}{{\\sqrt{{{inner}}}}}"]  # fmt: skip
    return dice.choice([f for f in forms if f]), f"\\sqrt{{{under}}}", equal


def _pi(dice: Random) -> Made:
    top, bottom = _small(dice, 1, 11), _small(dice, 2, 9)
    forms = [f"\\frac{{{top}\\pi}}{{{bottom}}}", f"\\frac{{{top}}}{{{bottom}}}\\pi",
             f"{top}\\pi/{bottom}", f"\\frac{{\\pi}}{{{bottom}}}\\cdot {top}"]  # fmt: skip
    given, wanted = dice.sample(forms, 2)
    if dice.random() < 0.6:
        return given, wanted, True
    return given, f"\\frac{{{top}}}{{{bottom}\\pi}}", False


def _polynomial(dice: Random) -> sympy.Expr:
    roots = [dice.randint(-6, 6) for _ in range(dice.choice([2, 2, 3]))]
    return sympy.Mul(_small(dice, 1, 4), *(x - root for root in roots))


def _polynomials(dice: Random) -> Made:
    value = _polynomial(dice)
    given, wanted = latex(value), latex(sympy.expand(value))
    if dice.random() < 0.6:
        return (given, wanted, True) if dice.random() < 0.5 else (wanted, given, True)
    wrong = sympy.expand(value) + dice.choice([-1, 1, x, -x, 2])
    return given, latex(wrong), False


def _rational_functions(dice: Random) -> Made:
    a, b, c = dice.randint(1, 6), dice.randint(-5, -1), dice.randint(1, 5)
    value = a / (x - b) + c / (x + b - 1)
    given = latex(sympy.apart(value))
    if dice.random() < 0.6:
        return given, latex(sympy.together(value)), True
    return given, latex(sympy.together(value + dice.choice([1, 1 / x, x]))), False


def _regrouped(dice: Random) -> Made:
    a, b, c = (dice.choice("xyabcn") for _ in range(3))
    k = _small(dice, 2, 9)
    together, apart = dice.choice(
        [
            (f"\\frac{{{a}+{k}}}{{{c}}}", f"{a}+\\frac{{{k}}}{{{c}}}"),
            (f"\\frac{{{k}}}{{{a}+{k + 1}}}", f"\\frac{{{k}}}{{{a}}}+{k + 1}"),
            (f"\\sqrt{{{a}+{k}}}", f"\\sqrt{{{a}}}+{k}"),
            (f"{k}^{{{a}+1}}", f"{k}^{a}+1"),
            (f"\\frac{{{k}}}{{{k + 1}{b}}}", f"\\frac{{{k}}}{{{k + 1}}}{b}"),
            (f"\\frac{{{k}+\\sqrt{{{k + 1}}}}}{{2}}", f"{k}+\\frac{{\\sqrt{{{k + 1}}}}}{{2}}"),
            (f"({a}+{k}){b}", f"{a}+{k}{b}"),
            (f"{k}({a}-1)", f"{k}{a}-1"),
        ]
    )
    if dice.random() < 0.3:
        return together, together.replace("+", " + "), True
    given, wanted = dice.sample([together, apart], 2)
    return given, wanted, False


def _identities(dice: Random) -> Made:
    k = _small(dice, 1, 5)
    given, wanted = dice.choice(
        [
            (f"\\sin^2({k}x)+\\cos^2({k}x)", "1"),
            (f"2\\sin({k}x)\\cos({k}x)", f"\\sin({2 * k}x)"),
            (f"\\cos^2({k}x)-\\sin^2({k}x)", f"\\cos({2 * k}x)"),
            (f"\\sec^2({k}y)", f"\\tan^2({k}y)+1"),
            (f"e^{{{k}x}}e^{{x}}", f"e^{{{k + 1}x}}"),
            (f"\\ln({2**k})", f"{k}\\ln 2"),
            (f"2^{{n+{k}}}", f"{2**k}\\cdot 2^n"),
            (f"\\frac{{n(n+{k})}}{{2}}", f"\\frac{{n^2+{k}n}}{{2}}"),
        ]
    )
    if dice.random() < 0.6:
        return given, wanted, True
    return given, f"{wanted}+{k}", False


def _complex(dice: Random) -> Made:
    a, b = dice.randint(-9, 9) or 1, dice.randint(2, 9)
    forms = [f"{a}+{b}i", f"{b}i+{a}" if a > 0 else f"{b}i{a}", f"{a} + {b} i"]
    given, wanted = dice.sample(forms, 2)
    if dice.random() < 0.6:
        return given, wanted, True
    return given, dice.choice([f"{a}-{b}i", f"{a}+{b + 1}i"]), False


def _tuples(dice: Random) -> Made:
    values = [dice.randint(-9, 9) for _ in range(dice.choice([2, 3]))]
    given = f"({', '.join(map(str, values))})"
    if dice.random() < 0.6:
        return given, f"\\left({','.join(map(str, values))}\\right)", True
    wrong = [*values[:-1], values[-1] + 1]
    return given, f"({', '.join(map(str, wrong))})", False


def _sets(dice: Random) -> Made:
    values = dice.sample(range(-12, 13), dice.choice([2, 3, 4]))
    given = f"\\{{{', '.join(map(str, values))}\\}}"
    dice.shuffle(values)
    equal = dice.random() < 0.6
    values = values if equal else [*values[:-1], 40]
    return given, f"\\{{{', '.join(map(str, values))}\\}}", equal


def _lists(dice: Random) -> Made:
    a, b = dice.sample(range(1, 20), 2)
    given = dice.choice([f"{a}, {b}", f"x={a}, x={b}", f"{a} \\text{{ and }} {b}",
                         f"x={a} \\text{{ or }} x={b}"])  # fmt: skip
    equal = dice.random() < 0.6
    return given, f"{b}, {a}" if equal else f"{b}, {a + b}", equal


def _plus_minus(dice: Random) -> Made:
    a, b = _small(dice, 1, 9), dice.choice([2, 3, 5, 7])
    equal = dice.random() < 0.6
    wrong = a if equal else a + 1
    return f"{a} \\pm \\sqrt{{{b}}}", f"{wrong}+\\sqrt{{{b}}}, {a}-\\sqrt{{{b}}}", equal


def _intervals(dice: Random) -> Made:
    a = dice.randint(-9, 5)
    b = a + _small(dice)
    opened, closed = dice.random() < 0.5, dice.random() < 0.5
    left, right = "(" if opened else "[", ")" if closed else "]"
    interval = f"{left}{a}, {b}{right}"
    signs = {True: "<", False: "\\le"}
    chain = f"{a} {signs[opened]} x {signs[closed]} {b}"
    other = ("[" if opened else "(") + f"{a}, {b}{right}"
    equal = dice.random() < 0.6
    if not equal:
        return chain, other, False
    return (*dice.sample([interval, chain], 2), True)  # type: ignore[return-value]


def _rays(dice: Random) -> Made:
    a = dice.randint(-9, 9)
    sign, interval, other = dice.choice(
        [("<", f"(-\\infty, {a})", f"(-\\infty, {a}]"), (">", f"({a}, \\infty)", f"[{a}, \\infty)"),
         ("\\le", f"(-\\infty, {a}]", f"(-\\infty, {a})"),
         ("\\geq", f"[{a}, \\infty)", f"({a}, \\infty)")]
    )  # fmt: skip
    relation = f"x {sign} {a}"
    if dice.random() < 0.6:
        return (*dice.sample([relation, interval], 2), True)  # type: ignore[return-value]
    return relation, other, False


def _matrices(dice: Random) -> Made:
    rows = [[dice.randint(-9, 9) for _ in range(2)] for _ in range(2)]

    def written(kind: str, values: list[list[int]]) -> str:
        body = " \\\\ ".join(" & ".join(map(str, row)) for row in values)
        return f"\\begin{{{kind}}} {body} \\end{{{kind}}}"

    given = written("pmatrix", rows)
    if dice.random() < 0.6:
        return given, written(dice.choice(["pmatrix", "bmatrix"]), rows).replace(" & ", "&"), True
    return given, written("pmatrix", [rows[0], [rows[1][0], rows[1][1] + 1]]), False


def _equations(dice: Random) -> Made:
    a, b, c, by = _small(dice), _small(dice), _small(dice), _small(dice, 2, 4)
    given = f"{a}x+{b}y={c}"
    if dice.random() < 0.6:
        return given, f"{by * a}x+{by * b}y-{by * c}=0", True
    return given, f"{by * a}x+{by * b}y={by * c + 1}", False


def _assignments(dice: Random) -> Made:
    value = _small(dice, 2, 99)
    equal = dice.random() < 0.6
    name = dice.choice(["x", "n", "y", "k"])
    given, wanted = f"{name} = {value}", str(value if equal else value + 1)
    return (given, wanted, equal) if dice.random() < 0.5 else (wanted, given, equal)


def _big_numbers(dice: Random) -> Made:
    value = dice.randint(1000, 99_999_999)
    commas = f"{value:,}"
    given = dice.choice([commas, commas.replace(",", "{,}"), commas.replace(",", "\\,"),
                         commas.replace(",", ",\\!")])  # fmt: skip
    equal = dice.random() < 0.6
    return given, str(value if equal else value + 1), equal


def _powers_of_ten(dice: Random) -> Made:
    head, power = dice.randint(11, 99), dice.randint(-30, 20)
    given = f"{head / 10}\\times 10^{{{power}}}"
    if dice.random() < 0.6:
        return given, f"{head}\\cdot 10^{{{power - 1}}}", True
    return given, f"{head / 10}\\times 10^{{{power - 1}}}", False


def _tiny(dice: Random) -> Made:
    power = dice.randint(40, 90)
    if dice.random() < 0.5:
        return f"\\frac{{1}}{{2^{{{power}}}}}", f"2^{{-{power}}}", True
    return f"2^{{-{power}}}", f"2^{{-{power + 1}}}", False


def _rounded_answers(dice: Random) -> Made:
    value = dice.choice([sympy.pi, sqrt(2), sqrt(3), Rational(1, 3), Rational(2, 7), sympy.E])
    digits = str(sympy.N(value, 9))
    return digits, latex(value), False


def _factorials(dice: Random) -> Made:
    k = _small(dice, 3, 8)
    given, value = dice.choice(
        [(f"{k}!", sympy.factorial(k)), (f"\\binom{{{k}}}{{2}}", sympy.binomial(k, 2)),
         (f"\\frac{{{k}!}}{{{k - 2}!}}", k * (k - 1))]
    )  # fmt: skip
    equal = dice.random() < 0.6
    return given, str(value if equal else k), bool(equal or value == k)


def _percents(dice: Random) -> Made:
    value = _small(dice, 1, 99)
    equal = dice.random() < 0.6
    wanted = dice.choice([f"{value}\\%", f"{value / 100}", str(value)])
    return f"{value}\\%", wanted if equal else f"{value + 1}\\%", equal


def _units(dice: Random) -> Made:
    value = _small(dice, 2, 50)
    unit = dice.choice(["\\text{ cm}", "\\text{ cm}^2", "\\text{ meters}", "\\ \\text{units}",
                        "\\,\\mathrm{kg}"])  # fmt: skip
    number = dice.choice([str(value), f"{value}\\pi", f"{value}\\sqrt{{3}}"])
    equal = dice.random() < 0.6
    return number + unit, number if equal else f"{number}+1", equal


def _degrees(dice: Random) -> Made:
    value = 5 * _small(dice, 1, 35)
    equal = dice.random() < 0.6
    given = dice.choice([f"{value}^\\circ", f"{value}^{{\\circ}}"])
    return given, str(value if equal else value + 5), equal


def _logarithms(dice: Random) -> Made:
    base, power = _small(dice, 2, 5), _small(dice, 2, 6)
    equal = dice.random() < 0.6
    return f"\\log_{{{base}}} {base**power}", str(power if equal else power + 1), equal


def _calculus(dice: Random) -> Made:
    value = sympy.diff(_polynomial(dice) * dice.choice([sympy.exp(t), sympy.sin(t), t**2]), x)
    if dice.random() < 0.6:
        return latex(sympy.expand(value)), latex(sympy.factor(value)), True
    return latex(sympy.expand(value + y)), latex(value), False


def _functions_of_n(dice: Random) -> Made:
    k = _small(dice, 1, 6)
    value = n * (n + k) * (2 * n + 1) / 6
    if dice.random() < 0.6:
        return latex(value), latex(sympy.expand(value)), True
    return latex(value), latex(sympy.expand(value + Rational(1, 6))), False


KINDS: dict[str, Callable[[Random], Made]] = {
    "fractions": _fractions,
    "arguments without braces": _bare_arguments,
    "radicals": _radicals,
    "multiples of pi": _pi,
    "polynomials": _polynomials,
    "rational functions": _rational_functions,
    "regrouped": _regrouped,
    "identities": _identities,
    "complex numbers": _complex,
    "tuples": _tuples,
    "sets": _sets,
    "lists": _lists,
    "plus or minus": _plus_minus,
    "intervals and chains": _intervals,
    "rays and relations": _rays,
    "matrices": _matrices,
    "equations": _equations,
    "assignments": _assignments,
    "numbers with separators": _big_numbers,
    "powers of ten": _powers_of_ten,
    "tiny numbers": _tiny,
    "rounded answers": _rounded_answers,
    "factorials": _factorials,
    "percents": _percents,
    "units": _units,
    "degrees": _degrees,
    "logarithms": _logarithms,
    "derivatives": _calculus,
    "sums over n": _functions_of_n,
}
"""How each kind of pair is made."""


def pairs(each: int, seed: int = 0) -> Iterator[Pair]:
    """`each` pairs of every kind, the same for the same seed."""
    for kind, make in KINDS.items():
        dice = Random(f"{seed} {kind}")
        for _ in range(each):
            yield Pair(kind, *make(dice))

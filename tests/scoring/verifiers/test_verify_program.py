# ruff: noqa: E501 (responses stand on one line each)
"""Which code of a response is its program, what only shows its use, and what nobody can tell."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.answers.reasoning import Block, blocks
from siftline.scoring.verifiers import get_verifier
from siftline.scoring.verifiers.code import program_of
from siftline.scoring.verifiers.sandbox import Limits, Sandbox, waited

CASES = Path(__file__).parents[2] / "cases" / "code" / "rows.jsonl"
DEF = "def f(x):\n    return x + 1\n"
TESTS = "assert f(1) == 2\nassert f(-1) == 0"


@pytest.fixture(scope="module")
def code():
    try:
        return get_verifier("code")
    except ValueError as error:
        pytest.skip(str(error))


def fence(text, language="python", ticks="```"):
    return f"{ticks}{language}\n{text}\n{ticks}\n"


WANT = {"numpy": None, "indented-fence": True, "usage-block": True, "control": True}


def test_the_cases(code):
    rows = [json.loads(line) for line in CASES.read_text().splitlines()]
    assert {row["id"]: code(row["response"], row["tests"]).correct for row in rows} == WANT


RIGHT = {
    "tildes": fence(DEF, ticks="~~~"),
    "four ticks": fence(DEF, ticks="````"),
    "upper case": fence(DEF, "Python"),
    "attributes": fence(DEF, "python title='f.py'"),
    "text behind": fence(DEF) + "\nThis adds one. `f(1)` is 2.",
    "reasoning": "<think>\n" + fence("def f(x):\n    return x") + "</think>\n" + fence(DEF),
    "reasoning with an open fence": "<think>\n```python\ndef f(x): return 0\n</think>\n" + fence(DEF),
    "a list": "1. Define it:\n   ```python\n   def f(x):\n       return x + 1\n   ```\n2. Done.",
    "a list with four spaces": "- It:\n\n    ```python\n    def f(x):\n        return x + 1\n    ```",
    "four spaces and no list": "It:\n\n    ```python\n    def f(x):\n        return x + 1\n    ```",
    "a list item that is a fence": "- ```python\n  def f(x):\n      return x + 1\n  ```\n",
    "a nested list": "1. a\n   - b\n\n     ~~~py\n     def f(x):\n         return x + 1\n     ~~~\n",
    "a quotation": "> ```python\n> def f(x):\n>     return x + 1\n> ```\n",
    "tabs": "1.\tIt:\n\n\t```python\n\tdef f(x):\n\t    return x + 1\n\t```\n",
    "no fence": DEF,
    "no fence but prose": f"Here is the function:\n\n{DEF}\nIt adds one.",
    "no fence, imports first": f"import math\n\n{DEF}",
    "an unnamed fence": fence(DEF, ""),
    "an unnamed fence and its output": fence(DEF, "") + "prints\n" + fence("2", ""),
    "other languages too": fence("pip install x", "bash") + fence(DEF) + fence("2", "text"),
    "usage that prints": fence(DEF) + fence("for i in range(3):\n    print(f(i))"),
    "usage that asks": fence(DEF) + fence("n = int(input('n? '))\nprint(f(n))"),
    "usage in the same block": fence(DEF + "\nprint(f(int(input())))\n"),
    "usage that raises": fence(DEF) + fence("f('a')"),
    "usage that exits": fence(DEF + "import sys\nsys.exit(f(1))"),
    "usage with a missing library": fence(DEF) + fence("import numpy as np\nprint(f(np.ones(3)))"),
    "usage that is no Python": fence(DEF) + fence("f(1)  ->  2\n$ python f.py"),
    "usage that never ends": fence(DEF) + fence("while True:\n    f(1)"),
    "usage that prints for ever": fence(DEF) + fence("while True:\n    print('x' * 1000)"),
    "usage behind a main guard": fence(DEF + "if __name__ == '__main__':\n    print(f(input()))"),
    "usage above the definition": fence("pip install numpy") + fence(DEF),
    "own wrong assertion": fence(DEF + "assert f(1) == 3"),
    "own tests": fence(DEF) + fence("import unittest\nfrom f import f\nclass TestF(unittest.TestCase):\n"
                                    "    def test(self):\n        self.assertEqual(f(1), 3)\n"
                                    "unittest.main()"),
    "own pytest": fence(DEF) + fence("import pytest\nfrom my_module import f\n\n"
                                     "def test_f():\n    assert f(1) == 3\ntest_f()"),
    "own test functions": fence(DEF) + fence("def test_f():\n    assert f(1) == 3\ntest_f()"),
    "a transcript behind": fence(DEF) + fence(">>> f(1)\n2\n>>> f('a')\nTraceback"),
    "a transcript behind, unnamed": fence(DEF) + fence(">>> f(1)\n2", ""),
    "a transcript that defines": fence(">>> def f(x):\n...     return x + 1\n...\n>>> f(1)\n2"),
    "a docstring with a transcript": fence("def f(x):\n    '''\n    >>> f(1)\n    3\n    '''\n    return x + 1"),
    "a docstring with a fence": "````python\ndef f(x):\n    '''\n```\nf(1)\n```\n    '''\n    return x + 1\n````",
    "a draft first": fence("def f(x):\n    return x") + "Better:\n" + fence(DEF),
    "a broken draft first": fence("def f(x) return x") + "Better:\n" + fence(DEF),
    "imports in their own block": fence("import math") + fence("def f(x):\n    return math.ceil(x + 1)"),
    "a helper in its own block": fence("def g(x):\n    return x") + fence("def f(x):\n    return g(x) + 1"),
    "a constant in its own block": fence("ONE = 1") + fence("def f(x):\n    return x + ONE"),
    "a class over two blocks": fence("class C:\n    def a(self, x):\n        return x")
    + "and\n" + fence("    def b(self, x):\n        return self.a(x) + 1") + fence("def f(x):\n    return C().b(x)"),
    "a body over two blocks": fence("def f(x):\n    y = x + 1") + "then\n" + fence("    return y"),
    "a class and a function": fence("class C:\n    one = 1") + fence("def f(x):\n    return x + C.one"),
    "future annotations": fence("from __future__ import annotations\ndef f(x: Nope) -> Nope:\n    return x + 1"),
    "usage in front that binds": fence("result = f(1)\nprint(result)") + fence(DEF),
    "an earlier block that raises": fence("class A:\n    x = nothing") + fence(DEF),
    "an unnamed definition and named usage": fence(DEF, "") + fence("print(f(1))"),
    "a definition fenced as text": fence(DEF, "text"),
    "a fence behind words": f"Code: ```python\n{DEF}```\nDone.",
    "words behind the fence": f"```python\n{DEF}``` This adds one to x.\nDone.",
    "a space before the language": f"``` python\n{DEF}```\n",
    "pandoc's attributes": f"```{{.python .numberLines}}\n{DEF}```\n",
    "an empty block behind": fence(DEF) + fence(""),
    "a lambda": fence("f = lambda x: x + 1"),
    "a decorator and a cache": fence("from functools import cache\n@cache\ndef f(x):\n    return x + 1"),
    "a partial": fence("import functools, operator\nf = functools.partial(operator.add, 1)\n# x + 1"),
    "a nested class": fence("class A:\n    class B:\n        @staticmethod\n        def g(x):\n            return x + 1\nf = A.B.g"),
    "an async usage": fence(DEF) + fence("import asyncio\nawait f(1)"),
    "two functions in two blocks": fence("def g(x):\n    return x + 1") + fence("def f(x):\n    return g(x)"),
    "windows line ends": fence(DEF).replace("\n", "\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_is_found(code, name):
    verdict = code(RIGHT[name], TESTS)
    assert verdict.correct is True, verdict


@pytest.mark.parametrize("name", RIGHT)
def test_a_wrong_program_stays_wrong_in_the_same_dress(code, name):
    response = RIGHT[name].replace("x + 1", "x + 2").replace("(x) + 1", "(x) + 2")
    response = response.replace("x + ONE", "x + 2").replace("x + C.one", "x + 2")
    response = response.replace("operator.add, 1", "operator.add, 2")
    verdict = code(response, TESTS)
    assert verdict.correct is False, verdict


OPEN = {
    "a library": (fence("import numpy as np\n" + DEF), "the library numpy is not there"),
    "a part of one": (fence("from sklearn.svm import SVC\n" + DEF), "the library sklearn is not there"),
    "a library in the body": (fence("def f(x):\n    import numpy\n    return numpy.add(x, 1)"), "numpy"),
    "a library that is excused": (
        fence("try:\n    import numpy as np\nexcept ImportError:\n    np = None\n\n"
              "def f(x):\n    return np.add(x, 1)"), "numpy"),
    "a library in its own block": (
        fence("import numpy as np") + fence("def f(x):\n    return np.add(x, 1)"), "numpy"),
    "input": (fence("n = int(input())\ndef f(x):\n    return x + n"), "reads input"),
    "input by sys.stdin": (
        fence("import sys\nn = int(sys.stdin.readline())\ndef f(x):\n    return x + n"), "reads input"),
    "equal to everything": (
        fence("class A:\n    def __eq__(self, other):\n        return True\n"
              "def f(x):\n    return A()"), "own method"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN)
def test_a_failure_that_proves_nothing_is_open(code, name):
    response, why = OPEN[name]
    verdict = code(response, TESTS)
    assert verdict.correct is None
    assert verdict.reason.startswith("unreadable: ")
    assert why in verdict.reason


NONE = {
    "prose": "I would add one.",
    "prose about def": "def f is what you want: it adds\none.",
    "cut": "```python\ndef f(x):\n    return x + 1",
    "in reasoning only": "<think>\n" + fence(DEF) + "</think>\nI can't.",
    "reasoning that never ends": "<think>\n" + fence(DEF),
    "another language": fence("int f(int x) { return x + 1; }", "c"),
    "usage only": "",
}


@pytest.mark.parametrize("name", NONE)
def test_without_a_program_there_is_no_verdict(code, name):
    assert code(NONE[name], TESTS).reason == "no_final_answer"


@pytest.mark.parametrize(
    "response",
    [
        fence("def f(x):\n    return y + 1"),  # a missing name, not a missing library
        fence("from math import plus_one as f"),
        fence("import math.nothing\n" + DEF),
        fence("import os\nf = os.plus_one"),
        fence("def f(x) return x + 1"),
        fence("def g(x):\n    return x + 1"),
        fence(DEF) + fence("def f(x) return x + 1"),  # the last version is broken
        fence("raise ValueError\n" + DEF),
        fence("print(1)"),
    ],
)
def test_what_is_proved_wrong(code, response):
    assert code(response, TESTS).correct is False


SPOOFS = {
    "object": "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "int": "class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A(7)",
    "str": "class A(str):\n    __eq__ = lambda self, other: True\n    __hash__ = str.__hash__\n"
           "def f(x): return A()",
    "inside a list": "class A:\n    def __eq__(self, other): return True\ndef f(x): return [A()]",
    "inside a dict": "class A:\n    def __eq__(self, other): return True\ndef f(x): return {1: A()}",
    "inherited": "class B:\n    def __eq__(self, other): return True\nclass A(B): pass\n"
                 "def f(x): return A()",
    "named as Python's": "class A:\n    def __eq__(self, other): return True\n"
                         "A.__module__ = 'fractions'\nA.__qualname__ = 'Fraction'\n"
                         "def f(x): return A()",
    "by a metaclass": "class M(type):\n    __mro__ = (object,)\n"
                      "class A(metaclass=M):\n    def __eq__(self, other): return True\n"
                      "def f(x): return A()",
}  # fmt: skip


@pytest.mark.parametrize("name", SPOOFS)
def test_an_object_that_equals_everything_proves_nothing(code, name):
    wanted = {"inside a list": "[2]", "inside a dict": "{1: 2}", "str": "'2'"}.get(name, "2")
    for tests in (
        f"assert f(1) == {wanted}",
        f"assert {wanted} == f(1)",
        f"assert not f(1) != {wanted}\nassert f(1) in [{wanted}]",
        f"def check(g):\n    assert g(1) == {wanted}\ncheck(f)",
        f"import unittest\nunittest.TestCase().assertEqual(f(1), {wanted})\nassert True",
    ):
        assert code(fence(SPOOFS[name]), tests).correct is not True, tests


LEGAL = [
    ("class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return self.x == o.x",
     "assert P(1) == P(1)\nassert P(1) != P(2)\nassert [P(1)] == [P(1)]"),
    ("from dataclasses import dataclass\n@dataclass(order=True)\nclass P:\n    x: int",
     "assert P(1) == P(1) and P(1) < P(2) <= P(2)\nassert sorted([P(2), P(1)]) == [P(1), P(2)]"),
    ("from collections import namedtuple\nP = namedtuple('P', 'x y')", "assert P(1, 2) == (1, 2)"),
    ("from enum import IntEnum\nclass C(IntEnum):\n    RED = 1", "assert C.RED == 1\nassert C(1) in (1, 2)"),
    ("from fractions import Fraction\ndef f(): return Fraction(1, 2)", "assert f() == 0.5"),
    ("from decimal import Decimal\ndef f(): return [Decimal('1.5')]", "assert f() == [1.5]"),
    ("from collections import Counter, deque\ndef f(s): return Counter(s), deque(s)",
     "assert f('aab')[0] == {'a': 2, 'b': 1}\nassert list(f('ab')[1]) == ['a', 'b']"),
    ("import datetime\ndef f(): return datetime.date(2020, 1, 1)",
     "import datetime\nassert f() == datetime.date(2020, 1, 1) < datetime.date(2021, 1, 1)"),
    ("class Stack(list):\n    push = list.append", "s = Stack()\ns.push(1)\nassert s == [1]"),
    ("def f(x): return x", "assert 0 <= f(1) < 2 and 'a' not in f('b') and f(None) is None"),
    ("import pathlib\ndef f(): return pathlib.PurePosixPath('a')",
     "import pathlib\nassert f() == pathlib.PurePosixPath('a')"),
]  # fmt: skip


@pytest.mark.parametrize(("program", "tests"), LEGAL)
def test_honest_comparisons_still_match(code, program, tests):
    verdict = code(fence(program), tests)
    assert verdict.correct is True, verdict


def test_fences_inside_lists_and_quotations():
    text = (
        "1. a\n\n   ```py\n   x\n     y\n   ```\n> ```\n> z\n>  w\n> ```\n"
        "10. b\n    ~~~\n    q\n    ~~~\n\n* ```c\n  r\n  ```\n"
    )
    assert blocks(text) == [
        Block("py", "x\n  y\n"), Block("", "z\n w\n"), Block("", "q\n"), Block("c", "r\n"),
    ]  # fmt: skip
    for block in blocks(text):
        assert text[block.start :].lstrip("> *").startswith(("```", "~~~"))
        assert text[: block.end].rstrip().endswith(("```", "~~~"))


lines = st.sampled_from(
    ["```python", "```", "~~~", "def f(x):", "    return x + 1", "f(1)", "a = 1", ">>> f(1)", "", "2",
     "   ```py", "class C:", "    def g(self):", "text", "1. item", "import os", "> ```", "<think>"]
)  # fmt: skip


@given(st.lists(lines, max_size=14).map("\n".join))
def test_any_text_has_a_program_or_none(text):
    found = program_of(text)
    assert found == program_of(text)
    assert found is None or any(part.kind == "program" for part in found.parts)
    assert found is None or {w for p in found.parts for w in p.text.split()} <= set(text.split())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 3), st.sampled_from(["```", "~~~", "`````"]), st.booleans(), st.booleans())
def test_the_same_program_in_any_dress_has_the_same_verdict(code, indent, ticks, listed, right):
    body = DEF if right else DEF.replace("+ 1", "+ 2")
    block = fence(body, "python", ticks)
    margin = " " * (3 if listed else indent)
    text = ("1. So:\n\n" if listed else "So:\n") + "".join(
        f"{margin}{line}\n" for line in block.splitlines()
    )
    assert code(text, TESTS).correct is right


@pytest.mark.parametrize(
    "unit",
    ["```python\na = 1\n```\n", "```python\n  a = 1\n```\n", "```\n", "def f\n", "> > ", ">>> f(1)\n",
     "```python\ndef f(): pass\n```\n", "1. ", "- ", "a.", "a = ", " ", "```python\n"],
)  # fmt: skip
def test_the_cost_of_finding_a_program_grows_with_the_length(unit):
    def seconds(size):
        text = "def f(): pass\n" * (unit == "a.") + unit * (size // len(unit))
        best = 9.0
        for _ in range(3):
            started = time.process_time()
            program_of(text)
            best = min(best, time.process_time() - started)
        return best

    assert seconds(120_000) < 10 * seconds(30_000) + 0.05


@pytest.mark.parametrize(("seconds", "status"), [(0.0, "stopped"), (60.0, "passed")])
def test_time_that_a_run_waited_for_a_processor_does_not_count(code, monkeypatch, seconds, status):
    monkeypatch.setattr("siftline.scoring.verifiers.sandbox.waited", lambda pid: seconds)
    quick = Sandbox(Limits(seconds=5), code.sandbox.isolation)
    quick.limits = Limits(seconds=0.5)
    assert quick.run("import time\ntime.sleep(1)", "assert 1 == 1").status == status


def test_time_that_a_process_waited_for_a_processor_is_known():
    assert waited(0) == 0.0
    assert waited(1) >= 0.0

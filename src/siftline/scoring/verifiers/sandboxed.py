"""The program inside the sandbox: it gives its own rights up, then runs a response and its tests.

Run by path with the standard library alone, behind the walls that `sandbox` puts up; nothing
imports it. It reads the response's code, and, only once that has run, the tests and a secret that
their success is reported with. It leaves by `os._exit`, so nothing that the tested
code registered runs afterwards.
"""

import __future__

import ast
import builtins
import ctypes
import errno
import io
import json
import operator
import os
import platform
import re
import resource
import signal
import struct
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 22, 38, 24
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the table below, and audit architecture."""
_CALLS = {
    "clone": (56, 220), "clone3": (435, 435), "socket": (41, 198), "shmget": (29, 194),
    "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "fanotify_init": (300, 262), "open_by_handle_at": (304, 265), "personality": (135, 92),
    "io_uring_setup": (425, 425), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442),
}  # fmt: skip
"""Numbers of the system calls that are refused, on x86_64 and on aarch64.

Sockets, for AF_VSOCK knows no network namespace. What holds memory that no limit counts: shared
segments, queues, memory files. What gives new rights or a look at other processes. Of clone only
the flags for new namespaces.
"""
_NAMESPACES = 0x7E020080  # every CLONE_NEW… flag


def shed(settings: dict[str, Any]) -> None:
    """Takes away user, groups, capabilities, resources and system calls, for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    if settings["uid"] is not None:
        os.setgroups([])
        os.setresgid(*[settings["uid"]] * 3)
        os.setresuid(*[settings["uid"]] * 3)
    for capability in range(64):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # refused where there is none to drop
    header = struct.pack("=Ii", 0x20080522, 0)
    _must(libc.capset(header, bytes(24)), "capset")
    _must(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    os.umask(0o077)
    for name, (soft, hard) in settings["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))
    program = call_filter(platform.machine())
    buffer = ctypes.create_string_buffer(program)
    filter_ = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _must(libc.prctl(_PR_SET_SECCOMP, 2, filter_, 0, 0), "seccomp")


def _must(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def call_filter(machine: str) -> bytes:
    """A classic BPF program that refuses the calls above and allows the others.

    Raises:
        ValueError: if the machine's system calls are not known here.
    """
    if machine not in _ARCHITECTURES:
        raise ValueError(f"no list of system calls for {machine}: use x86_64 or aarch64")
    column, architecture = _ARCHITECTURES[machine]
    numbers = {name: row[column] for name, row in _CALLS.items()}
    refused = [n for name, n in numbers.items() if name not in ("clone", "clone3")]
    allow, deny = 0x7FFF0000, 0x00050000 | errno.EPERM
    load, equal, above, masked, give = 0x20, 0x15, 0x35, 0x45, 0x06
    code = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (give, 0, 0, deny),
        (load, 0, 0, 0),
        (above, 0, 1, 0x40000000),  # the x32 twins of all calls
        (give, 0, 0, deny),
        (equal, 0, 1, numbers["clone3"]),  # its flags can't be read: the C library takes clone
        (give, 0, 0, 0x00050000 | errno.ENOSYS),
    ]
    for number in refused:
        code += [(equal, 0, 1, number), (give, 0, 0, deny)]
    code += [
        (equal, 0, 3, numbers["clone"]),
        (load, 0, 0, 16),
        (masked, 0, 1, _NAMESPACES),
        (give, 0, 0, deny),
        (give, 0, 0, allow),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def idle(tree: ast.Module) -> bool:
    """Whether tests check nothing when they run: no assertion, or nothing but definitions."""
    checks = any(isinstance(node, ast.Assert | ast.Raise) for node in ast.walk(tree))
    quiet = (
        ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom,
        ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Pass,
    )  # fmt: skip
    runs = any(
        not isinstance(node, quiet)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in tree.body
    )
    return not (checks and runs)


class Guarded(ast.NodeTransformer):
    """Tests whose comparisons go through `Comparisons`; chained ones are evaluated whole."""

    asserts = re.compile(r"assert(?:Not)?(?:In|\w*Equals?|Almost\w+|Count\w+|Greater\w*|Less\w*)")

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """Every comparison but `is`."""
        self.generic_visit(node)
        names = [type(op).__name__ for op in node.ops]
        if any(name not in OPERATORS for name in names):
            return node
        return ast.copy_location(
            ast.Call(
                ast.Name("__compare__", ast.Load()),
                [ast.Constant(" ".join(names)), node.left, *node.comparators],
                [],
            ),
            node,
        )

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Comparisons by methods of unittest."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and self.asserts.fullmatch(node.func.attr):
            asserted = ast.Name("__asserted__", ast.Load())
            call = ast.Call(asserted, [node.func, *node.args], node.keywords)
            return ast.copy_location(call, node)
        return node


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "In": lambda left, right: left in right,
    "NotIn": lambda left, right: left not in right,
}
_COMPARING = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__")
_MOST = 100_000
"""Values inside a compared one that are looked at."""


class Comparisons:
    """Compares for the tests, and knows whether the response's own methods decided.

    A class with an `__eq__` that is always true passes `assert f(1) == 2`. Where just one side
    holds an object whose comparison the response wrote, and the comparison holds, the tests prove
    nothing. Where both sides do, as in `P(1) == P(1)`, that method is what is tested.

    Attributes:
        decided: Whether such a comparison held.
    """

    def __init__(self) -> None:
        """Binds what is needed, before the response's code can patch it."""
        self.decided = False
        self._mro = type.__dict__["__mro__"].__get__
        self._names = type.__dict__["__dict__"].__get__
        self._flags = type.__dict__["__flags__"].__get__
        self._qualname = type.__dict__["__qualname__"].__get__
        self._standard = frozenset(sys.stdlib_module_names)

    def compare(self, names: str, left: Any, *others: Any) -> Any:
        """The value of `left op other op other …`."""
        result: Any = True
        for name, right in zip(names.split(" "), others, strict=True):
            result = OPERATORS[name](left, right)
            if result is False:
                return result
            self.note(left, right)
            if not result:
                return result
            left = right
        return result

    def asserted(self, method: Any, *given: Any, **named: Any) -> Any:
        """Calls one of unittest's assertions."""
        self.note(*given[:2])
        return method(*given, **named)

    def note(self, *sides: Any) -> None:
        """Takes note of a comparison that held."""
        if not self.decided and len({self._owns(side) for side in sides}) > 1:
            self.decided = True

    def _owns(self, value: Any) -> bool:
        """Whether a value, or one inside it, is compared by a method that the response wrote."""
        left: list[Any] = [value]
        seen: set[int] = set()
        while left and len(seen) < _MOST:
            value = left.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            kinds = self._mro(type(value))
            if any(self._wrote(kind) for kind in kinds):
                return True
            if dict in kinds:
                left += [*dict.keys(value), *dict.values(value)]
            for kind in (list, tuple, set, frozenset):
                if kind in kinds:
                    left += kind.__iter__(value)
        return False

    def _wrote(self, kind: type) -> bool:
        names = self._names(kind)
        if not self._flags(kind) & 1 << 9:  # no Python class: it is the interpreter's
            return False
        if not any(name in names for name in _COMPARING):
            return False
        module = names.get("__module__")
        if not isinstance(module, str) or module.partition(".")[0] not in self._standard:
            return True
        found: Any = sys.modules.get(module)
        for name in self._qualname(kind).split("."):
            found = getattr(found, name, None)
        return found is not kind


class Absent:
    """The last finder of modules: notes what the response, or its tests, import in vain.

    Attributes:
        names: Libraries that are not there.
    """

    def __init__(self) -> None:
        """Knows of none yet."""
        self.names: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Notes a library, not a missing part of one that is there; finds nothing."""
        frame: Any = sys._getframe(1)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if path is None and frame is not None and frame.f_code.co_filename in ("solution", "tests"):
            self.names.append(name)


class NoInput(io.StringIO):
    """Standard input without a line; notes that somebody asked.

    Attributes:
        asked: Whether it was read.
    """

    asked = False

    def read(self, size: int | None = -1, /) -> str:
        """Nothing."""
        self.asked = True
        return ""

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        """Nothing."""
        self.asked = True
        return ""

    def readlines(self, hint: int = -1, /) -> list[str]:  # type: ignore[override]
        """Nothing."""
        self.asked = True
        return []

    def __next__(self) -> str:  # type: ignore[override]
        """Nothing."""
        self.asked = True
        raise StopIteration

    def line(self, prompt: object = "", /) -> str:
        """What `input` is."""
        self.asked = True
        raise EOFError("there is no input")


class TimeUp(BaseException):
    """An example has run for long enough."""


def cut(*_: object) -> None:
    """Ends an example."""
    raise TimeUp


Statement = tuple[types.CodeType, str]
"""Compiled, and its kind. A failure of `program` fails the run; one of `setup` does not, but what
it lacked may be why the tests fail; one of `tail` (behind the definitions) or `example` is nothing.
"""


def statements(parts: list[list[str]]) -> list[Statement]:
    """Compiles the parts of a response, `[text, kind]`.

    Of `program` and `setup`, calls and assertions anywhere and whatever stands behind the last
    definition are `tail`. A part that is no Python is left out if another is.

    Raises:
        SyntaxError: if none of them is Python; of the last one.
    """
    found: list[Statement] = []
    error: Exception | None = None
    whole = 0
    for text, kind in parts:
        try:
            found += _compiled(text, kind)
            whole += kind == "program"
        except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
            error = problem if kind == "program" else error
    if not whole:
        raise SyntaxError(told(error) if error else "no program")
    return found


def _compiled(text: str, kind: str) -> list[Statement]:
    tree = ast.parse(text)
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    places = [i for i, node in enumerate(tree.body) if isinstance(node, definitions)]
    last, flags, found = places[-1] if places else len(tree.body), 0, []
    for i, node in enumerate(tree.body):
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            for name in node.names:
                feature = getattr(__future__, name.name, None)
                flags |= feature.compiler_flag if feature else 0
        shows = i > last or isinstance(node, ast.Expr | ast.Assert)
        code = compile(ast.Module([node], []), "solution", "exec", flags, dont_inherit=True)
        found.append((code, "tail" if shows and kind != "example" else kind))
    return found


# What runs behind the response's code is bound here as defaults, where patching modules does not
# reach it.
def take(
    requests: int, count: int, read: Any = os.read, leave: Any = os._exit, size: Any = len
) -> bytes:
    """Reads so many bytes; the end of input ends the process."""
    taken = b""
    while size(taken) < count:
        piece = read(requests, count - size(taken))
        if not piece:
            leave(2)
        taken += piece
    return taken


def say(report: int, what: str, value: Any, write: Any = os.write, dumps: Any = json.dumps) -> None:
    """Reports one fact as a line."""
    write(report, (dumps({what: value}) + "\n").encode())


def end(report: int, what: str, value: str, tell: Any = say, leave: Any = os._exit) -> None:
    """Reports how it went and leaves, past whatever was registered for the end."""
    tell(report, what, value)
    leave(0)


def told(error: BaseException) -> str:
    """An exception in a line, even if its own text raises."""
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except BaseException:
        return "an exception that can't be told"


def load(
    program: list[Statement], names: dict[str, Any], absent: Absent, seconds: float, run: Any = exec
) -> tuple[BaseException | None, list[str]]:
    """Runs a program statement by statement.

    Returns:
        What it raised; and why a failure of the tests would prove nothing: `!` in front of what
        counts in any case, the others only where the tests miss a name.
    """
    given, heard, out, doubts = NoInput(), sys.stdin, sys.stdout, []
    nowhere = open(os.devnull, "w")  # noqa: SIM115 (the process leaves without closing)
    builtins.input, sys.stdin = given.line, given
    signal.signal(signal.SIGPROF, cut)
    for code, kind in program:
        given.asked, known = False, len(absent.names)
        shows = kind in ("tail", "example")
        mark = "" if shows else "!"
        problem: BaseException | None = None
        if shows:
            sys.stdout = nowhere
            signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            run(code, names)
        except TimeUp:
            doubts.append(f"{'!' * (kind == 'tail')}an example ran too long")
        except BaseException as error:
            problem = error
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout = out
        if given.asked:
            doubts.append(mark + "the program reads input, and there is none")
        doubts += [f"{mark}the library {name} is not there" for name in absent.names[known:]]
        starved = any(d[0] == "!" and "input" in d for d in doubts)
        if problem is not None and kind == "program" and not starved:
            return problem, doubts
    sys.stdin = heard
    return None, doubts


def lacks(error: BaseException) -> str | None:
    """The module that an exception misses, if it is one of Python's that this machine lacks."""
    name = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    top = (name or "").partition(".")[0]
    return f"the library {name} is not there" if top and top not in sys.modules else None


def work(requests: int, report: int) -> None:
    """Runs the response's module, then the tests with its names."""
    current, original = vars(builtins), dict(vars(builtins))
    comparisons, absent = Comparisons(), Absent()
    sys.meta_path.append(absent)
    solution = types.ModuleType("solution")
    sys.modules["solution"] = solution
    sys.argv[:] = ["solution"]
    say(report, "begun", True)
    job = json.loads(take(requests, int(take(requests, 10))))
    run, build = exec, compile
    try:
        if isinstance(job["code"], str):
            program = [(build(job["code"], "solution", "exec", dont_inherit=True), "program")]
        else:
            program = statements(job["code"])
    except BaseException as error:
        end(report, "failed", f"the response raised {told(error)}")
    raised, doubts = load(program, solution.__dict__, absent, job["seconds"])
    if raised is not None:
        doubt(report, [d for d in doubts if d[0] == "!"], lacks(raised))
        end(report, "failed", f"the response raised {told(raised)}")
    say(report, "ready", True)
    current.clear()
    current.update(original)
    for hook in (sys.settrace, sys.setprofile, threading.settrace, threading.setprofile):
        hook(None)
    secret = take(requests, 32).decode()
    tests = take(requests, int(take(requests, 10))).decode("utf-8", "surrogatepass")
    names = {name: value for name, value in vars(solution).items() if not name.startswith("__")}
    names |= {"__name__": "tests", "__compare__": comparisons.compare}
    names["__asserted__"] = comparisons.asserted
    try:
        tree = ast.parse(tests)
        if idle(tree):
            end(report, "unusable", "the tests check nothing when they run")
        tree = ast.fix_missing_locations(Guarded().visit(tree))
        checks = build(tree, "tests", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        end(report, "unusable", f"the tests can't be compiled: {told(error)}")
    known = len(absent.names)
    try:
        run(checks, names)
    except BaseException as error:
        doubts += [f"!the library {name} is not there" for name in absent.names[known:]]
        certain = not isinstance(error, NameError)
        doubt(report, [d for d in doubts if d[0] == "!" or not certain], lacks(error))
        end(report, "failed", f"the tests raised {told(error)}")
    if comparisons.decided:
        doubt(report, ["!the program's own method decided a comparison of the tests"], None)
        end(report, "failed", "its own method compared its result with the tests' value")
    end(report, "passed", secret)


def doubt(report: int, doubts: list[str], other: str | None, tell: Any = say) -> None:
    """Reports why the failure that follows proves nothing, if there is a reason."""
    known = [d.lstrip("!") for d in doubts] + ([other] if other else [])
    if known:
        tell(report, "open", known[0][:300])


def main() -> None:
    """Runs one job; the first argument has the settings as JSON."""
    settings = json.loads(sys.argv[1])
    shed(settings)
    requests = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.set_inheritable(settings["report"], False)
    work(requests, settings["report"])


if __name__ == "__main__":
    main()

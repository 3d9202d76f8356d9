"""The program inside the sandbox: it gives its own rights up, then runs a response and its tests.

Run by path with the standard library alone, behind the walls that `isolation` puts up; nothing
imports it. It reads the response's code, and, only once that has run, the tests and a secret that
their success is reported with. It leaves by `os._exit`, so nothing that the tested
code registered runs afterwards.
"""

import ast
import builtins
import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys
import threading
import types
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


def idle(tests: str) -> bool:
    """Whether tests check nothing when they run: no assertion, or nothing but definitions."""
    tree = ast.parse(tests)
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


def work(requests: int, report: int) -> None:
    """Runs the response's module, then the tests with its names."""
    run, build, current, original = exec, compile, vars(builtins), dict(vars(builtins))
    solution = types.ModuleType("solution")
    sys.modules["solution"] = solution
    sys.argv[:] = ["solution"]
    say(report, "begun", True)
    code = take(requests, int(take(requests, 10))).decode("utf-8", "surrogatepass")
    try:
        run(build(code, "solution", "exec", dont_inherit=True), solution.__dict__)
    except BaseException as error:
        end(report, "failed", f"the response raised {told(error)}")
    say(report, "ready", True)
    current.clear()
    current.update(original)
    for hook in (sys.settrace, sys.setprofile, threading.settrace, threading.setprofile):
        hook(None)
    secret = take(requests, 32).decode()
    tests = take(requests, int(take(requests, 10))).decode("utf-8", "surrogatepass")
    names = {name: value for name, value in vars(solution).items() if not name.startswith("__")}
    names["__name__"] = "tests"
    try:
        program = build(tests, "tests", "exec", dont_inherit=True)
        if idle(tests):
            end(report, "unusable", "the tests check nothing when they run")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        end(report, "unusable", f"the tests can't be compiled: {told(error)}")
    try:
        run(program, names)
    except BaseException as error:
        end(report, "failed", f"the tests raised {told(error)}")
    end(report, "passed", secret)


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

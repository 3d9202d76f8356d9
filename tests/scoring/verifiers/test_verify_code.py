"""Code answers: what the sandbox lets through, and what it must not."""

import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.verifiers import CodeVerifier, get_verifier
from siftline.scoring.verifiers import sandbox as walls
from siftline.scoring.verifiers.code import python_block
from siftline.scoring.verifiers.sandbox import Limits, Sandbox
from siftline.scoring.verifiers.sandboxed import call_filter

MARK = (512 << 20) + 4096 * (os.getpid() % 1000)
"""A limit on memory that no other run has: it stands in the command line of our processes."""
SHORT = Limits(seconds=8, cpu_seconds=1, memory=MARK)


def made(isolation):
    try:
        return Sandbox(SHORT, isolation)
    except ValueError as error:
        if (isolation or "bubblewrap") in os.environ.get("SIFTLINE_REQUIRE", ""):
            pytest.fail(f"a sandbox is required here: {error}")
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["bubblewrap", "unshare"])
def walled(request):
    """One sandbox for each isolation: for what the walls have to hold."""
    return made(request.param)


@pytest.fixture(scope="module")
def sandbox():
    """The one that is taken here: for what does not depend on the walls."""
    return made(None)


def processes():
    """Processes of this file's sandboxes that live."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        found += f"[{MARK}, {MARK}]".encode() in line
    return found


def gone(patience=5.0):
    end = time.monotonic() + patience
    while processes() and time.monotonic() < end:
        time.sleep(0.05)
    return processes() == 0


def test_right_and_wrong_programs(sandbox):
    add = "def add(a, b):\n    return a + b\n"
    assert sandbox.run(add, "assert add(1, 2) == 3").status == "passed"
    wrong = sandbox.run(add, "assert add(1, 2) == 4")
    assert wrong.status == "failed"
    assert "AssertionError" in wrong.detail
    for code, tests in [
        (add, "assert subtract(1, 2) == 3"),
        ("def add(a, b) return", "assert True"),
        ("import numpy", "assert True"),
        ("raise KeyboardInterrupt", "assert True"),
    ]:
        assert sandbox.run(code, tests).status == "failed", code


WRONG = "def f(): return 0\n"
SPOOFS = {
    "leaves at once": "import os; os._exit(0)",
    "exits": "import sys; sys.exit(0)",
    "raises SystemExit": "raise SystemExit(0)",
    "leaves in the call": "import os\ndef f(): os._exit(0)",
    "exits in the call": "import sys\ndef f(): sys.exit(0)",
    "leaves at the end": WRONG + "import atexit, os; atexit.register(os._exit, 0)",
    "prints success": WRONG + "print('{\"passed\": true}'); print('passed')",
    "writes to every file": WRONG
    + "import os\nfor n in range(64):\n    try: os.write(n, b'{\"passed\": true}\\n')\n"
    "    except OSError: pass",
    "a thread leaves": "import os, threading, time\nthreading.Timer(0.2, os._exit, [0]).start()\n"
    "def f(): time.sleep(1)",
    "patches built-ins": WRONG
    + "import builtins\nfor n in ('AssertionError', 'exec', 'compile', 'isinstance', 'len'):\n"
    "    setattr(builtins, n, lambda *a, **k: True)",
    "patches os": WRONG + "import os, json\nos.write = os._exit = json.dumps = lambda *a: None",
    "skips lines by tracing": WRONG + "import sys\ndef skip(frame, event, arg):\n"
    "    frame.f_trace_lines = False\n    return skip\n"
    "sys.settrace(skip)",
    "kills its parents": WRONG + "import os\nfor n in (os.getppid(), 1, -1):\n"
    "    try: os.kill(n, 9)\n    except OSError: pass",
    "stops in a signal": WRONG
    + "import os, signal\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(0))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.05)\nimport time\ntime.sleep(0.5)",
    "closes everything": "import os\nos.closerange(0, 64)\ndef f(): return 0",
    "forks and lets the child go on": "import os\nif os.fork(): os._exit(0)\ndef f(): return 0",
    "execs another program": "import os\nos.execv('/bin/true', ['true'])",
    "crashes": "import ctypes; ctypes.string_at(0)",
}


@pytest.mark.parametrize("name", SPOOFS)
def test_no_trick_passes_for_a_wrong_program(sandbox, name):
    outcome = sandbox.run(SPOOFS[name], "assert f() == 1")
    assert outcome.status != "passed", outcome
    assert outcome.status != "unusable", outcome


def tried(body, *names):
    """A program whose `attempt()` is "refused" where the body raises OSError or ValueError."""
    return (
        "import ctypes, os, socket, subprocess, sys\nfrom pathlib import Path\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def must(result):\n    if result < 0: raise OSError(ctypes.get_errno(), 'refused')\n"
        "def attempt():\n    try:\n"
        + textwrap.indent(body, " " * 8)
        + "\n    except OSError as error:\n        return 'refused'\n    return 'done'\n"
    )


def test_nothing_outside_can_be_read_written_or_reached(walled, tmp_path, monkeypatch):
    monkeypatch.setenv("SIFTLINE_SECRET", "in the environment")
    secret = tmp_path / "secret"
    secret.write_text("outside")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        attempts = [
            "open('/etc/shadow').read()",
            "open('/etc/passwd').read()",
            f"open({str(secret)!r}).read()",
            "os.listdir(os.path.expanduser('~root/.ssh'))",
            f"os.listdir({str(Path.home())!r} + '/.cache')",
            "open('/proc/1/environ').read()",
            "open('/new', 'w')",
            "open('/usr/new', 'w')",
            "open('/dev/shm/new', 'w')",
            "open('/run/sandboxed.py', 'w')",
            "open(sys.prefix + '/new', 'w')",
            "open(os.__file__, 'a')",
            f"socket.create_connection(('127.0.0.1', {port}), timeout=2)",
            "socket.socket(40, socket.SOCK_STREAM)",  # AF_VSOCK, to the host of a virtual machine
            "os.setuid(0)",
            "os.setgroups([0])",
            "os.chroot('/tmp')",
            "must(libc.unshare(0x10000000))",
            "must(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
            "must(libc.ptrace(16, os.getppid(), 0, 0))",
            "must(libc.shmget(0, 1 << 20, 0o1600))",
            "os.memfd_create('x')",
            "os.kill(os.getppid(), 0)" if os.geteuid() == 0 else "os.chown('/tmp', 0, 0)",
        ]
        code = "\n".join(tried(a) + f"attempts[{i}] = attempt" for i, a in enumerate(attempts))
        tests = "\n".join(f"assert attempts[{i}]() == 'refused', {i}" for i in range(len(attempts)))
        tests += "\nimport os\nassert 'SIFTLINE_SECRET' not in os.environ"
        tests += f"\nassert set(os.environ) <= {set(walls.ENVIRONMENT) | {'PWD', 'LC_CTYPE'}!r}"
        outcome = walled.run("attempts = {}\n" + code, tests)
        assert outcome.status == "passed", (outcome, dict(enumerate(attempts)))
    control = subprocess.run(
        [sys.executable, "-c", tried(f"open({str(secret)!r}).read()") + "print(attempt())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert control.stdout == "done\n", "the attempt itself works outside"


def test_the_walls_alone_keep_the_network_out(walled):
    """Without the filter on system calls: the namespace has no way out either."""
    room = walls.Confinement(1 << 20, 100, 10)
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket; socket.create_connection({server.getsockname()!r}, timeout=2)"
        line = walls.WAYS[walled.isolation](room, [*walls.python(), "-c", code])
        done = subprocess.run(line, env=walls.ENVIRONMENT, capture_output=True, text=True)
        outside = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert "unreachable" in done.stderr or "refused" in done.stderr  # its own loopback may be up
    assert outside.returncode == 0


def test_the_tests_are_nowhere_on_disk(sandbox):
    code = """
        import os
        def look(word):
            found = []
            for top in ('/tmp', '/run', '/dev', '/etc'):
                for folder, _, names in os.walk(top):
                    for name in names:
                        try:
                            if os.path.isfile(path := os.path.join(folder, name)):
                                found += [path] * (word in open(path, errors='replace').read())
                        except OSError:
                            pass
            return found
    """
    assert sandbox.run(textwrap.dedent(code), "assert look('zebra' + 'fish') == []\n# zebrafish"
                       ).status == "passed"  # fmt: skip


def test_the_module_can_not_read_the_tests_ahead(sandbox):
    """They are sent when the module has run, so what is in the pipe before is nothing."""
    code = """
        import os, select
        ahead = b''
        for n in range(3, 64):
            try:
                if select.select([n], [], [], 0)[0]:
                    ahead += os.read(n, 100)
            except OSError:
                pass
    """
    outcome = sandbox.run(textwrap.dedent(code), "assert ahead == b''")
    assert outcome.status == "passed", outcome


@pytest.mark.parametrize(
    ("code", "status", "detail"),
    [
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
         "stopped", "killed"),
        ("x = bytearray(1 << 30)", "failed", "MemoryError"),
        ("while True: print('x' * 10000)", "failed", "printed more"),
        ("open('/tmp/x', 'wb').write(bytes(20 << 20))", "failed", "OSError"),
        ("files = [open('/dev/null') for _ in range(100)]", "failed", "Too many open files"),
        ("import threading, time\nfor _ in range(20):\n"
         "    threading.Thread(target=time.sleep, args=[5], daemon=True).start()", "failed",
         "can't start new thread"),
        ("def f(): return f()\nf()", "failed", "RecursionError"),
    ],
)  # fmt: skip
def test_limits_bind(sandbox, code, status, detail):
    outcome = sandbox.run(code, "assert True")
    assert (outcome.status, detail in outcome.detail) == (status, True), outcome


def test_the_work_folder_is_bounded(walled):
    code = "for n in range(9):\n    open(f'/tmp/{n}', 'wb').write(bytes(8 << 20))"
    outcome = walled.run(code, "assert True")
    assert outcome.status == "failed"
    assert "No space left" in outcome.detail


def test_a_sleeper_ends_in_time(walled):
    quick = Sandbox(Limits(seconds=1, memory=MARK), walled.isolation)
    started = time.monotonic()
    assert quick.run("import time; time.sleep(60)", "assert True").status == "stopped"
    assert time.monotonic() - started < 6
    assert gone()


def test_a_million_files_are_a_matter_of_time(walled):
    quick = Sandbox(Limits(seconds=1.5, memory=MARK), walled.isolation)
    files = "n = 0\nwhile True:\n    open(f'/tmp/{n}', 'w')\n    n += 1"
    assert quick.run(files, "assert True").status in ("stopped", "failed")


def test_a_fork_bomb_stays_small_and_ends(walled):
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    quick = Sandbox(Limits(seconds=1.2, cpu_seconds=1, memory=MARK), walled.isolation)
    seen, over = [], threading.Event()

    def count():
        while not over.is_set():
            seen.append(processes())
            time.sleep(0.02)

    counter = threading.Thread(target=count)
    counter.start()
    started = time.monotonic()
    outcome = quick.run(bomb, "assert True")
    took = time.monotonic() - started
    over.set()
    counter.join()
    assert outcome.status == "stopped", outcome
    assert took < 8
    # The bomb's own processes, and two or three of the walls.
    assert quick.limits.processes / 2 < max(seen) <= quick.limits.processes + 3
    assert gone()


def test_no_daemon_survives_a_run(walled):
    code = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.closerange(0, 64)
                time.sleep(60)
            os._exit(0)
        os.wait()
    """
    assert walled.run(textwrap.dedent(code), "assert True").status == "passed"
    assert gone()


def test_nothing_survives_the_one_who_started_it(walled):
    code = (
        "from siftline.scoring.verifiers.sandbox import *\n"
        f"s = Sandbox(Limits(seconds=90, memory={MARK}), {walled.isolation!r})\n"
        "print('made', flush=True)\ns.run('import time; time.sleep(90)', 'assert True')"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"made\n"
        # On a busy machine the walls take seconds to stand; the run itself outlasts the wait.
        end = time.monotonic() + 60
        while not processes() and time.monotonic() < end:
            time.sleep(0.02)
        assert processes()
        parent.kill()
    assert gone(patience=6)


def test_an_unprivileged_user_has_the_same_walls(walled):
    """Run by root: the other half of the code, where the kernel maps users instead."""
    python = next((p for p in ("/usr/bin/python3",) if shutil.which(p)), None)
    source = Path(walls.__file__).parents[3]
    if os.geteuid() != 0:
        pytest.skip("all other tests run unprivileged here")
    code = (
        "import os, sys\n"
        "from siftline.scoring.verifiers.sandbox import *\n"
        f"s = Sandbox(Limits(seconds=1.2), {walled.isolation!r})\n"
        "bomb = 'import os\\nwhile True:\\n  try: os.fork()\\n  except OSError: pass'\n"
        "out = [s.run('x = 1', f'assert x == {n}').status for n in (1, 2)]\n"
        "out += [s.run(c, 'assert 1').status for c in (bomb, 'open(\"/new\", \"w\")')]\n"
        "print(os.getuid(), *out)"
    )
    if python is None:
        pytest.skip("no interpreter that everybody may read")
    # A copy, for the source's own folders may be closed to others.
    done = subprocess.run(
        [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], check=False
    )
    if done.returncode:
        pytest.skip("the system's python is older than 3.11")
    folder = Path("/tmp") / f"siftline-walls-{os.getpid()}"
    try:
        shutil.copytree(source / "siftline" / "scoring", folder / "siftline" / "scoring")
        shutil.copytree(source / "siftline" / "kernels", folder / "siftline" / "kernels")
        shutil.copy(source / "siftline" / "__init__.py", folder / "siftline")
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        done = subprocess.run(
            [python, "-P", "-c", code], env={"PYTHONPATH": str(folder), "PATH": os.defpath},
            user=65534, group=65534, extra_groups=[], capture_output=True, text=True, cwd="/",
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    if "user namespace" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.splitlines()[-1]}")
    assert done.stdout.split() == ["65534", "passed", "failed", "stopped", "failed"], done.stderr


@settings(max_examples=6, deadline=None)
@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(-1, 1))
def test_a_program_passes_exactly_if_it_is_right(sandbox, a, b, off):
    verify = get_verifier("code")
    response = f"```python\ndef add(a, b):\n    return a + b + {off}\n```"
    assert verify(response, f"assert add({a}, {b}) == {a + b}").correct is (off == 0)


PROGRAMS = [
    ("def f(n): return sorted({3, 1, n})", "assert f(2) == [1, 2, 3]"),
    ("def f(n): return sorted({3, 1, n})", "assert f(2) == [1, 2]"),
    ("class Stack(list):\n    push = list.append", "s = Stack()\ns.push(1)\nassert s == [1]"),
    ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int", "assert P(1) == P(1)"),
    ("def g():\n    yield 1\n    raise ValueError('no')", "assert list(g())"),
    ("def f(): raise KeyError(1)",
     "try:\n    f()\nexcept KeyError:\n    pass\nelse:\n    assert False"),
    ("n = 0\ndef f():\n    global n\n    n += 1\n    return n", "f()\nassert f() == 2"),
    ("import re\ndef f(s): return re.sub('a+', 'b', s)",
     "def check(c):\n    assert c('aab') == 'bb'\ncheck(f)"),
]  # fmt: skip


def test_verdicts_agree_with_python_itself(sandbox):
    for code, tests in PROGRAMS:
        plain = subprocess.run([sys.executable, "-c", f"{code}\n{tests}"], capture_output=True)
        assert (sandbox.run(code, tests).status == "passed") is (plain.returncode == 0), code


def test_the_order_of_a_set_is_the_same_in_every_run(sandbox):
    code = "order = list({'north', 'east', 'south', 'west', 'up', 'down'})"
    plain = subprocess.run(
        [os.path.realpath(sys.executable), "-c", f"{code}\nprint(order)"],
        env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for _ in range(3):
        assert sandbox.run(code, f"assert order == {plain.stdout}").status == "passed"


def test_runs_side_by_side_do_not_meet(sandbox):
    jobs = [(f"open('/tmp/x', 'x').write('{n}')", f"assert open('/tmp/x').read() == '{n % 3}'")
            for n in range(6)]  # fmt: skip
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda job: sandbox.run(*job).status, jobs))
    assert found == ["passed"] * 3 + ["failed"] * 3


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\na = 1\n```", "a = 1\n"),
        ("First\n```python\na = 1\n```\nbetter\n```py\na = 2\n```\nruns:\n```\n2\n```", "a = 2\n"),
        ("```\na = 1\n```", "a = 1\n"),
        ("```\na = 1\n```\n```\na = 2\n```", None),
        ("```bash\nls\n```", None),
        ("a = 1", None),
        ("```python\na = 1", None),
        ("```python\na = 1\n```\n```python\na = ", None),
        ("```python\n\n```", None),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
    ],
)
def test_the_marked_block_is_the_program(response, program):
    assert python_block(response) == program


@given(st.text(alphabet="`~py \n", max_size=80))
def test_any_text_has_a_program_or_none(text):
    found = python_block(text)
    # The indentation of a fence is taken off its lines.
    assert found is None or "".join(found.split()) in "".join(text.split())


def test_verdicts(sandbox):
    verify = CodeVerifier(SHORT, sandbox.isolation)
    good = "```python\ndef f(): return 1\n```"
    assert verify(good, "assert f() == 1").reason == "match"
    assert verify(good, "assert f() == 2").correct is False
    assert verify("I would add them", "assert f() == 1").reason == "no_final_answer"
    assert verify(good, " ").reason == "no_reference"
    for tests in ("assert f( == 1", "def test_f():\n    assert f() == 2", "f()", "x = '" + "\0'"):
        verdict = verify(good, tests)
        assert verdict.correct is None, tests
        assert verdict.reason.startswith("verifier_error"), tests
    assert verify(good, "# " + "x" * 300_000).reason == "verifier_error: program or tests too long"


def test_without_walls_nothing_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(walls.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="apt-get install bubblewrap"):
        CodeVerifier()
    with pytest.raises(ValueError, match="bubblewrap or unshare"):
        Sandbox(isolation="docker")
    with pytest.raises(ValueError, match="seconds must be positive"):
        Limits(seconds=0)
    with pytest.raises(ValueError, match="x86_64 or aarch64"):
        call_filter("riscv64")


def test_the_walls_in_use_are_told(sandbox, caplog):
    from siftline.scoring.verifiers import isolation_of

    with caplog.at_level("INFO", "siftline"):
        isolation = Sandbox().isolation
    assert [r.getMessage() for r in caplog.records] == [f"responses' code runs behind {isolation}"]
    assert isolation_of("code") == {"isolation": isolation}
    assert isolation_of("math") == {}


def test_walls_that_fail_are_not_taken(monkeypatch, tmp_path):
    """An installed bwrap that may not make namespaces is as good as none."""
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho no permission >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="bubblewrap: no walls, code 1: no permission"):
        Sandbox()

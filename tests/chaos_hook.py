"""Counts what a process does to files below a folder, and disturbs it at a chosen count.

Also forks the step processes of a run, and waits for all that a run leaves.

`arm()` is called in a forked child, or at the start of every process of a tree: with this folder's
`sitecustomize` on PYTHONPATH and the plan in the environment. Processes of a tree count in one
file, so that the moment is one of all of them together.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time

PLAN = "SIFTLINE_TEST_CHAOS"
"""Names the variable with the plan as JSON: root, at, act, keep, count (a file)."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = (
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.utime",
    "shutil.rmtree", "shutil.copyfile", "sqlite3.connect",
)  # fmt: skip


class Hook:
    """The count, and what happens when it is reached."""

    def __init__(self, plan):
        self.root, self.at, self.act = plan["root"], plan["at"], plan["act"]
        self.keep = plan["keep"]
        self.count = os.open(plan["count"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.busy = False

    def heard(self, event, arguments):
        """Called by Python before every event."""
        if event == "open":
            path, _, flags = arguments
            seen = isinstance(flags, int) and flags & WRITING
        elif event in CHANGES:
            path, seen = arguments[0], True
        else:
            return
        if seen and isinstance(path, str | bytes | os.PathLike):
            name = os.fsdecode(path)
            if name.startswith(self.root) or self.root in name:
                self.happened()

    def happened(self):
        """One more event; the chosen one is the last that a killed process sees."""
        if self.busy:
            return
        self.busy = True
        os.write(self.count, b".")
        # Files grow by whole writes, so exactly one process of a tree sees this size.
        if os.fstat(self.count).st_size == self.at:
            getattr(self, self.act)()
        self.busy = False

    def kill(self):
        """Ends the whole group at once."""
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def interrupt(self):
        """What Ctrl-C does."""
        os.killpg(os.getpgrp(), signal.SIGINT)

    def fill(self):
        """Leaves the disk of the root `keep` bytes."""
        disk = os.statvfs(self.root)
        size = max(0, disk.f_bavail * disk.f_frsize - self.keep)
        handle = os.open(os.path.join(self.root, ".filler"), os.O_WRONLY | os.O_CREAT)
        os.posix_fallocate(handle, 0, size)
        os.close(handle)

    def limit(self):
        """No file of this process may grow beyond `keep` bytes."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.keep, resource.RLIM_INFINITY))

    def server(self):
        """Ends the server that a file beside the root names."""
        with open(os.path.join(os.path.dirname(self.root), "server.pid")) as file:
            os.kill(int(file.read()), signal.SIGKILL)


def arm(plan):
    """Begins to count; in mid-frame and mid-file too, where the writers are loaded."""
    hook = Hook(plan)
    sys.addaudithook(hook.heard)
    return hook


def inside(hook):
    """Has journals and Parquet files written in two halves, with an event between them."""
    from siftline.disk import Sink
    from siftline.store.namespace import Journal

    write, sink = Journal._write, Sink.write

    def halves(self, frame):
        middle = len(frame) // 2
        hook.happened()
        write(self, frame[:middle])
        hook.happened()
        write(self, frame[middle:])

    def counted(self, data):
        hook.happened()
        return sink(self, data)

    Journal._write, Sink.write = halves, counted


def fork_steps():
    """Starts the server of step processes by a fork; it has nothing left to load."""
    from multiprocessing import forkserver, util

    start, here = util.spawnv_passfds, "/proc/self/fd"
    held = {name for name in os.listdir(here) if os.path.exists(f"{here}/{name}")}

    def forked(path, arguments, handles):
        if "multiprocessing.forkserver" not in arguments[-1]:
            return start(path, arguments, handles)
        child = os.fork()
        if not child:
            try:
                # The other ends of its pipes: open here, they would keep it alive.
                for name in set(os.listdir(here)) - held - set(map(str, handles)):
                    with contextlib.suppress(OSError):
                        os.close(int(name))
                exec(arguments[-1], {})
            finally:
                os._exit(0)
        return child

    util.spawnv_passfds = forked
    forkserver.ensure_running()


def adopt():
    """Makes orphans of runs this process's children, which tells what is left and what it cost."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def orphans_ended():
    """Whether every process that a run left ends within 20 s."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.05)
        except ChildProcessError:
            return True
    return False


def spent():
    """Processor time in seconds of this process and all that it waited for."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


if os.environ.get(PLAN):
    arm(json.loads(os.environ[PLAN]))

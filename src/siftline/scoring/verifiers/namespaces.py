"""Walls for the sandbox where bubblewrap is missing: run by `unshare`, in namespaces of its own.

It builds a root of read-only system folders and a bounded work folder in the new mount namespace,
makes it the root, leaves no way back, and starts the program as a child. As the namespace's first
process it outlives nothing: when it ends, the kernel ends every process inside. Run by path with
the standard library alone; nothing imports it.
"""

import ctypes
import json
import os
import platform
import signal
import sys
from typing import Any

_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_KEPT = {"nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "nodiratime": 2048,
         "relatime": 1 << 21}  # fmt: skip
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_DETACH = 2
_ROOT = "/sys"
"""Where the new root is mounted: a folder that every Linux has and no program is in."""

_libc = ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    def text(value: str | None) -> bytes | None:
        return None if value is None else os.fsencode(value)

    if _libc.mount(text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data)):
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} on {target}: {os.strerror(number)}")


def _bind(source: str, inside: str) -> None:
    target = _ROOT + inside
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
    _mount(source, target, None, _BIND | _REC)


def _mounts() -> dict[str, tuple[str, str]]:
    """Place and options of every mount, by its number."""
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        lines = [line.split() for line in mounts]
    return {f[0]: (f[4].encode().decode("unicode_escape"), f[5]) for f in lines}


def _read_only(old: set[str]) -> None:
    """Makes every new mount but the work folder read-only; its other flags may be locked: kept."""
    for number, (place, options) in _mounts().items():
        if number not in old and place not in (_ROOT, f"{_ROOT}/tmp"):
            kept = sum(_KEPT.get(option, 0) for option in options.split(","))
            _mount("none", place, None, _BIND | _REMOUNT | _RDONLY | kept)


def build(walls: dict[str, Any]) -> None:
    """Makes the new root and enters it."""
    _mount("none", "/", None, _REC | _PRIVATE)
    old = set(_mounts())
    _mount("tmpfs", _ROOT, "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m,nr_inodes=1k")
    for inside, source in walls["binds"].items():
        _bind(source, inside)
    for name in ("null", "zero", "random", "urandom"):
        _bind(f"/dev/{name}", f"/dev/{name}")
    for inside, target in walls["links"].items():
        os.symlink(target, _ROOT + inside)
    os.mkdir(_ROOT + "/tmp")
    size = f"mode=1777,size={walls['work_bytes']},nr_inodes={walls['work_files']}"
    _mount("tmpfs", _ROOT + "/tmp", "tmpfs", _NOSUID | _NODEV, size)
    _read_only(old)
    _mount("none", _ROOT, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(_ROOT)
    if _libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b".") or _libc.umount2(b".", _DETACH):
        raise OSError(ctypes.get_errno(), f"pivot_root: {os.strerror(ctypes.get_errno())}")
    os.chdir("/tmp")


def main() -> None:
    """Builds the walls that the first argument describes and runs the rest of them inside."""
    walls = json.loads(sys.argv[1])
    build(walls)
    # Should whoever started us be gone, nobody else ends what sleeps in here.
    signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + signal.SIGALRM))
    signal.setitimer(signal.ITIMER_REAL, walls["seconds"])
    child = os.fork()
    if child == 0:
        os.setsid()
        os.execv(sys.argv[2], sys.argv[2:])
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()

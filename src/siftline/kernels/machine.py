"""Machine code of kernels, found again by later processes without importing numba.

numba compiles a loop once. Its own cache saves that time, but to look there a process imports numba
and all that it may ever compile, half a second for what runs in milliseconds. So the loops of
deduplication allocate nothing and call nothing outside: what is left of each is an object file,
which llvmlite, the part of numba that speaks to LLVM, links into a process in some milliseconds.

The file's name holds a hash of all kernels' source, of numba's version, of the types and of the
processor, so that it is found by whom it fits, and made anew by everyone else. It starts with a
checksum: what was cut short is made anew, too. Several processes may make one at once, each under a
name of its own; they are equal, and the last rename wins.

Where: in __pycache__ beside the kernels, as numba's own; where NUMBA_CACHE_DIR names a folder,
there; where neither can be written, in the user's cache folder.
"""

import ctypes
import hashlib
import io
import os
import platform
import tempfile
import threading
import zlib
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
_ENTRY = "siftline_kernel"
_PROVIDED = ("llvm.", "memset", "memcpy", "memmove")
"""What compiled code may call: LLVM's own, and what every process has."""
_NO_OWNERS = "define void @NRT_MemInfo_call_dtor(ptr %owner) { ret void }"
"""Functions that are called were compiled with numba's runtime and free an array's owner with its
last user; arrays that came in from outside have none, so this is never called."""
_NUMBERS = {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_double}


class Kernel:
    """A loop over arrays, compiled for the types of its first call or found compiled.

    It releases Python's lock. Arguments are C-contiguous arrays, named tuples of such, whole
    numbers, truth values and floats. What it returns is None or a whole number.

    Args:
        module: That holds it.
        name: Of the function there, decorated with `numba.njit`.
    """

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name
        self._lock = threading.Lock()
        self._known: dict[tuple[Any, ...], Callable[..., int]] = {}

    def __call__(self, *given: Any) -> int:
        """Calls it; returns the number that it returns, or 0."""
        flat: list[Any] = []
        kind = tuple(_flattened(value, flat) for value in given)
        call = self._known.get(kind) or self._found(kind, given, [type(value) for value in flat])
        result, fault = ctypes.c_int64(0), ctypes.c_void_p(None)
        status = call(ctypes.byref(result), ctypes.byref(fault), *flat)
        assert status == 0, f"{self.name} raised"
        return result.value

    def _found(self, kind: tuple[Any, ...], given: tuple[Any, ...], flat: list[type]) -> Any:
        with self._lock:
            if kind not in self._known:
                file = f"{self.name}-{_hash(self.module, kind, _processor())}.o"
                code = read(file)
                if code is None:
                    code = _compiled(self.module, self.name, given)
                    write(file, code)
                types: list[Any] = [_NUMBERS[each] for each in flat]
                form = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *types)
                self._known[kind] = form(_linked(code))
            return self._known[kind]


Build = Callable[[], tuple[np.ndarray, ...]]


def kept(*packages: str) -> Callable[[Build], Build]:
    """A function whose arrays later processes find.

    They follow from its source, Python's version, and those of the packages.
    """

    def decorated(build: Build) -> Build:
        @cache
        def found() -> tuple[np.ndarray, ...]:
            versions = (platform.python_version(), *map(version, packages))
            file = f"{build.__name__.strip('_')}-{_hash(build.__module__, *versions)}.npz"
            raw = read(file)
            if raw is None:
                buffer = io.BytesIO()
                np.savez(buffer, *build())
                raw = buffer.getvalue()
                write(file, raw)
            with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
                return tuple(arrays[f"arr_{k}"] for k in range(len(arrays.files)))

        return found

    return decorated


def folders() -> list[Path]:
    """Where files are looked for, and written to where the first can't be written."""
    asked = os.environ.get("NUMBA_CACHE_DIR")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [Path(asked) if asked else HERE / "__pycache__", user / "siftline"]


def read(file: str) -> bytes | None:
    """What `write` wrote to a file; None where there is none, or not all of it."""
    for folder in folders():
        try:
            raw = (folder / file).read_bytes()
        except OSError:
            continue
        if len(raw) > 4 and zlib.crc32(raw[4:]) == int.from_bytes(raw[:4], "little"):
            return raw[4:]
    return None


def write(file: str, content: bytes) -> None:
    """Keeps a file for later processes, in the first folder that can be written.

    Where none can, every process computes it: that is slower, and nothing else.
    """
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{file}.")
        except OSError:
            continue
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(zlib.crc32(content).to_bytes(4, "little") + content)
            os.replace(temporary, folder / file)
            return
        except OSError:  # a full disk
            Path(temporary).unlink(missing_ok=True)


def _flattened(value: Any, flat: list[Any]) -> Any:
    """Appends what numba's calling convention passes for a value; returns its type."""
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous, "kernels take C-contiguous arrays"
        # No owner, no parent, then size, width, place, shape and strides.
        flat += (0, 0, value.size, value.itemsize, value.ctypes.data, *value.shape, *value.strides)
        return value.dtype.str, value.ndim
    if isinstance(value, tuple):
        return type(value).__name__, *(_flattened(part, flat) for part in value)
    number = value.item() if isinstance(value, np.generic) else value
    flat.append(number)
    return type(number).__name__


def _numba_type(value: Any) -> Any:
    from numba import types
    from numba.np.numpy_support import from_dtype

    if isinstance(value, np.ndarray):
        return types.Array(from_dtype(value.dtype), value.ndim, "C")
    if isinstance(value, tuple):
        return types.BaseTuple.from_types([_numba_type(part) for part in value], type(value))
    number = value.item() if isinstance(value, np.generic) else value
    return {bool: types.boolean, int: types.int64, float: types.float64}[type(number)]


def _compiled(module: str, name: str, given: tuple[Any, ...]) -> bytes:
    """The object file of a function for the types of some arguments; its entry is `_ENTRY`."""
    from llvmlite import binding
    from numba import njit

    function = getattr(import_module(module), name).py_func
    # Without numba's runtime it can own no array, so it needs nothing that numba brings along.
    alone = njit(_nrt=False, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
    types = tuple(_numba_type(value) for value in given)
    alone.compile(types)
    own = alone.overloads[types].fndesc.llvm_func_name
    code = binding.parse_assembly(alone.inspect_llvm(types).replace(own, _ENTRY))
    code.link_in(binding.parse_assembly(_NO_OWNERS))
    needed = [each.name for each in code.functions if each.is_declaration]
    foreign = [each for each in needed if not each.startswith(_PROVIDED)]
    assert not foreign, f"{name} calls {', '.join(foreign)}"
    return _machine().emit_object(code)


@cache
def _machine() -> Any:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    name, features = _processor()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=name, features=features, opt=3, codemodel="jitdefault", jit=True
    )


@cache
def _processor() -> tuple[str, str]:
    from llvmlite import binding

    return binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()


_ENGINES: list[Any] = []
"""They own the code: kept as long as the process."""


def _linked(code: bytes) -> int:
    """Links an object file into this process; the address of its entry."""
    from llvmlite import binding

    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _ENGINES.append(engine)
    return engine.get_function_address(_ENTRY)


@cache
def _sources() -> bytes:
    """A hash of the kernels' source and of the compiler's version."""
    spec = find_spec("numba")  # found, not imported
    assert spec is not None
    assert spec.origin is not None
    compiler = Path(spec.origin).with_name("_version.py").read_bytes()
    kernels = [file.read_bytes() for file in sorted(HERE.rglob("*.py"))]
    return hashlib.sha256(b"\0".join([compiler, *kernels])).digest()


def _hash(*what: Any) -> str:
    return hashlib.sha256(_sources() + repr(what).encode()).hexdigest()[:24]

"""The native kernels' libraries: which this CPU can run, loading one, and its pool of threads."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from meshlm.kernels.native import build

BUILD_COMMAND = "python -m meshlm.kernels.native.build"
SANITIZED_VARIABLE = "MESHLM_NATIVE_SANITIZED"  # "1": load the libraries that `build --sanitize` made


class NativeUnavailableError(RuntimeError):
    """No native library can be used here; the text says why and what to do."""


class Library:
    """One loaded library. Functions are called without the interpreter's lock."""

    def __init__(self, isa: str, path: Path) -> None:
        self.isa = isa
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeUnavailableError(f"{path.name} cannot be loaded: {error}") from error
        self._functions: dict[str, Callable[..., Any]] = {}

    @property
    def pair_products(self) -> bool:
        """Whether it multiplies bfloat16 in pairs on this CPU (AVX512_BF16), and can so keep a KV cache in them."""
        return bool(self.function("native_pair_products", ctypes.c_int)())

    def function(self, name: str, restype: Any, *argtypes: Any) -> Callable[..., Any]:
        """The exported function `name` with its C types, which are those of the first call for that name."""
        if name not in self._functions:
            function = getattr(self._library, name)
            function.restype = restype
            function.argtypes = argtypes
            self._functions[name] = function
        return self._functions[name]


class Pool:
    """A team of threads that runs native steps; the calling thread is one of them. One step at a time.

    threads: at least 1. spin_us: how long a thread without work spins before it sleeps in the kernel, microseconds.
    """

    def __init__(self, library: Library, threads: int, spin_us: int = 0) -> None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        if spin_us < 0:
            raise ValueError(f"spin_us must not be negative, and is {spin_us}")
        self.library = library
        self.threads = threads
        self._destroy = library.function("native_pool_destroy", None, ctypes.c_void_p)
        create = library.function("native_pool_create", ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
        self._handle: int | None = create(threads, spin_us)
        if self._handle is None:
            raise RuntimeError(f"the system did not give {threads} threads")

    @property
    def handle(self) -> int:
        """The pool's address, for native functions. Raises ValueError after `close`."""
        if self._handle is None:
            raise ValueError("the pool is closed")
        return self._handle

    def close(self) -> None:
        """End the threads. No step may be running. A second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._destroy(handle)

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def supported_isas() -> tuple[str, ...]:
    """The instruction sets this CPU and operating system can run, the fastest first. Raises NativeUnavailableError."""
    level = _load("generic").function("native_cpu_level", ctypes.c_int)()
    return ("avx512", "avx2", "generic")[2 - level :]


def open_library(isa: str | None = None) -> Library:
    """The library for `isa`, or the fastest that was built and that this CPU can run; loaded once.

    Raises NativeUnavailableError where there is none, and ValueError for an instruction set that does not exist.
    """
    if isa is not None and isa not in build.ISAS:
        raise ValueError(f"isa must be one of {', '.join(build.ISAS)}, not {isa!r}")
    supported = supported_isas()
    if isa is None:
        return _load(next(name for name in supported if _path(name).is_file()))
    if isa not in supported:
        raise NativeUnavailableError(f"this CPU cannot run {isa} code, only {', '.join(supported)}")
    return _load(isa)


def _path(isa: str) -> Path:
    return build.library_path(isa, sanitized=os.environ.get(SANITIZED_VARIABLE) == "1")


def _load(isa: str) -> Library:
    return _loaded(isa, _path(isa))


@functools.cache
def _loaded(isa: str, path: Path) -> Library:
    built = build.built_hash(path)
    if built is None:
        raise NativeUnavailableError(_why_missing(path))
    if build.SOURCES.is_dir() and built != build.sources_hash():
        raise NativeUnavailableError(f"{path.name} was built from other sources than these: run `{BUILD_COMMAND}`")
    return Library(isa, path)


def _why_missing(path: Path) -> str:
    if build.UNBUILT.is_file():
        reason = build.UNBUILT.read_text().strip()
        return f"the native kernels were not built when MeshLM was installed: {reason}. Then run `{BUILD_COMMAND}`"
    return f"{path.name} is not there: run `{BUILD_COMMAND}`"

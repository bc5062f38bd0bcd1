"""`@kernel`: numba compilation as this project wants it, with a cache that cannot go stale.

Every hot loop is a free function on arrays, compiled without the GIL. numba's own on-disk cache
looks only at the file a kernel is defined in: change a kernel in another file that it calls, and
the old machine code comes back. So our cache lives in a folder named by a digest of all kernel
sources, of numba's and llvmlite's versions and of whether indices are checked (NUMBA_BOUNDSCHECK);
another digest is another folder.

The folder is `$TIERSTORE_KERNEL_CACHE`, else `$XDG_CACHE_HOME/tierstore/kernels`, else
`~/.cache/tierstore/kernels`. Where it cannot be written, kernels compile anew in each process,
and one warning says so. numba's global settings, which other libraries in the process share, are
left alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import llvmlite
import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile

BROKEN = (EOFError, pickle.UnpicklingError)  # what a file of the cache raises that is not whole
KERNEL_FOLDERS = (
    ("engram_client", "arena"),
    ("engram_client", "hashing"),
    ("engram_client", "kernels"),
    ("tierstore", "kernels"),
    ("tierstore", "kernels/optimizers"),
)


def kernel_sources() -> list[Path]:
    """Every file whose text can change what a kernel compiles to."""
    found = [Path(__file__)]
    for package, folder in KERNEL_FOLDERS:
        spec = importlib.util.find_spec(package)
        for root in spec.submodule_search_locations or () if spec else ():
            found += sorted(Path(root, folder).glob("*.py"))
    return found


def sources_digest(sources: list[Path]) -> str:
    """16 hexadecimal digits over file names, file contents and compiler."""
    checked = "checked" if numba.config.BOUNDSCHECK else ""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {checked}".encode())
    for path in sources:
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_root() -> Path:
    if chosen := os.environ.get("TIERSTORE_KERNEL_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tierstore" / "kernels"


@cache
def cache_folder() -> Path | None:
    """The folder for this set of sources, created; None where it cannot be written."""
    return usable_folder(cache_root() / sources_digest(kernel_sources()))


def usable_folder(folder: Path) -> Path | None:
    """`folder`, created; None where it cannot be written, which a warning says."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
        reason = "it is not writable"
    except OSError as error:
        reason = str(error)
    warnings.warn(_unusable(folder, reason), stacklevel=2)
    return None


def _unusable(folder: Path, reason: str) -> str:
    return (
        f"kernel cache {folder} cannot be used ({reason}): kernels compile anew in each process, "
        "which costs several seconds; set TIERSTORE_KERNEL_CACHE to a writable folder"
    )


class _DigestLocator:
    """Tells numba where to keep one function's machine code (its cache-locator interface)."""

    folder: ClassVar[Path]

    def __init__(self, py_func: Callable[..., Any]) -> None:
        self._py_func = py_func

    def ensure_cache_path(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(self.folder)

    def get_source_stamp(self) -> str:
        return self.folder.name

    def get_disambiguator(self) -> str:
        return str(self._py_func.__code__.co_firstlineno)

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _DigestLocator:
        return cls(py_func)


class KernelFiles(IndexDataCacheFile):  # type: ignore[misc]
    """The machine code of one kernel: a file for each specialisation, and an index.

    numba numbers the files. Of two processes that compile different specialisations at once each may take
    number 1, and the index then leads from one's types to the other's machine code. So a file is named by
    what it is for; all that such a race can cost is an entry of the index, and compiling once more.

    A file that was cut when the machine went down counts as missing; a disk that takes none is said once.
    """

    def load(self, key: object) -> Any:
        try:
            return super().load(key)
        except BROKEN:
            return None

    def save(self, key: object, data: object) -> None:
        number = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
        name = self._data_name(number)
        try:
            self._save_data(name, data)
            overloads = self._load_index()
            if overloads.get(key) != name:
                self._save_index({**overloads, key: name})
        except OSError as error:
            warnings.warn(_unusable(Path(self._cache_path), str(error)), stacklevel=2)

    def _load_index(self) -> dict[object, str]:
        try:
            found: dict[object, str] = super()._load_index()
        except BROKEN:
            return {}
        return found


class _KernelCache(FunctionCache):  # type: ignore[misc]
    """numba's cache of a function's machine code; `_cache_in` says in which folder."""

    def __init__(self, py_func: Callable[..., Any]) -> None:
        super().__init__(py_func)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = KernelFiles(self._cache_path, self._impl.filename_base, stamp)


@cache
def _cache_in(folder: Path) -> Any:
    locator = type("_Locator", (_DigestLocator,), {"folder": folder})
    implementation = type("_CacheImpl", (CompileResultCacheImpl,), {"_locator_classes": [locator]})
    return type("_CacheIn", (_KernelCache,), {"_impl_class": implementation})


def kernel(function: Callable[..., Any]) -> Any:
    """Compile `function` without the GIL at its first call; keep the machine code on disk."""
    return compiled(function, cache_folder())


def compiled(function: Callable[..., Any], folder: Path | None) -> Any:
    """As `kernel`, with the machine code in `folder`, which no other sources may use; None keeps none."""
    dispatcher: Any = numba.njit(nogil=True, error_model="numpy")(function)
    if folder:
        dispatcher._cache = _cache_in(folder)(dispatcher.py_func)
    return dispatcher


def inline_kernel(function: Callable[..., Any]) -> Any:
    """A small function that only other kernels call; it is compiled into them."""
    return numba.njit(nogil=True, error_model="numpy", inline="never")(function)

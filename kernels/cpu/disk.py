"""Compiled functions on disk, where Numba keeps them: whatever the disk does costs time only.

Numba raises where it finds no place to write to, where a file is damaged and where the disk is full, out of a
call that could have been computed. Here the function is then compiled, and lives in memory.
"""

import hashlib
import pickle
import warnings
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler import Compiler
from numba.core.sigutils import normalize_signature

from .. import room

_told: list[str] = []


def tell(why: str) -> None:
    """Warn, once in a process."""
    if not _told:
        _told.append(why)
        warnings.warn(
            f"numbaloss cannot keep compiled kernels on disk ({why}): each process compiles its own, which "
            "takes seconds. NUMBA_CACHE_DIR names another directory for them.",
            RuntimeWarning,
            stacklevel=2,
        )


class Files(IndexDataCacheFile):
    """Numba's files of a function; machine code begins with a digest of the rest."""

    def _load_index(self) -> Any:
        room.used(self._index_path)
        try:
            return super()._load_index()
        except Exception:  # pickle may raise anything of a damaged file; this one is then written anew
            return {}

    def _save_data(self, name: str, data: Any) -> None:
        code = self._dump(data)
        path = self._data_path(name)
        with self._open_for_write(path) as file:
            file.write(hashlib.sha256(code).digest() + code)
        room.stored(path, len(code))

    def _load_data(self, name: str) -> Any:
        path = self._data_path(name)
        room.used(path)
        with open(path, "rb") as file:
            digest, code = file.read(32), file.read()
        if hashlib.sha256(code).digest() != digest:
            raise OSError("the file is damaged")  # which Numba takes for one that is not there
        return pickle.loads(code)


class Disk(FunctionCache):
    """Numba's cache of a function, which raises nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = Files(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except OSError:
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            tell(str(error))


def cache_of(function: Callable[..., Any]) -> Any:
    """The cache of a function: on disk, or nowhere."""
    try:
        return Disk(function)
    except (RuntimeError, OSError) as error:
        tell(str(error))
        return NullCache()


def kept(signature: Any = None, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """As ``njit(signature, cache=True, **options)``."""

    def decorate(function: Callable[..., Any]) -> Any:
        made = njit(**options)(function)
        made._cache = cache_of(function)
        if signature is not None:
            made.compile(signature)
            made.disable_compile()
        return made

    return decorate


def kept_c(signature: Any, pipeline_class: Any = Compiler, **options: Any) -> Callable[..., Any]:
    """As ``cfunc(signature, pipeline_class, cache=True, **options)``."""

    def decorate(function: Callable[..., Any]) -> Any:
        made: Any = CFunc(function, normalize_signature(signature), {}, options, pipeline_class)
        made._cache = cache_of(function)
        made.compile()
        return made

    return decorate

"""Runs a serial or a parallel kernel, whichever cannot take the caller's process down.

Bare Numba kills a forked child that enters a parallel kernel on OpenMP, and the whole process when two
threads are inside one on its workqueue. So: in a forked child kernels run serially; and on a layer that is
not safe for threads a lock admits one thread, while the others, rather than wait, run the serial kernel.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.np.ufunc import parallel as numba_parallel

_forked = False
_exclusive: bool | None = None  # whether the layer admits one thread at a time; None before it is launched
_lock = threading.Lock()


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def find_tbb() -> Path | None:
    """A libtbb that was installed by pip: it lies where the dynamic loader does not look."""
    path = Path(sys.prefix, "lib", "libtbb.so.12")
    return path if path.exists() else None


def _launch() -> bool:
    """Start Numba's threads, on TBB where it is installed, and say whether the layer needs the lock."""
    global _exclusive
    with _lock:
        if _exclusive is None:
            path = find_tbb()
            if path is not None and not numba_parallel._is_initialized:
                try:
                    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
                except OSError:  # built for another machine: Numba goes on to the next layer
                    path = None
            numba_parallel._launch_threads()
            _exclusive = numba.threading_layer() not in ("tbb", "omp")
    return _exclusive


def run(serial: Callable[[], Any], parallel: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
    """Call the kernel that `parallel` gives, on all threads, or else the one that `serial` gives."""
    if _forked:
        return serial()(*arguments)
    exclusive = _launch() if _exclusive is None else _exclusive
    if numba.get_num_threads() == 1:
        return serial()(*arguments)
    if not exclusive:
        return parallel()(*arguments)
    if not _lock.acquire(blocking=False):
        return serial()(*arguments)
    try:
        return parallel()(*arguments)
    finally:
        _lock.release()

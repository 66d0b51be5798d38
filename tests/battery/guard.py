"""Arrays that end, or begin, at memory that no one may touch: a read beyond them ends the process."""

import ctypes
import mmap
import sys
from typing import Any

import numpy as np

HERE = sys.platform == "linux"
NO_ACCESS = 0


def guarded(array: np.ndarray, before: bool = False) -> np.ndarray:
    """Copy an array to the end of pages that a forbidden one follows, or to the start of those after one.

    Where memory can't be forbidden it is a plain copy.
    """
    if not HERE or not array.size:
        return array.copy()
    page = mmap.PAGESIZE
    pages = -(-array.nbytes // page)
    memory: Any = mmap.mmap(-1, (pages + 1) * page)
    whole = np.frombuffer(memory, np.uint8)  # keeps the mapping for as long as a view of it lives
    forbidden = whole.ctypes.data + (0 if before else pages * page)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    if protect(forbidden, page, NO_ACCESS):
        raise OSError(ctypes.get_errno(), "mprotect")
    start = page if before else pages * page - array.nbytes
    copy = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy

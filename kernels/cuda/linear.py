"""What the terms of `linear_cross_entropy` count for: settled before a score is computed."""

from typing import Any

import numpy as np

from ..bind import bind
from .reduce import THREADS
from .rows import INTEGERS, look
from .target import Binary, compile, cuda, record, storage, types

# Bound by `kernel`; named here for readers and checkers.
T: Any = np.float32
OWN_ONLY: Any = True


def settle(labels, weight, sample_weight, rows, positions, classes, ignore, chosen, shares, faults):
    """Store each term's share, and a class that may index: what counts nothing has no share.

    A class index out of range makes the share NaN, and is recorded. Arrays are in the order (positions,
    rows); what is recorded is the place in the order (rows, positions).
    """
    n = rows * positions
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    while i < n:
        live, fill, label, share, _, _ = look(
            labels, weight, sample_weight, None, i, n, classes, ignore, T(1), OWN_ONLY, False, faults
        )
        if fill != fill:
            record(faults, i % rows * positions + i // rows, label)
        chosen[i] = label if live else 0
        shares[i] = share if live else fill
        i += cuda.gridDim.x * THREADS


def kernel(code: int, own_only: bool) -> Any:
    """`settle` for shares of one storage; `own_only` says that a row counts nothing if its class does not."""
    scope = dict(T=storage(code).T, OWN_ONLY=own_only)
    return bind(settle, scope, "settle", (code, own_only), lambda f: f)


def compile_settle(
    code: int, cc: tuple[int, int], own_only: bool, weighted: bool, sample_weighted: bool
) -> Binary:
    """Compile `settle`, to be launched as `rows.counts` is."""
    numbers = storage(code).pointer
    arguments = (
        INTEGERS,
        numbers if weighted else types.none,
        numbers if sample_weighted else types.none,
        *[types.int64] * 4,
        INTEGERS,
        numbers,
        INTEGERS,
    )
    return compile(kernel(code, own_only), arguments, cc, THREADS)

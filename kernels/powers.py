"""Sums of a row's exponentials, of which ranks have parts, as they exchange them.

A rank whose largest score is m divides its sum of e**x by 2**k, with k the nearest to m / log(2): the sums
of all ranks come to one scale by powers of two, which round nothing. Where m is beyond `LARGE`, a score less
m is exact, and the sum is of e**(x - m).
"""

from typing import Any

import numpy as np

LARGE = 2048.0
LOG_2, LOG2_E = float(np.log(2)), float(1 / np.log(2))
LOG_2_PARTS = 0.6931471803691238, 1.9082149292705877e-10  # multiples of the first are exact


def scale_of(m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what sums by largest scores m are divided by: e**base and 2**k."""
    base = np.where(abs(m) <= LARGE, 0.0, m)
    return base, np.rint((m - base) * LOG2_E)


def between(m: np.ndarray, top: np.ndarray) -> np.ndarray:
    """Return what sums by m are multiplied by, to be sums by `top`, which is not smaller."""
    (base, k), (then_base, then_k) = scale_of(m), scale_of(top)
    n: Any = k - then_k
    exact = np.ldexp(1.0, np.where(abs(n) < 2000, n, -2000).astype(np.int64))
    high, low = LOG_2_PARTS
    return np.where(base == then_base, exact, np.exp(base - then_base + n * high + n * low))


def from_largest(m: np.ndarray) -> np.ndarray:
    """Return what sums of e**(x - m) are multiplied by, to be sums by m."""
    (base, k), (high, low) = scale_of(m), LOG_2_PARTS
    return np.exp(m - base - k * high - k * low)

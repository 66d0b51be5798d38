"""Sums of many numbers, in an order that no processor changes; see `target` for what a lane is."""

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from ..bind import bind
from .native import LINKED, at_address
from .target import WIDTH, add_lanes, new_lanes, sum_of_lanes

# Bound by `summer`: a dtype's type and its bytes, and how many numbers are added up side by side.
T: Any = np.float32
ITEM: Any = 4
LANES: Any = 16


def sum_in_lanes(at, count):
    """Return the sum, in float64, of numbers at an address."""
    lanes, numbers = new_lanes(LANES, 0.0), at_address(at, T(0))
    for start in range(0, count - LANES + 1, LANES):
        add_lanes(lanes, at_address(at + start * ITEM, T(0)), LANES)
    total = sum_of_lanes(lanes, LANES)
    for i in range(count - count % LANES, count):
        total += numbers[i]
    return total


def lanes_of(dtype: np.dtype) -> int:
    """Return how many numbers of a dtype are added up side by side in float64."""
    return WIDTH // 4 // dtype.itemsize


@cache
def summer(dtype: np.dtype) -> Any:
    """Return `sum_in_lanes`, for compiled code, of a dtype."""
    scope = dict(T=dtype.type, ITEM=dtype.itemsize, LANES=lanes_of(dtype))
    return bind(sum_in_lanes, scope, dtype.name, dtype.name, njit(**LINKED))

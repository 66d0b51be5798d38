"""The constant that minimises a sum: one number, between bounds, or several."""

from collections.abc import Callable

import numpy as np


def root(sums: Callable[[float], tuple[float, float, float]]) -> float:
    """Return where a sum is least.

    Newton's steps from 0, between bounds where the slope changes sign. The bounds are halved where those
    steps are of no use, as where there is no curvature.

    Parameters
    ----------
    sums : function
        Gives value, slope and curvature at a number.
    """
    low, high, at, stride, last = -np.inf, np.inf, 0.0, 1.0, np.inf
    start = abs(sums(0.0)[0])
    for _ in range(300):
        _, slope, bend = sums(at)
        if slope == 0:
            break
        if np.isnan(slope):  # beyond the domain, on the side that was gone to
            falls = at < 0
        else:
            falls = slope < 0
        low, high = (at, high) if falls else (low, at)
        step = -slope / bend if bend > 0 else 0.0
        if np.isinf(high - low):
            if np.isfinite(start) and abs(slope) * stride <= 1e-12 * start:
                break  # the minimum lies at infinity
            step = np.copysign(max(abs(step), stride), 1.0 if falls else -1.0)
            stride *= 2
        elif not (low < at + step < high and 0 < abs(step) <= 0.5 * last):
            step = 0.5 * (low + high) - at
        if abs(step) <= 1e-15 * abs(at):
            break
        last, at = abs(step), at + step
    return float(at)


def minimum(
    sums: Callable[[np.ndarray], tuple[float, np.ndarray]], at: np.ndarray, scale: float
) -> np.ndarray:
    """Return where a sum is least.

    Newton's steps, the Hessian by differences of gradients, each halved until the value falls.

    Parameters
    ----------
    sums : function
        Gives value and gradient at a vector.
    at : array
        Where to begin.
    scale : float
        The size of a gradient; one of 1e-12 of it counts as none.
    """
    value, slope = sums(at)
    for _ in range(100):
        if np.abs(slope).max() <= 1e-12 * scale:
            break
        shifts = 1e-5 * np.eye(at.size)
        hessian = np.array([sums(at + d)[1] - sums(at - d)[1] for d in shifts]) / 2e-5
        # The least of all steps: none along a direction in which nothing changes.
        step = -np.linalg.lstsq(hessian + hessian.T, 2 * slope, rcond=1e-9)[0]
        if not slope @ step < 0:
            step = -slope / scale
        for _ in range(40):
            found = sums(at + step)
            if found[0] < value:
                break
            step = step / 2
        else:
            break
        at, (value, slope) = at + step, found
    return at

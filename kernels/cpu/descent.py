"""Derivatives of minus a loss, to call in ``@njit`` code: of elements, and of a row of class scores.

Programs that ascend ask for them: the slopes and second derivatives of minus the loss, times a weight. All is
float64, and written plainly: such programs call with few elements, or one row, at a time.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from ..lift import lift_curvature, lift_scores
from ..math import select
from ..spec import Scalars, ScoreFunctions
from .elementwise import checker, lift
from .target import derivatives

PLAIN: dict[str, Any] = dict(nogil=True, error_model="numpy")


@cache
def compile_descents(scalars: Scalars, options: tuple[Any, ...], policy: str, floor: float | None) -> Any:
    """``descents(x, t, w)``: a row ``(-slope, -curvature)`` for each element, times its weight.

    `x`, `t` and `w` have one axis; `w` may be None. A weight of zero gives exactly zero.
    """
    jets = derivatives()
    derived = lift_curvature(lift(scalars, 0), scalars, policy, 0, jets)
    values, floored, least = jets.options(options), floor is not None, float(floor or 0.0)
    holds = checker(scalars.domains, np.float64)
    outside = f"{scalars.name}: an element is out of its domain"

    @njit(**PLAIN)
    def descents(x, t, w):
        pairs = np.empty((x.size, 2))
        o = values(0, 0.0)
        for k in range(x.size):
            xk, tk = float(x[k]), float(t[k])
            factor = -1.0 if w is None else -float(w[k])
            _, slope, bend = derived(xk, tk, 0.0, o)
            if floored and bend < least:
                bend = least
            if factor != 0.0 and not holds(xk, tk, 0.0):
                raise ValueError(outside)
            pairs[k, 0] = select(factor != 0.0, factor * slope, 0.0)
            pairs[k, 1] = select(factor != 0.0, factor * bend, 0.0)
        return pairs

    return descents


@cache
def compile_row_descent(
    functions: ScoreFunctions,
    options: tuple[Any, ...],
    class_weight: tuple[float, ...] | None,
    ignore_index: int,
    smoothing: float,
    softcap: float | None,
    lse_square: float,
) -> Any:
    """``descent(x, label, w)``: minus the gradient by a row's scores, and minus their Hessian, times `w`.

    With probabilities p, the label's indicator d, targets t and their sum W, the statistics' gradients are
    ``d - p``, ``W p - t`` and ``p`` (see `lift`), and their Hessians multiples of ``diag(p) - p p'``.
    """
    lifted = lift_scores(functions, derivatives(), True, lse_square != 0.0)
    values = derivatives().options(options)
    cap, capped = float(softcap or 1.0), softcap is not None
    table = np.array(class_weight or (1.0,))
    count = len(class_weight or ())
    no_class = f"{functions.name}: target holds a class index that is out of range"
    no_weight = f"{functions.name}: weight must have one element per class"

    @njit(**PLAIN)
    def descent(x, label, w):
        C = x.size
        gradient, hessian = np.zeros(C), np.zeros((C, C))
        own = int(label)
        if label == ignore_index or w == 0.0:
            return gradient, hessian
        if own != label or not 0 <= own < C:
            raise IndexError(no_class)
        if count and count != C:
            raise ValueError(no_weight)
        z, p, t = np.empty(C), np.empty(C), np.empty(C)
        for c in range(C):
            z[c] = cap * np.tanh(x[c] / cap) if capped else x[c]
        top, total, rest, mass, cross = z.max(), 0.0, 0.0, 0.0, 0.0
        for c in range(C):
            p[c] = np.exp(z[c] - top)
            total += p[c]
        lse = top + np.log(total)
        for c in range(C):
            p[c] /= total
            weight = table[c] if count else 1.0
            t[c] = weight * (smoothing / C + ((1.0 - smoothing) if c == own else 0.0))
            mass += t[c]
            if c != own:
                rest += p[c]
            if t[c] != 0.0:
                cross += t[c] * (lse - z[c])
        weight = table[own] if count else 1.0
        _, by_a, by_b, by_n, aa, bb, nn, ab, an, bn = lifted(
            z[own] - lse, rest, p[own], weight, cross, lse, lse_square, values(0, 0.0)
        )
        scale = mass * by_b + by_n - by_a  # of the statistics' own Hessians
        for c in range(C):
            a = rest if c == own else -p[c]
            b, n = mass * p[c] - t[c], p[c]
            gradient[c] = by_a * a + by_b * b + by_n * n
            for d in range(C):
                e = rest if d == own else -p[d]
                f, q = mass * p[d] - t[d], p[d]
                h = aa * a * e + bb * b * f + nn * n * q
                h += 0.5 * (ab * (a * f + b * e) + an * (a * q + n * e) + bn * (b * q + n * f))
                hessian[c, d] = h + scale * ((p[c] if c == d else 0.0) - p[c] * p[d])
        if capped:
            for c in range(C):
                slope = 1.0 - (z[c] / cap) ** 2
                for d in range(C):
                    hessian[c, d] *= slope
                    hessian[d, c] *= slope
                hessian[c, c] -= gradient[c] * 2.0 * z[c] / (cap * cap) * slope
                gradient[c] *= slope
        return -w * gradient, -w * hessian

    return descent

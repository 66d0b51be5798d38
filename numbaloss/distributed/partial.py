"""A loss of a part of a batch, which others are added to."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Partial:
    """The sum of a part's terms, and what it counts for in a mean. Parts are added up in the order given.

    Attributes
    ----------
    sum, count : float
        In float64.
    error : float
        What rounding has lost of the sum so far: it is carried along, so that sums do not depend on how parts
        are grouped.
    """

    sum: float
    count: float
    error: float = 0.0

    def __add__(self, other: Any) -> "Partial":
        if isinstance(other, int) and other == 0:  # `sum` begins with it
            return self
        if not isinstance(other, Partial):
            return NotImplemented
        total = self.sum + other.sum
        lost = 0.0
        if np.isfinite(total):  # Knuth's sum of two: what is lost is a float64 too
            back = total - self.sum
            lost = (self.sum - (total - back)) + (other.sum - back)
        return Partial(total, self.count + other.count, self.error + other.error + lost)

    __radd__ = __add__

    @property
    def total(self) -> float:
        """The sum, what was lost included."""
        return self.sum + self.error

    @property
    def mean(self) -> float:
        """The sum over the count; NaN of nothing."""
        return self.total / self.count if self.count else float("nan")


def partial(loss: Any, *arrays: Any, **options: Any) -> Partial:
    """Return a loss of a part of a batch, as a sum and a count.

    Parameters
    ----------
    loss : LossFunction or Loss
    *arrays, **options
        As `loss` takes them. `reduction` may be left out; it is that of the mean that is to be had.

    Returns
    -------
    Partial

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> x, y = np.array([0.0, 1.0, 5.0]), np.zeros(3)
    >>> part = nl.distributed.partial
    >>> round((part(nl.mse_loss, x[:1], y[:1]) + part(nl.mse_loss, x[1:], y[1:])).mean, 4)
    8.6667
    """
    return Partial(*loss._run("partial", arrays, options))

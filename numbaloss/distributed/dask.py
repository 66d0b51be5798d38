"""Objectives over Dask's blocks: for optimisers and hand-written loops.

The blocks stay where they are: each becomes a `numbaloss.optimize.LinearObjective` on its worker, once. An
evaluation sends the parameters to each, and adds up values and gradients in a tree, a few at a time and in
the blocks' order: futures, and no graph of arrays that is made anew each time.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..loss import LossFunction
from ..optimize import LinearObjective, operands_of

try:
    from distributed import default_client
except ImportError as error:
    raise ImportError("numbaloss.distributed.dask needs Dask: pip install 'dask[distributed]'") from error

__all__ = ["BlockObjective", "objective"]

FAN = 8  # results that are added up at a time


# ---- on workers -----------------------------------------------------------------------------------------


def count(loss: Any, *arrays: Any, **options: Any) -> float:
    """Return what a block's mean divides by."""
    names = operands_of(loss)[1:]
    return float(loss.count(**dict(zip(names, arrays, strict=True)), **options))


def build(
    loss: Any, outputs: int | None, options: dict[str, Any], weight: Any, *arrays: Any
) -> LinearObjective:
    """Return the objective of one block."""
    given = options if weight is None else {**options, "sample_weight": weight}
    make: Callable[..., LinearObjective] = LinearObjective
    return make(loss, *arrays, outputs=outputs, **given)


def evaluate(block: LinearObjective, name: str, *arguments: Any) -> Any:
    """Call one of a block's methods."""
    return getattr(block, name)(*arguments)


def add_up(*results: Any) -> Any:
    """Return the sum of arrays, or of values and gradients, in their order."""
    if isinstance(results[0], tuple):
        return tuple(map(add_up, *results))
    total = results[0]
    for result in results[1:]:
        total = total + result
    return total


# ---- at the client --------------------------------------------------------------------------------------


class BlockObjective:
    """A loss of a linear model's parameters, of rows in many blocks: see `objective`.

    Value and gradient at a point are computed once. The methods are those of
    `numbaloss.optimize.LinearObjective`: ``value``, ``gradient``, ``value_and_grad``, ``hess``, ``hessp``.
    """

    def __init__(self, client: Any, blocks: list[Any]) -> None:
        self.client, self.blocks = client, blocks
        self._x: np.ndarray | None = None
        self._found: Any = None

    def _sum(self, name: str, *arguments: Any) -> Any:
        """Call a method of each block, and add up."""
        each = [self.client.submit(evaluate, b, name, *arguments, pure=False) for b in self.blocks]
        while len(each) > 1:
            each = [
                self.client.submit(add_up, *each[k : k + FAN], pure=False) for k in range(0, len(each), FAN)
            ]
        return each[0].result()

    def value_and_grad(self, x: Any) -> tuple[float, np.ndarray]:
        """Value and gradient (P) at parameters (P)."""
        x = np.array(x, np.float64)
        if self._x is None or not np.array_equal(x, self._x):
            self._x = None
            self._found, self._x = self._sum("value_and_grad", x), x
        value, gradient = self._found
        return value, gradient.copy()

    def value(self, x: Any) -> float:
        """The loss at parameters (P)."""
        return self.value_and_grad(x)[0]

    def gradient(self, x: Any) -> np.ndarray:
        """The gradient (P)."""
        return self.value_and_grad(x)[1]

    def hess(self, x: Any) -> np.ndarray:
        """The Hessian (P, P)."""
        return self._sum("_hess", np.array(x, np.float64))

    def hessp(self, x: Any, v: Any) -> np.ndarray:
        """The product (P) of the Hessian and a vector."""
        return self._sum("_hessp", np.array(x, np.float64), np.array(v, np.float64))


def objective(
    loss: Any,
    X: Any,
    *arrays: Any,
    sample_weight: Any = None,
    outputs: int | None = None,
    client: Any = None,
    **options: Any,
) -> BlockObjective:
    """Make a loss of a linear model's parameters, of Dask arrays in blocks of rows.

    Parameters
    ----------
    loss : LossFunction or Loss
        One of your own too, of ``__main__`` or a notebook.
    X : dask array, (N, F)
        In blocks of whole rows. Persist it, if reading it takes long: a block that is lost is made again.
    *arrays : dask arrays, (N, ...)
        The loss's other arrays, the target first, in blocks of the same rows.
    sample_weight : dask array, (N), optional
        In blocks of the same rows.
    outputs : int, optional
        Of a model with several outputs, as classes: parameters are then (outputs, F), flat.
    client : distributed.Client, optional
        The current one by default.
    **options
        Of the loss.

    Returns
    -------
    BlockObjective
        Sums, and means of all rows, whatever the blocks' sizes.

    Raises
    ------
    TypeError
        If an array is none of Dask's.
    ValueError
        If blocks do not have the same whole rows, or the reduction is ``'none'``; at a point, what the loss
        raises.

    Examples
    --------
    >>> import dask.array as da, numpy as np, numbaloss as nl
    >>> from distributed import Client
    >>> with Client(processes=False, dashboard_address=None) as client:  # doctest: +SKIP
    ...     X, y = da.random.normal(size=(1000, 3), chunks=(100, 3)), da.ones(1000, chunks=100)
    ...     fit = nl.distributed.dask.objective(nl.huber_loss, X, y)
    ...     scipy.optimize.minimize(fit.value_and_grad, np.zeros(3), jac=True)
    """
    client = default_client() if client is None else client
    given: list[Any] = [X, *arrays] + ([] if sample_weight is None else [sample_weight])
    for a in given:
        if not hasattr(a, "to_delayed") or not hasattr(a, "chunks"):
            raise TypeError(f"objective: X and the other arrays must be Dask's, got {type(a).__name__}")
        if a.chunks[0] != X.chunks[0] or any(len(c) != 1 for c in a.chunks[1:]):
            raise ValueError(
                f"objective: arrays must have blocks of the same whole rows, got {X.chunks} and {a.chunks}"
            )
    reduction = options.get("reduction", "mean" if isinstance(loss, LossFunction) else loss.reduction)
    if reduction == "none":
        raise ValueError("objective: reduction must be 'mean' or 'sum', got 'none'")
    blocks = [client.compute(list(a.to_delayed().ravel())) for a in given]
    weights = blocks.pop() if sample_weight is not None else [None] * len(blocks[0])
    if reduction != "sum" and "normalizer" not in options:
        counts = [
            client.submit(count, loss, *others, **options, **({} if w is None else {"sample_weight": w}))
            for w, *others in zip(weights, *blocks[1:], strict=True)
        ]
        options = {**options, "normalizer": sum(client.gather(counts))}
    made = [
        client.submit(build, loss, outputs, options, w, *each)
        for w, *each in zip(weights, *blocks, strict=True)
    ]
    return BlockObjective(client, made)

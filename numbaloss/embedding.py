"""Losses of embeddings: how far vectors are apart."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np

from . import dispatch, memory
from .arguments import (
    Operand,
    distance,
    flag,
    non_negative,
    order,
    positive,
    real,
    reduction,
    scores,
    signs,
)
from .dispatch import FLOAT32, FLOAT64
from .elementwise import LARGE
from .kernels.cpu import threads
from .loss import GRAD, MISSING, VALUE, VALUE_GRAD_HESS, Recipe, call_arguments, resolve_wrt
from .rows import RowLoss, Terms, flat, places, workers

COSINE_EPS = 1e-12  # under each squared norm, as in PyTorch
DISTANCE_EPS = 1e-6  # added to each coordinate's difference, as in PyTorch's PairwiseDistance

# Coordinates from which two threads beat one.
PARALLEL_FROM = 16384


@cache
def kernel(plain: bool, three: bool, dtype: np.dtype, parallel: bool) -> Any:
    from .kernels.cpu import vectors  # on the first call, so that importing the library stays quick

    return (vectors.compile_plain if plain else vectors.compile_vectors)(three, dtype, parallel)


class Problem(NamedTuple):
    """A checked call."""

    vectors: tuple[np.ndarray, ...]
    labels: np.ndarray | None
    terms: Terms
    dtype: np.dtype  # that the arrays promote to
    arithmetic: np.dtype


class Metric(NamedTuple):
    """A distance as the kernel takes it."""

    kind: int
    p: float = 2.0
    eps: float = 0.0


class Quick(NamedTuple):
    """What a quick call's options come to."""

    settings: tuple[Any, ...]  # as the kernel takes them
    wrt: tuple[int, ...]  # vectors to differentiate
    single: bool


class VectorLoss(RowLoss):
    """A loss with one term for each row of two or three arrays of vectors, shape (..., D)."""

    _labelled: ClassVar[bool] = False  # whether the last operand holds a label for each row

    # ---- what a loss states ------------------------------------------------------------------------
    @classmethod
    def _complete(cls) -> bool:
        return "margin" in cls.fields

    @classmethod
    def _metric(cls, options: dict[str, Any]) -> Metric:
        """The distance that the kernel computes."""
        raise NotImplementedError

    # ---- the call ----------------------------------------------------------------------------------
    @classmethod
    def _vector_names(cls) -> tuple[str, ...]:
        return cls._required[: len(cls._required) - cls._labelled]

    @classmethod
    def _differentiable(cls) -> tuple[str, ...]:
        return cls._vector_names()

    @classmethod
    def _settings(cls, options: dict[str, Any], factor: float, divisor: float) -> tuple[Any, ...]:
        return *cls._metric(options), options["margin"], options.get("swap", False), factor, divisor

    @classmethod
    def _run_kernel(cls, plain: bool, dtype: np.dtype, size: int, arguments: tuple[Any, ...]) -> float:
        three = len(cls._vector_names()) == 3
        if size < PARALLEL_FROM:
            return kernel(plain, three, dtype, False)(*arguments)
        return threads.run(
            lambda: kernel(plain, three, dtype, False), lambda: kernel(plain, three, dtype, True), arguments
        )

    @classmethod
    def _evaluate_quick(cls, mode: str, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Contiguous vectors of one dtype, no weights, a reduced value."""
        required = len(cls._required)
        settings = (*args[required:], *[kwargs[k] for k in recipe.keys]) if recipe.keys else args[required:]
        try:
            plan = recipe.plans.get(settings, MISSING)
        except TypeError:  # not hashable, so not right
            return MISSING
        if plan is MISSING:
            plan = recipe.plans[settings] = cls._plan_quick(mode, call_arguments(recipe, args, kwargs))
        x = args[0]
        if plan is None or x.__class__ is not np.ndarray:
            return MISSING
        dtype, shape, size = x.dtype, x.shape, x.size
        if (dtype is not FLOAT32 and dtype is not FLOAT64) or len(shape) != 2 or not size:
            return MISSING
        vectors = args[: required - cls._labelled]
        for a in vectors:
            if (
                a.__class__ is not np.ndarray
                or a.dtype is not dtype
                or a.shape != shape
                or not a.flags.carray
            ):
                return MISSING
        none = np.empty(0, dtype)
        labels = none
        if cls._labelled:
            labels = args[required - 1]
            if labels.__class__ is not np.ndarray or labels.shape != shape[:1]:
                return MISSING
            if labels.dtype is not dtype or not labels.flags.carray:
                if labels.dtype.kind not in "iuf":
                    return MISSING
                labels = labels.astype(dtype)
        out = kwargs.get("out")
        new = np.empty if size < LARGE else memory.empty
        gradients: Any = (
            [new(shape, dtype) for _ in plan.wrt] if out is None else (out,) if plan.single else out
        )
        if out is not None and not cls._may_write(gradients, plan.wrt, args[:required]):
            return MISSING
        outs = [none] * 3
        for k, g in zip(plan.wrt, gradients, strict=True):
            outs[k] = g.reshape(-1)
        ins = [a.reshape(-1) for a in vectors]
        arguments = (*ins, *[none] * (3 - len(ins)), *outs, labels, shape, plan.settings, workers())
        value = cls._run_kernel(True, dtype, size, arguments)
        if mode == VALUE:
            return dtype.type(value)
        result = gradients[0] if plan.single else tuple(gradients)
        return result if mode == GRAD else (dtype.type(value), result)

    @staticmethod
    def _may_write(outputs: Any, wrt: tuple[int, ...], operands: tuple[np.ndarray, ...]) -> bool:
        """Whether each output is plainly its vector, or memory of its own."""
        if outputs.__class__ is not tuple or len(outputs) != len(wrt):
            return False
        x = operands[0]
        for o in outputs:
            if o.__class__ is not np.ndarray or o.dtype is not x.dtype or o.shape != x.shape:
                return False
            if not o.flags.carray:
                return False
        # Two arrays that own their memory do not share it.
        apart = all(a.flags.owndata for a in (*operands, *outputs))
        for i, (k, o) in enumerate(zip(wrt, outputs, strict=True)):
            for j, a in enumerate((*operands, *outputs[:i])):
                if a is o:
                    if j != k:
                        return False
                elif not apart and np.may_share_memory(a, o):
                    return False
        return True

    @classmethod
    def _plan_quick(cls, mode: str, call: dict[str, Any]) -> Quick | None:
        """What the options come to; None where a quick call does not serve."""
        options = cls._options_of(call)
        if mode == VALUE_GRAD_HESS or options["reduction"] == "none":
            return None
        wrt, single = ((), False) if mode == VALUE else resolve_wrt(cls, call.get("wrt"))
        divisor = math.nan if options["reduction"] == "mean" else 1.0
        names = cls._vector_names()
        return Quick(cls._settings(options, 1.0, divisor), tuple(map(names.index, wrt)), single)

    @classmethod
    def _check(cls, call: dict[str, Any], options: dict[str, Any], wrt: tuple[str, ...]) -> Problem:
        name = cls.function.__name__
        floats: dict[str, np.ndarray] = {}
        names = cls._vector_names()
        for n in names:
            floats[n] = dispatch.floating(name, n, dispatch.as_array(name, n, call[n]))
            shape = floats[names[0]].shape
            if floats[n].shape != shape:
                raise ValueError(f"{name}: {n} must have {names[0]}'s shape {shape}, got {floats[n].shape}")
        cls._check_shape(shape)
        vectors = tuple(floats.values())
        labels = None
        if cls._labelled:
            label = cls._required[-1]
            labels = dispatch.as_array(name, label, call[label])
            if labels.shape != shape[:-1]:
                raise ValueError(
                    f"{name}: {label} must have shape {shape[:-1]}, one for each vector, got {labels.shape}"
                )
            if labels.dtype.kind not in "iu":
                labels = dispatch.floating(name, label, labels)
        terms = cls._terms(call, options, shape[:-1], floats)
        dtype = dispatch.common_dtype([a.dtype for a in floats.values()])
        return Problem(vectors, labels, terms, dtype, dispatch.arithmetic_dtype(dtype))

    @classmethod
    def _check_shape(cls, shape: tuple[int, ...]) -> None:
        if not shape or not shape[-1]:
            first = cls._required[0]
            raise ValueError(
                f"{cls.function.__name__}: {first} must have shape (..., D), D at least 1, got {shape}"
            )

    @classmethod
    def _compute(cls, p: Problem, options: dict[str, Any], outputs: dict[str, np.ndarray]) -> Any:
        names, shape = cls._vector_names(), p.vectors[0].shape
        rows = shape[:-1]
        arrays: list[np.ndarray | None] = [None] * 6
        arrays[: len(names)] = p.vectors
        arrays[3 : 3 + len(names)] = [outputs.get(n) for n in names]
        direct = [a is not None and a.dtype == p.arithmetic and a.flags.c_contiguous for a in arrays]
        terms = np.empty(math.prod(rows) if options["reduction"] == "none" else 0, p.arithmetic)
        arguments = (
            *places(arrays),
            np.array(direct, np.int64),
            (math.prod(rows), shape[-1]),
            flat(p.labels, rows, p.arithmetic),
            flat(p.terms.sample_weight, rows, p.arithmetic),
            flat(p.terms.upstream, rows, p.arithmetic),
            terms,
            cls._settings(options, p.terms.factor, p.terms.divisor),
            workers(),
        )
        value = cls._run_kernel(False, p.arithmetic, p.vectors[0].size, arguments)
        if options["reduction"] == "none":
            return terms.reshape(rows).astype(p.dtype, copy=False)
        return p.dtype.type(value)


class CosineEmbeddingLoss(VectorLoss, function="cosine_embedding_loss"):
    r"""Draws vectors of one label together, and pushes those of another apart, by the angle between them.

    .. math:: \ell = \begin{cases} 1 - \cos(x_1, x_2) & y = 1 \\
        \max(0, \cos(x_1, x_2) - \text{margin}) & y = -1 \end{cases}

    A target that is neither gives 0. As in PyTorch, 1e-12 is added to each squared norm, so that a vector of
    zeros has a finite gradient, and the gradient passes at exactly the clamp. Where a squared norm overflows
    the vectors are scaled first (PyTorch: NaN).

    Parameters
    ----------
    input1, input2 : array, shape (N, D) or (D)
    target : array, shape (N) or ()
        1 or -1, of any integer or floating dtype.
    margin : float, default 0.0
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If shapes do not fit, or an option is out of its domain.

    References
    ----------
    PyTorch, ``torch.nn.functional.cosine_embedding_loss``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> x, y = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 2.0], [3.0, 3.0]])
    >>> nl.cosine_embedding_loss(x, y, np.array([1, -1]), reduction="none").round(4)
    array([1.    , 0.7071])
    """

    margin: float = real(0.0, (0.0, 0.5, -0.3))
    reduction: str = reduction()

    _labelled = True

    @classmethod
    def _prepare(cls) -> None:
        labels = signs()
        cls.operands = {
            "input1": scores(),
            "input2": scores(),
            "target": Operand(draw=lambda rng, shape: labels.draw(rng, shape[:-1])),
        }
        cls._required = tuple(cls.operands)

    @classmethod
    def _metric(cls, options: dict[str, Any]) -> Metric:
        from .kernels.cpu import vectors

        return Metric(vectors.COSINE, eps=COSINE_EPS)

    @classmethod
    def _check_shape(cls, shape: tuple[int, ...]) -> None:
        super()._check_shape(shape)
        if len(shape) > 2:
            raise ValueError(f"{cls.function.__name__}: input1 must have shape (N, D) or (D), got {shape}")


class TripletLoss(VectorLoss):
    """A loss of triplets: an anchor, a positive that belongs to it, and a negative."""

    @classmethod
    def _prepare(cls) -> None:
        cls.operands = {n: scores() for n in ("anchor", "positive", "negative")}
        cls._required = tuple(cls.operands)


class TripletMarginLoss(TripletLoss, function="triplet_margin_loss"):
    r"""Wants the positive nearer to the anchor than the negative, by a margin.

    .. math:: \ell = \max\left(0, \text{margin} + \|a - p + \epsilon\|_p - \|a - n + \epsilon\|_p\right)

    With ``swap`` the second distance is the smaller of those from the negative to the anchor and to the
    positive; at a tie each takes half of the gradient. As in PyTorch, eps is added to each coordinate's
    difference, so identical points are :math:`\sqrt{D}\,\epsilon` apart, and the gradient passes at exactly
    the clamp. Where a power overflows or underflows the differences are scaled first (PyTorch: inf or NaN).

    Parameters
    ----------
    anchor, positive, negative : array, shape (..., D)
    margin : float, default 1.0
        Above 0.
    p : float, default 2.0
        Of the norm: at least 1, or inf.
    eps : float, default 1e-6
    swap : bool, default False
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If shapes differ, or an option is out of its domain.

    References
    ----------
    PyTorch, ``torch.nn.functional.triplet_margin_loss``. V. Balntas et al., Learning shallow convolutional
    feature descriptors with triplet losses, BMVC 2016.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> a, p, n = np.zeros((1, 2)), np.array([[3.0, 4.0]]), np.array([[3.3, 4.4]])
    >>> value, (by_a, by_p, by_n) = nl.triplet_margin_loss.value_and_grad(a, p, n)
    >>> round(float(value), 4), by_p.round(3).tolist(), by_n.round(3).tolist()
    (0.5, [[0.6, 0.8]], [[-0.6, -0.8]])
    """

    margin: float = positive(1.0)
    p: float = order(2.0)
    eps: float = non_negative(DISTANCE_EPS)
    swap: bool = flag(False)
    reduction: str = reduction()

    @classmethod
    def _metric(cls, options: dict[str, Any]) -> Metric:
        from .kernels.cpu import vectors

        p = options["p"]
        kinds = {1.0: vectors.SUM, 2.0: vectors.ROOT_OF_SQUARES, math.inf: vectors.LARGEST}
        return Metric(kinds.get(p, vectors.POWER), p, options["eps"])


class TripletMarginWithDistanceLoss(
    TripletLoss, function="triplet_margin_with_distance_loss", keyword_only=True
):
    r"""Wants the positive nearer to the anchor than the negative, by a margin, in a distance of one's own.

    .. math:: \ell = \max\left(0, \text{margin} + d(a, p) - d(a, n)\right)

    With ``swap`` the second distance is the smaller of those from the negative to the anchor and to the
    positive; at a tie each takes half of the gradient.

    Parameters
    ----------
    anchor, positive, negative : array, shape (..., D)
    distance_function : str or callable, optional
        ``'euclidean'`` (the default: the length of the difference, 1e-6 added to each coordinate, as in
        PyTorch's ``PairwiseDistance``), ``'sqeuclidean'``, ``'cosine'`` (1 less the cosine, 1e-12 under each
        squared norm), ``'manhattan'``: these are computed in the fused pass. Or a function over rows,
        ``d(x, y)`` with x and y of shape (..., D), that gives the distances, of shape (...). For gradients it
        must have an attribute ``value_and_grad``, a function of the same arguments that gives
        ``(distances, (by_x, by_y))``: each row's derivative by its x and its y, both (..., D). On a GPU it
        is given and gives arrays of the caller's library.
    margin : float, default 1.0
        Above 0.
    swap : bool, default False
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    TypeError
        If gradients are asked for, and the function has no ``value_and_grad``.
    ValueError
        If shapes differ, an option is out of its domain, or the function returns another shape.

    References
    ----------
    PyTorch, ``torch.nn.functional.triplet_margin_with_distance_loss``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> a, p, n = np.zeros((1, 2)), np.array([[1.0, 1.0]]), np.array([[0.0, 2.0]])
    >>> float(nl.triplet_margin_with_distance_loss(a, p, n, distance_function="manhattan"))
    1.0
    >>> def largest(x, y):
    ...     return abs(x - y).max(axis=-1)
    >>> float(nl.triplet_margin_with_distance_loss(a, p, n, distance_function=largest, margin=1.5))
    0.5
    """

    distance_function: object = distance()
    margin: float = positive(1.0)
    swap: bool = flag(False)
    reduction: str = reduction()

    _function_keyword_only = True

    @classmethod
    def _metric(cls, options: dict[str, Any]) -> Metric:
        from .kernels.cpu import vectors

        return {
            "euclidean": Metric(vectors.ROOT_OF_SQUARES, eps=DISTANCE_EPS),
            "sqeuclidean": Metric(vectors.SQUARES),
            "cosine": Metric(vectors.COSINE, eps=COSINE_EPS),
            "manhattan": Metric(vectors.SUM),
        }[options["distance_function"] or "euclidean"]

    @classmethod
    def _evaluate_quick(cls, mode: str, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Plans are kept by option, and a caller may make a function for each call.
        if callable(kwargs.get("distance_function")):
            return MISSING
        return super()._evaluate_quick(mode, recipe, args, kwargs)

    @classmethod
    def _compute(cls, p: Problem, options: dict[str, Any], outputs: dict[str, np.ndarray]) -> Any:
        distance = options["distance_function"]
        if not callable(distance):
            return super()._compute(p, options, outputs)
        measured = Measured(cls.function.__name__, distance, bool(outputs))
        return _compute_measured(p, options, outputs, measured)


class Measured:
    """The caller's distance, checked."""

    def __init__(self, loss: str, function: Callable[..., Any], gradients: bool) -> None:
        self.loss, self.gradients = loss, gradients
        self.function = getattr(function, "value_and_grad", None) if gradients else function
        if self.function is None:
            raise TypeError(
                f"{loss}: distance_function must have an attribute value_and_grad for gradients, "
                f"a function that gives (distances, (by_x, by_y)); got {function!r}"
            )

    def __call__(self, x: Any, y: Any) -> tuple[Any, tuple[Any, Any]]:
        """The distances of rows, and their derivatives by both vectors; without gradients, any two arrays."""
        found: Any = self.function(x, y)  # type: ignore[misc]
        by: tuple[Any, ...] = (x, y)
        if self.gradients:
            pair = isinstance(found, tuple) and len(found) == 2
            if not (pair and isinstance(found[1], tuple | list) and len(found[1]) == 2):
                got = f"a pair with {type(found[1]).__name__}" if pair else type(found).__name__
                raise TypeError(
                    f"{self.loss}: distance_function.value_and_grad must give (distances, (by_x, by_y)), "
                    f"got {got}"
                )
            found, by = found
        shape = tuple(x.shape)
        value = self.checked("distances", found, shape[:-1])
        return value, (self.checked("by_x", by[0], shape), self.checked("by_y", by[1], shape))

    def array(self, what: str, found: Any) -> Any:
        """What the caller's function gave, as an array."""
        return np.asarray(found)

    def checked(self, what: str, found: Any, shape: tuple[int, ...]) -> Any:
        array = self.array(what, found)
        if array.shape != shape:
            raise ValueError(
                f"{self.loss}: distance_function must give {what} of shape {shape}, got {array.shape}"
            )
        if array.dtype.kind not in "biu":
            array = dispatch.floating(self.loss, f"{what} of distance_function", array)
        return array


def _compute_measured(
    p: Problem, options: dict[str, Any], outputs: dict[str, np.ndarray], measured: Measured
) -> Any:
    """A triplet loss over the caller's distance: its rows' terms, and the chain to its derivatives."""
    a, b, c = (np.ascontiguousarray(v, p.arithmetic) for v in p.vectors)
    rows = a.shape[:-1]
    near, (near_a, near_b) = measured(a, b)
    far, (far_a, far_c) = measured(a, c)
    swapped, (swapped_b, swapped_c) = measured(b, c) if options["swap"] else (far, (b, c))
    near, far, swapped = (d.astype(np.float64) for d in (near, far, swapped))

    def chain(*parts: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        total = np.zeros(a.shape)
        for f, by in parts:
            total += np.multiply(f[..., None], by, where=f[..., None] != 0, out=np.zeros(a.shape))
        return total

    with np.errstate(all="ignore"):
        weight = np.ones(rows)
        if p.terms.sample_weight is not None:
            weight = np.broadcast_to(p.terms.sample_weight, rows).astype(np.float64)
        share = np.ones(rows)  # of the anchor in the negative's gradient
        if options["swap"]:
            share = np.where(far < swapped, 1.0, np.where(far == swapped, 0.5, 0.0))
        hinge = options["margin"] + near - np.minimum(far, swapped)
        live = (weight != 0) & ~(hinge < 0)
        terms = np.where(live, weight * hinge, 0.0)
        divisor = np.float64(weight.sum() if math.isnan(p.terms.divisor) else p.terms.divisor)
        up = 1.0 if p.terms.upstream is None else p.terms.upstream.astype(np.float64)
        factor = np.where(live, p.terms.factor / divisor * weight * up, 0.0)
        kept, moved = -factor * share, -factor * (1 - share)
        parts = {
            "anchor": [(factor, near_a), (kept, far_a)],
            "positive": [(factor, near_b), (moved, swapped_b)],
            "negative": [(kept, far_c), (moved, swapped_c)],
        }
        # All before the first is stored: a derivative may be a view of the other vector.
        found = {n: chain(*parts[n]) for n in outputs}
        for n, out in outputs.items():
            out[...] = found[n]
        if options["reduction"] == "none":
            return terms.astype(p.dtype)
        return p.dtype.type(terms.sum() / divisor)


cosine_embedding_loss = CosineEmbeddingLoss.function
triplet_margin_loss = TripletMarginLoss.function
triplet_margin_with_distance_loss = TripletMarginWithDistanceLoss.function

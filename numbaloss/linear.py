"""Cross entropy of scores that are a matrix product: a chunk of them at a time is in memory, never all."""

import copyreg
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import dispatch
from .arguments import Operand, Option, between, flag, integer, reduction, scores, weights
from .classes import Problem as ClassProblem
from .dispatch import FLOAT32, FLOAT64
from .multiclass import CrossEntropyLoss
from .rows import RowLoss, Terms

# A chunk, where the caller does not say: an eleventh of the scores, but at most so many rows, with which
# matrix products run at full speed, and at least so many bytes, below which cutting costs more than it saves.
SHARE, ROWS, LEAST = 11, 512, 24_000_000
TILE = 16  # rows that a matrix product does at a time: of a chunk, a multiple
SCRATCH = 2 << 20  # bytes that products are made in to be added up: they stay in cache

SAMPLE_CLASSES = 6

Index = slice | np.ndarray

whole_number = integer(0).check


@dataclass(frozen=True, slots=True)
class LinearCrossEntropyOptions:
    """How scores are cut into chunks of rows: by one of these at most.

    Parameters
    ----------
    batch_chunk_size : int, optional
        Rows of a chunk, as in PyTorch.
    memory_budget : int, optional
        Bytes that a chunk of scores may take, with what is made of it. One row at least is done at a time.
    """

    batch_chunk_size: int | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        given = {"batch_chunk_size": self.batch_chunk_size, "memory_budget": self.memory_budget}
        for n, value in given.items():
            if value is not None and whole_number(name, n, value) < 1:
                raise ValueError(f"{name}: {n} must be > 0, got {value}")
        if None not in given.values():
            raise ValueError(f"{name}: give batch_chunk_size or memory_budget, not both")


def _index_or_none() -> Any:
    index = integer(-100)

    def check(loss: str, name: str, value: Any) -> int | None:
        return None if value is None else index.check(loss, name, value)

    return Option(None, check, (None, 1), index.bad, annotation="int | None")


def _chunking() -> Any:
    def check(loss: str, name: str, value: Any) -> LinearCrossEntropyOptions | None:
        if not isinstance(value, LinearCrossEntropyOptions | None):
            raise TypeError(f"{loss}: {name} must be None or LinearCrossEntropyOptions, got {value!r}")
        return value

    samples = (None, LinearCrossEntropyOptions(batch_chunk_size=2))
    bad = ((1 << 20, TypeError, "LinearCrossEntropyOptions"),)
    return Option(None, check, samples, bad, annotation="LinearCrossEntropyOptions | None")


class Arrays(NamedTuple):
    """A call's arrays as they were given; checked is what shapes and dtypes tell."""

    input: Any
    linear_weight: Any
    linear_bias: Any
    target: Any
    probable: bool  # the target holds probabilities, not indices
    weight: Any
    terms: Terms
    shape: tuple[int, ...]  # of the terms
    dtype: np.dtype  # that the arrays promote to
    arithmetic: np.dtype


class Problem(NamedTuple):
    """A checked call, as if it had rows and one axis of positions: without them, they are of length one."""

    input: np.ndarray  # (rows, features)
    linear_weight: np.ndarray  # (classes, positions, features)
    linear_bias: np.ndarray | None  # (classes, positions)
    target: np.ndarray  # indices (rows, positions) in int64, or probabilities (rows, classes, positions)
    live: np.ndarray  # (rows, positions): the terms that count; of others nothing is read
    weight: np.ndarray | None
    sample_weight: np.ndarray | None  # (rows, positions)
    upstream: np.ndarray | None  # (rows, positions)
    factor: float  # of the gradient: grad_output, where it is a number
    divisor: float
    shape: tuple[int, ...]  # of the terms
    dtype: np.dtype  # that the arrays promote to
    arithmetic: np.dtype

    @property
    def matrix(self) -> np.ndarray:
        """The weight, a row for each score."""
        classes, positions, features = self.linear_weight.shape
        return self.linear_weight.reshape(classes * positions, features)

    def part(self, rows: Index, positions: slice) -> "Problem":
        """The problem of some rows and positions."""

        def of(terms: Any) -> Any:
            return None if terms is None else terms[rows][..., positions]

        return self._replace(
            input=np.ascontiguousarray(self.input[rows], self.arithmetic),
            linear_weight=self.linear_weight[:, positions],
            linear_bias=None if self.linear_bias is None else self.linear_bias[:, positions],
            target=of(self.target),
            live=of(self.live),
            sample_weight=of(self.sample_weight),
            upstream=of(self.upstream),
        )


def plan(
    options: LinearCrossEntropyOptions | None,
    rows: int,
    row_bytes: int,
    most: int = ROWS,
    scratch: int = SCRATCH,
) -> tuple[int, int]:
    """Rows of a chunk, if not chosen at most so many; and bytes to add up products in, at most `scratch`."""
    chosen = options or LinearCrossEntropyOptions()
    rows, row_bytes = max(1, rows), max(1, row_bytes)
    if chosen.batch_chunk_size:
        return chosen.batch_chunk_size, scratch
    budget = chosen.memory_budget or max(LEAST, min(most * row_bytes, rows * row_bytes // SHARE))
    scratch = min(budget // 8, scratch)
    height = (budget - scratch) // row_bytes
    if height < TILE:
        return max(1, height), scratch
    count = -(-rows // (height - height % TILE))
    even = -(-rows // count)
    return even + -even % TILE, scratch


def chunks(rows: np.ndarray, total: int, height: int) -> Iterator[Index]:
    """Rows that count, so many at a time."""
    for k in range(0, len(rows), height):
        yield slice(k, min(k + height, total)) if len(rows) == total else rows[k : k + height]


def pieces(live: np.ndarray) -> Iterator[tuple[Index, slice]]:
    """What is done in one product: all rows and positions; each position's rows, where some do not count."""
    positions = live.shape[1]
    if live.all():
        yield slice(None), slice(0, positions)
        return
    for k in range(positions):
        rows = np.flatnonzero(live[:, k])
        if rows.size:
            yield rows, slice(k, k + 1)


def is_matrix(array: np.ndarray) -> bool:
    """Whether NumPy's matrix product takes an array (C, ..., F) as it lies."""
    flags = array.flags
    return flags.c_contiguous or (flags.f_contiguous and array.size == array.shape[0] * array.shape[-1])


class ProductSum:
    """The sum over chunks of ``g.T @ x``, the gradient of the weight.

    NumPy's matrix product does not add to an array: a product is made of some classes at a time, in memory
    that stays in cache.
    """

    def __init__(self, out: np.ndarray, weight: np.ndarray, scratch: int) -> None:
        classes, positions, features = weight.shape
        direct = out.dtype == weight.dtype and is_matrix(out) and not np.may_share_memory(out, weight)
        self.out = out
        self.sum = out.reshape(weight.shape) if direct else np.empty(weight.shape, weight.dtype)
        self.fresh = True
        self.order: Any = "C" if self.sum.flags.c_contiguous else "F"
        self.step = max(1, min(classes * positions, scratch // max(1, features * weight.itemsize)))
        self.scratch = np.empty(self.step * features, weight.dtype)

    def add(self, g: np.ndarray, x: np.ndarray, positions: slice) -> None:
        into = self.sum[:, positions].reshape(g.shape[1], x.shape[1])
        if self.fresh and into.size == self.sum.size:
            np.matmul(g.T, x, out=into)
        else:
            self._clear()
            for k in range(0, len(into), self.step):
                some = into[k : k + self.step]
                product = self.scratch[: some.size].reshape(some.shape, order=self.order)
                some += np.matmul(g[:, k : k + self.step].T, x, out=product)
        self.fresh = False

    def finish(self) -> None:
        self._clear()
        if not np.may_share_memory(self.out, self.sum):
            self.out[...] = self.sum.reshape(self.out.shape)

    def _clear(self) -> None:
        if self.fresh:
            self.sum[...] = 0


def compute(p: Problem, options: dict[str, Any], outputs: dict[str, np.ndarray]) -> Any:
    """Write the gradients; return the value, or the terms."""
    classes, positions, _ = p.linear_weight.shape
    w = p.linear_weight
    if w.dtype != p.arithmetic or not is_matrix(w):
        w = np.ascontiguousarray(w, p.arithmetic)
    p = p._replace(
        linear_weight=w,
        linear_bias=None if p.linear_bias is None else p.linear_bias.astype(p.arithmetic),
        factor=float(p.factor / np.float64(p.divisor)),
    )
    counted: Any = p.live.any(axis=1)
    rows = np.flatnonzero(counted)
    # As large as the scores are two more arrays for the gradient by probabilities, six for that by class
    # weights (some of them float64), and the probabilities that are gathered.
    gathered = p.target.ndim == 3 and len(rows) < len(counted)
    arrays = 1 + 2 * ("target" in outputs) + 6 * ("weight" in outputs) + gathered
    row_bytes = arrays * classes * positions * p.arithmetic.itemsize
    height, scratch = plan(options["options"], len(rows), row_bytes)
    memory = np.empty(min(height, len(rows)) * classes * positions, p.arithmetic)

    by_row: dict[str, np.ndarray] = {
        n: np.atleast_2d(outputs[n]) for n in ("input", "target") if n in outputs
    }
    if options["reduction"] == "none":
        by_row["terms"] = np.empty(p.live.shape, p.arithmetic)
    for out in by_row.values():
        out[~counted] = 0
    products = ProductSum(outputs["linear_weight"], w, scratch) if "linear_weight" in outputs else None
    sums: dict[str, np.ndarray] = {
        n: np.zeros(getattr(p, n).shape) for n in ("linear_bias", "weight") if n in outputs
    }

    def value_of(chunk: Index) -> float:
        total = 0.0
        whole = p.part(chunk, slice(0, positions))
        shapes = {"input": whole.input.shape, "target": whole.target.shape, "terms": whole.live.shape}
        made = {n: np.zeros(shapes[n], p.arithmetic) for n in by_row}
        for mine, at in pieces(whole.live):
            part = whole.part(mine, at)
            value, g, others = compute_part(part, options, outputs, memory)
            if "terms" in made:
                made["terms"][mine, at] = value
            else:
                total += value
            if "input" in made:
                made["input"][mine] += g @ part.matrix
            if "target" in made:
                made["target"][mine, :, at] = others["target"]
            if products is not None:
                products.add(g, part.input, at)
            if "linear_bias" in sums:
                sums["linear_bias"][:, at] += g.sum(axis=0).reshape(classes, -1)
            if "weight" in sums:
                sums["weight"] += others["weight"]
        # Only now: a gradient may lie over what it is made of.
        for n, out in by_row.items():
            out[chunk] = made[n].reshape(len(made[n]), *out.shape[1:])
        return total

    total = sum(value_of(chunk) for chunk in chunks(rows, len(counted), height))
    if products is not None:
        products.finish()
    for n in sums:
        outputs[n][...] = sums[n].reshape(outputs[n].shape)
    if "terms" in by_row:
        return by_row["terms"].reshape(p.shape).astype(p.dtype, copy=False)
    return p.dtype.type(total / np.float64(p.divisor))


def compute_part(
    p: Problem, options: dict[str, Any], wanted: Container[str], memory: np.ndarray
) -> tuple[Any, np.ndarray, dict[str, np.ndarray]]:
    """A part's value, or terms; the gradient by its scores, in `memory`; and those by target and weight."""
    matrix = p.matrix
    logits = memory[: len(p.input) * len(matrix)].reshape(len(p.input), len(matrix))
    np.matmul(p.input, matrix.T, out=logits)
    if p.linear_bias is not None:
        logits += p.linear_bias.reshape(-1)
    shaped = logits.reshape(len(logits), *p.linear_weight.shape[:2])
    gradients = {}
    if any(n in wanted for n in ("input", "linear_weight", "linear_bias")):
        gradients["input"] = shaped  # where the scores lie
    if "target" in wanted:
        gradients["target"] = np.empty_like(shaped)
    if "weight" in wanted:
        gradients["weight"] = np.empty(shaped.shape[1])
    reduced = options["reduction"] != "none"
    problem = ClassProblem(
        shaped,
        p.target,
        p.target.ndim == 3,
        p.weight,
        Terms(p.sample_weight, p.upstream, p.factor, None, 1.0),
        FLOAT64 if reduced else p.arithmetic,
        p.arithmetic,
    )
    # The sum: what the mean divides by is in the factor already.
    own = {**options, "reduction": "sum" if reduced else "none"}
    return CrossEntropyLoss._compute(problem, own, gradients), logits, gradients


class LinearCrossEntropyLoss(RowLoss, function="linear_cross_entropy", keyword_only=True):
    r"""Cross entropy of the scores that a linear layer gives, which are never in memory as a whole.

    .. math:: \ell = \text{cross\_entropy}(X W^\top + b,\ y)

    Value and gradients come of one pass over chunks of rows: a chunk of scores, a matrix product, becomes its
    gradient where it lies, which is multiplied into the gradients of input, weight and bias. All else is as
    in ``cross_entropy``. A term that is ignored, or whose sample weight is zero, is not computed: what its
    row of the input holds goes nowhere.

    Beside the gradients, memory is taken for a chunk: see `options`, by default an eleventh of the scores, at
    most 512 rows, at least 24 MB. Where ``linear_weight`` is float16 or bfloat16, or not contiguous, a copy
    of it is made in the arithmetic's dtype; where its gradient is, or overwrites it, another. The last bits
    depend on the chunks and on the threads of NumPy's matrix product, not on Numba's.

    On a CUDA device, whichever library's the arrays are, the matrix product is CuPy's. A chunk there has at
    most 2048 rows, those that count nothing among them; of several positions one is done at a time, with a
    copy of its weight.

    Parameters
    ----------
    input : array, shape (F) or (N, F)
    linear_weight : array, shape (C, F) or (C, d1, ..., F)
        With more than two axes each position (d1, ...) has scores, and a term, of its own.
    target : array
        Class indices of any integer dtype, shape (), (N) or (N, d1, ...); or floating probabilities of the
        scores' shape, (C), (N, C) or (N, C, d1, ...). The shape decides.
    linear_bias : array, optional, shape (C) or (C, d1, ...)
    weight : array, optional, shape (C)
        Of the classes.
    reduction : {'none', 'mean', 'sum'}, default 'mean'
    ignore_index : int, optional
        Terms with this index count nothing; -100 if not given. Not to be given with probabilities.
    label_smoothing : float, default 0.0
        In [0, 1].
    options : LinearCrossEntropyOptions, optional
        The size of a chunk.

    Raises
    ------
    IndexError
        If a class index is out of range; nothing is written then.
    TypeError
        If the target has the scores' shape and holds integers, or has not and holds none.
    ValueError
        If shapes do not fit, or an option is out of its domain.

    Notes
    -----
    The class ``LinearCrossEntropyLoss(in_features, num_classes, *, out_features=(), bias=False, device=None,
    dtype=None, ..., rng=None)`` has a weight and a bias of its own and is called with input and target. They
    are arrays, ``linear_weight`` of shape (num_classes, *out_features, in_features) and ``linear_bias``, or
    None, drawn as PyTorch draws them, by `rng` (a seed, or a ``numpy.random.Generator``): read them, write
    into them, or assign others. `wrt` knows them by these names.

    References
    ----------
    PyTorch, ``torch.nn.functional.linear_cross_entropy``. E. Wijmans et al., Cut Your Losses in
    Large-Vocabulary Language Models, ICLR 2025.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> x, y = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([2, 1])
    >>> w = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> value, (by_x, by_w) = nl.linear_cross_entropy.value_and_grad(x, w, y)
    >>> float(value.round(4)), by_w.round(3).tolist()
    (0.8103, [[0.211, 0.063], [0.078, -0.532], [-0.289, 0.468]])
    >>> criterion = nl.LinearCrossEntropyLoss(2, 3, bias=True, rng=0)
    >>> for step in range(100):
    ...     by_w, by_b = criterion.grad(x, y, wrt=("linear_weight", "linear_bias"))
    ...     criterion.linear_weight -= by_w
    ...     criterion.linear_bias -= by_b
    >>> criterion(x, y) < 0.05
    np.True_
    """

    linear_bias: object = weights(call_only=True)
    weight: Any = weights()
    reduction: str = reduction()
    ignore_index: object = _index_or_none()
    label_smoothing: float = between(0.0, 0.0, 1.0)  # type: ignore[misc]
    options: object = _chunking()

    _function_keyword_only = True
    _held = "linear_weight", "linear_bias"

    # ---- the class ---------------------------------------------------------------------------------
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: Sequence[int] = (),
        bias: bool = False,
        device: str | None = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Any = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: LinearCrossEntropyOptions | None = None,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        super().__init__(
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
        name = type(self).__name__
        self.in_features, self.num_classes, self.out_features = in_features, num_classes, tuple(out_features)
        sizes = [("in_features", in_features), ("num_classes", num_classes)]
        for n, size in (*sizes, *(("out_features", d) for d in self.out_features)):
            if whole_number(name, n, size) < 1:
                raise ValueError(f"{name}: {n} must be > 0, got {size}")
        if device not in (None, "cpu"):
            raise ValueError(f"{name}: device must be None or 'cpu', got {device!r}")
        dtype = FLOAT32 if dtype is None else np.dtype(dtype)
        if dispatch.code_of(dtype) is None:
            raise TypeError(f"{name}: dtype must be float64, float32, float16 or bfloat16, got {dtype.name}")
        if weight is not None and np.shape(weight) != (num_classes,):
            raise ValueError(f"{name}: weight must have shape ({num_classes},), got {np.shape(weight)}")
        generator, bound = np.random.default_rng(rng), in_features**-0.5

        def drawn(*shape: int) -> np.ndarray:
            return generator.uniform(-bound, bound, shape).astype(dtype)

        classes = num_classes, *self.out_features
        self.linear_weight = drawn(*classes, in_features)
        self.linear_bias = drawn(*classes) if flag(False).check(name, "bias", bias) else None

    def __reduce__(self) -> Any:
        return copyreg.__newobj__, (type(self),), self.__dict__  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        shown = {n: getattr(self, n) for n in ("in_features", "num_classes", "out_features")}
        shown |= {"bias": self.linear_bias is not None, **self._options}
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in shown.items())})"

    def _run(self, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = type(self).__name__
        if len(args) > 2:
            raise TypeError(
                f"{name}: takes 2 arrays by position but {len(args)} were given; "
                "options go to the constructor"
            )
        own = {"linear_weight": self.linear_weight, "linear_bias": self.linear_bias, **self._given}
        for n, array in zip(("input", "target"), args, strict=False):
            if n in kwargs:
                raise TypeError(f"{name}: got multiple values for argument {n!r}")
            own[n] = array
        return self.function._run(mode, (), {**own, **kwargs})

    # ---- the call ----------------------------------------------------------------------------------
    @classmethod
    def _complete(cls) -> bool:
        return True

    @classmethod
    def _prepare(cls) -> None:
        def weight(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
            return rng.normal(size=(SAMPLE_CLASSES, shape[-1]))

        def target(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
            return rng.integers(0, SAMPLE_CLASSES, shape[:-1])

        cls.operands = {
            "input": scores(),
            "linear_weight": Operand(model=True, draw=weight),
            "target": Operand(draw=target),
        }
        cls._required = tuple(cls.operands)

    @classmethod
    def _differentiable(cls) -> tuple[str, ...]:
        return "input", "linear_weight", "linear_bias", "target", "weight"

    @classmethod
    def _check_arrays(cls, call: dict[str, Any], options: dict[str, Any], wrt: tuple[str, ...]) -> Arrays:
        """What is to be known without reading an element."""
        name = cls.function.__name__
        for n in wrt:
            if call.get(n) is None:
                raise ValueError(f"{name}: wrt names {n!r}, which is not given")
        x, w = (
            dispatch.floating(name, n, dispatch.as_array(name, n, call[n]))
            for n in ("input", "linear_weight")
        )
        if x.ndim not in (1, 2):
            raise ValueError(f"{name}: input must have shape (F) or (N, F), got {x.shape}")
        if w.ndim < 2 or not w.shape[0]:
            wanted = "(C, F) or (C, d1, ..., F), C at least 1"
            raise ValueError(f"{name}: linear_weight must have shape {wanted}, got {w.shape}")
        if x.shape[-1] != w.shape[-1] or (x.ndim == 1 and w.ndim > 2):
            wanted = f"(N, {w.shape[-1]})" if w.ndim > 2 else f"({w.shape[-1]}) or (N, {w.shape[-1]})"
            raise ValueError(
                f"{name}: input must have shape {wanted} with a linear_weight of {w.shape}, got {x.shape}"
            )
        floats = {"input": x, "linear_weight": w}
        rows = (*x.shape[:-1], *w.shape[1:-1])
        bias = cls._weak("linear_bias", call, floats, wrt)
        if bias is not None and bias.shape != w.shape[:-1]:
            raise ValueError(f"{name}: linear_bias must have shape {w.shape[:-1]}, got {bias.shape}")
        target = cls._check_target(call, x, w, options, wrt)
        probable = target.dtype.kind not in "iu"
        if probable:
            floats["target"] = target
        weight = cls._weak("weight", call, floats, wrt)
        if weight is not None and weight.shape != w.shape[:1]:
            raise ValueError(
                f"{name}: weight must have shape {w.shape[:1]}, one per class, got {weight.shape}"
            )
        terms = cls._terms(call, options, rows, floats)
        dtype = dispatch.common_dtype([a.dtype for a in floats.values()])
        arithmetic = dispatch.arithmetic_dtype(dtype)
        return Arrays(x, w, bias, target, probable, weight, terms, rows, dtype, arithmetic)

    @classmethod
    def _check(cls, call: dict[str, Any], options: dict[str, Any], wrt: tuple[str, ...]) -> Problem:
        a = cls._check_arrays(call, options, wrt)
        classes, features = a.linear_weight.shape[0], a.linear_weight.shape[-1]
        batch, positions = math.prod(a.input.shape[:-1]), math.prod(a.linear_weight.shape[1:-1])

        def over_rows(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else np.broadcast_to(array, a.shape).reshape(batch, positions)

        sample_weight = over_rows(a.terms.sample_weight)
        share: Any = 1.0 if sample_weight is None else sample_weight.astype(np.float64)
        own: Any = 1.0
        if a.probable:
            target, counted = a.target.reshape(batch, classes, positions), np.ones((batch, positions), bool)
        else:
            cls._check_indices(a, options)
            target = a.target.reshape(batch, positions)
            counted = target != cls._ignored(options)
            target = np.where(counted, target, 0).astype(np.int64)
            if a.weight is not None:
                own = a.weight.astype(np.float64)[target]
        divisor = a.terms.divisor
        if math.isnan(divisor):
            divisor = float(np.where(counted, share * own, 0.0).sum())
        return Problem(
            a.input.reshape(batch, features),
            a.linear_weight.reshape(classes, positions, features),
            None if a.linear_bias is None else a.linear_bias.reshape(classes, positions),
            target,
            counted & (share != 0) & ((own != 0) | (options["label_smoothing"] > 0)),
            a.weight,
            sample_weight,
            over_rows(a.terms.upstream),
            a.terms.factor,
            divisor,
            a.shape,
            a.dtype,
            a.arithmetic,
        )

    @classmethod
    def _check_target(
        cls,
        call: dict[str, Any],
        x: np.ndarray,
        w: np.ndarray,
        options: dict[str, Any],
        wrt: tuple[str, ...],
    ) -> np.ndarray:
        """Class indices, or probabilities."""
        name = cls.function.__name__
        target = dispatch.as_array(name, "target", call["target"])
        rows, scored = (*x.shape[:-1], *w.shape[1:-1]), (*x.shape[:-1], *w.shape[:-1])
        if target.shape == scored:
            if target.dtype.kind in "iub":
                raise TypeError(
                    f"{name}: target has the scores' shape {scored}, so it holds class probabilities and "
                    f"must be floating, got {target.dtype.name}"
                )
            if options["ignore_index"] is not None:
                raise ValueError(
                    f"{name}: ignore_index must not be given with class probabilities, "
                    f"got {options['ignore_index']}"
                )
            return dispatch.floating(name, "target", target)
        if target.shape != rows:
            raise ValueError(
                f"{name}: target must have shape {rows}, one class index for each row of scores, or the "
                f"scores' {scored}, for class probabilities; got {target.shape}"
            )
        if target.dtype.kind not in "iu":
            raise TypeError(f"{name}: target must hold integers, got {target.dtype.name}")
        for n in wrt:
            if n in ("target", "weight"):
                raise ValueError(f"{name}: wrt may hold {n!r} only where target holds class probabilities")
        return target

    @classmethod
    def _check_indices(cls, a: Arrays, options: dict[str, Any]) -> None:
        """Whether they are in range."""
        classes = a.linear_weight.shape[0]
        wrong = (a.target != cls._ignored(options)) & ((a.target < 0) | (a.target >= classes))
        if wrong.any():
            at = tuple(map(int, np.unravel_index(wrong.argmax(), a.shape)))
            place = f"[{', '.join(map(str, at))}]" if at else ""
            raise IndexError(
                f"{cls.function.__name__}: target{place} is {a.target[at]}, "
                f"but linear_weight has {classes} classes"
            )

    @classmethod
    def _ignored(cls, options: dict[str, Any]) -> int:
        return -100 if options["ignore_index"] is None else options["ignore_index"]

    @classmethod
    def _compute(cls, p: Problem, options: dict[str, Any], outputs: dict[str, np.ndarray]) -> Any:
        options = {**options, "ignore_index": cls._ignored(options)}
        with np.errstate(all="ignore"):  # NumPy warns of products with what is not finite
            return compute(p, options, outputs)


linear_cross_entropy = LinearCrossEntropyLoss.function

"""Cross entropy of scores that are a matrix product: a chunk of them at a time is in memory, never all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import (
    Operand,
    Option,
    between,
    flag,
    integer,
    non_negative,
    reduction,
    scores,
    softcap,
    weights,
)
from ..families.linear import LinearLoss
from ..kernels.spec import SINGLE, Chunking, code_of

SAMPLE_CLASSES = 6

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

    @property
    def chunking(self) -> Chunking:
        """The choice as kernels take it."""
        return Chunking(self.batch_chunk_size or 0, self.memory_budget or 0)


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


def _weight_drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=(SAMPLE_CLASSES, shape[-1]))


def _labels_drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, SAMPLE_CLASSES, shape[:-1])


class LinearCrossEntropyLoss(LinearLoss, function="linear_cross_entropy", keyword_only=True):
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
        Features.
    linear_weight : array, shape (C, F) or (C, d1, ..., F)
        With more than two axes each position (d1, ...) has scores, and a term, of its own.
    target : array
        Class indices of any integer dtype, shape (), (N) or (N, d1, ...); or floating probabilities of the
        scores' shape, (C), (N, C) or (N, C, d1, ...). The shape decides.
    linear_bias : array, optional, shape (C) or (C, d1, ...)
        Added to the scores.
    weight : array, optional, shape (C)
        Of the classes.
    reduction : {'none', 'mean', 'sum'}, default 'mean'
    ignore_index : int, optional
        Terms with this index count nothing; -100 if not given. Not to be given with probabilities.
    label_smoothing : float, default 0.0
        In [0, 1].
    options : LinearCrossEntropyOptions, optional
        The size of a chunk.
    softcap : float, optional
        As in ``cross_entropy``.
    lse_square_scale : float, default 0.0
        As in ``cross_entropy``.

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
    are arrays, ``linear_weight`` of shape ``(num_classes, *out_features, in_features)`` and ``linear_bias``,
    or None, drawn as PyTorch draws them, by `rng` (a seed, or a ``numpy.random.Generator``): read them, write
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
    softcap: object = softcap()
    lse_square_scale: float = non_negative(0.0)  # type: ignore[misc]

    def value(cross_entropy):
        return cross_entropy

    operands = {
        "input": scores(),
        "linear_weight": Operand(model=True, draw=_weight_drawn),
        "target": Operand(draw=_labels_drawn),
    }

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
        softcap: float | None = None,
        lse_square_scale: float = 0.0,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        super().__init__(
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
            softcap=softcap,
            lse_square_scale=lse_square_scale,
        )
        name = type(self).__name__
        self.in_features, self.num_classes, self.out_features = in_features, num_classes, tuple(out_features)
        sizes = [("in_features", in_features), ("num_classes", num_classes)]
        for n, size in (*sizes, *(("out_features", d) for d in self.out_features)):
            if whole_number(name, n, size) < 1:
                raise ValueError(f"{name}: {n} must be > 0, got {size}")
        if device not in (None, "cpu"):
            raise ValueError(f"{name}: device must be None or 'cpu', got {device!r}")
        dtype = SINGLE if dtype is None else np.dtype(dtype)
        if code_of(dtype) is None:
            raise TypeError(f"{name}: dtype must be float64, float32, float16 or bfloat16, got {dtype.name}")
        if weight is not None and np.shape(weight) != (num_classes,):
            raise ValueError(f"{name}: weight must have shape ({num_classes},), got {np.shape(weight)}")
        generator, bound = np.random.default_rng(rng), in_features**-0.5

        def drawn(*shape: int) -> np.ndarray:
            return generator.uniform(-bound, bound, shape).astype(dtype)

        classes = num_classes, *self.out_features
        self.linear_weight = drawn(*classes, in_features)
        self.linear_bias = drawn(*classes) if flag(False).check(name, "bias", bias) else None

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


linear_cross_entropy = LinearCrossEntropyLoss.function

"""The table of cases: what is measured of each loss, whoever asks.

The command line, the pytest-benchmark suite and the reports all take their losses, shapes, arguments
and bytes from here. A family says how its losses' arguments are drawn for a shape, and which shapes are worth
measuring; losses themselves come from the registry.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import numbaloss as nl
from numbaloss.families.elementwise import ElementwiseLoss
from numbaloss.families.linear import LinearLoss
from numbaloss.families.scores import ClassLoss, MarginLoss
from numbaloss.families.sequences import SequenceLoss
from numbaloss.families.vectors import VectorLoss
from numbaloss.kernels.spec import GRAD, VALUE, VALUE_AND_GRAD

Shape = tuple[int, ...]
Arrays = dict[str, Any]

MODES = (VALUE, GRAD, VALUE_AND_GRAD)
DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class Family:
    """Losses that take arguments of the same kind.

    Attributes
    ----------
    name : str
    axes : str
        A shape, in words.
    shapes, quick : tuples of shapes
        Measured by default, and with ``--quick``.
    tiny : shape
        Enough for a check of correctness.
    sized : callable
        ``sized(n)`` is a shape of about `n` elements.
    ndim : (int, int)
        Axes that a shape may have.
    draw : callable
        ``draw(loss, rng, shape)``: the required arguments by name, floats in float64.
    batch : dict
        The axis along which an argument can be cut, where it is not the first; None where it cannot.
    elements : callable
        ``elements(shape)``: about how many a case holds.
    """

    name: str
    axes: str
    shapes: tuple[Shape, ...]
    quick: tuple[Shape, ...]
    tiny: Shape
    sized: Callable[[int], Shape]
    ndim: tuple[int, int]
    draw: Callable[[Any, np.random.Generator, Shape], Arrays]
    batch: dict[str, int | None] = field(default_factory=dict)
    elements: Callable[[Shape], int] = math.prod

    def head(self, arrays: Arrays, rows: int) -> Arrays:
        """The arguments cut to the first `rows` of the batch."""

        def cut(name: str, array: Any) -> Any:
            axis = self.batch.get(name, 0)
            return array if axis is None else array[(slice(None),) * axis + (slice(rows),)]

        return {n: cut(n, a) for n, a in arrays.items()}


def _from_operands(loss: Any, rng: np.random.Generator, shape: Shape) -> Arrays:
    """Each argument from its own domain, as the definition states it."""
    return {n: np.asarray(loss.Class.operands[n].draw(rng, shape)) for n in loss.Class._required}


def _sequences(loss: Any, rng: np.random.Generator, shape: Shape) -> Arrays:
    """Log-probabilities (T, N, C) of full length, and N sequences of S labels that are no blanks."""
    frames, batch, classes, labels = shape
    scores = rng.normal(0, 2, (frames, batch, classes))
    scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    targets = rng.integers(1, classes, (batch, labels))
    lengths = np.full(batch, frames), np.full(batch, labels)
    return dict(zip(loss.Class._required, (scores, targets, *lengths), strict=True))


def _linear(loss: Any, rng: np.random.Generator, shape: Shape) -> Arrays:
    """Features (N, F), a weight (C, F) that gives scores of about unit size, and N classes."""
    rows, features, classes = shape
    return {
        "input": rng.normal(size=(rows, features)),
        "linear_weight": rng.normal(size=(classes, features)) / math.sqrt(features),
        "target": rng.integers(0, classes, rows),
    }


def _linear_of(n: int) -> Shape:
    """About as many rows as classes, which have `n` scores; fewer features."""
    classes = min(math.isqrt(n), 8192)
    return n // classes, min(classes, 256), classes


def _rows_of(width: int) -> Callable[[int], Shape]:
    return lambda n: (max(1, n // width), min(n, width))


ELEMENTWISE = Family(
    name="elementwise",
    axes="N [x d1 x ...]",
    shapes=((1_000,), (1_000_000,), (10_000_000,)),
    quick=((1_000,), (1_000_000,)),
    tiny=(7, 19),
    sized=lambda n: (n,),
    ndim=(1, 32),
    draw=_from_operands,
)
CLASSES = Family(
    name="classes",
    axes="N x C [x d1 x ...]",
    shapes=((32, 10), (8192, 10), (4096, 1000)),
    quick=((32, 10), (1024, 1000)),
    tiny=(5, 11),
    sized=_rows_of(1000),
    ndim=(2, 32),
    draw=_from_operands,
)
# Many labels a row cost the square of the classes: a sweep has fewer of these.
MARGINS = replace(CLASSES, name="margins", axes="N x C", ndim=(2, 2), sized=_rows_of(100))
VECTORS = Family(
    name="vectors",
    axes="N x D",
    shapes=((32, 128), (8192, 128), (65536, 128)),
    quick=((32, 128), (8192, 128)),
    tiny=(5, 11),
    sized=_rows_of(128),
    ndim=(2, 2),
    draw=_from_operands,
)
SEQUENCE = Family(
    name="sequence",
    axes="T x N x C x S (frames, batch, classes, labels)",
    shapes=((50, 4, 32, 10), (200, 32, 64, 40)),
    quick=((50, 4, 32, 10),),
    tiny=(8, 3, 5, 3),
    sized=lambda n: (50, max(1, n // 1600), 32, 10),
    ndim=(4, 4),
    draw=_sequences,
    batch={"log_probs": 1},
    elements=lambda shape: math.prod(shape[:3]),
)
LINEAR = Family(
    name="linear",
    axes="N x F x C (rows, features, classes)",
    shapes=((128, 128, 1000), (512, 256, 8192)),
    quick=((128, 128, 1000),),
    tiny=(5, 4, 7),
    sized=_linear_of,
    ndim=(3, 3),
    draw=_linear,
    batch={"linear_weight": None},
    elements=lambda shape: shape[0] * (shape[1] + shape[2]) + shape[1] * shape[2],
)

FAMILIES = {f.name: f for f in (ELEMENTWISE, CLASSES, MARGINS, VECTORS, SEQUENCE, LINEAR)}
# The family of a loss by the class that it comes from.
_BY_CLASS: tuple[tuple[type, Family], ...] = (
    (ElementwiseLoss, ELEMENTWISE),
    (LinearLoss, LINEAR),
    (MarginLoss, MARGINS),
    (ClassLoss, CLASSES),
    (VectorLoss, VECTORS),
    (SequenceLoss, SEQUENCE),
    (nl.MultiLabelSoftMarginLoss, MARGINS),
)


def family_of(loss: Any) -> Family:
    """The family of a loss, one of ours or a user's own."""
    return next(family for kind, family in _BY_CLASS if issubclass(loss.Class, kind))


def dtype_of(name: str) -> np.dtype:
    """A dtype by name; ImportError where it needs a package that is not there."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def casted(arrays: Arrays, dtype: np.dtype) -> Arrays:
    """The arguments with their floats in one dtype; indices and lengths as they are."""
    return {n: a if a.dtype.kind in "iu" else a.astype(dtype) for n, a in arrays.items()}


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    loss: str
    shape: Shape
    dtype: str = "float32"
    mode: str = VALUE_AND_GRAD
    in_place: bool = False
    device: str = "cpu"

    def __str__(self) -> str:
        parts = [self.loss, dimensions(self.shape), self.dtype, self.mode]
        parts += ["in place"] * self.in_place + [self.device] * (self.device != "cpu")
        return " ".join(parts)

    @property
    def function(self) -> Any:
        return nl.registry[self.loss]

    @property
    def family(self) -> Family:
        return family_of(self.function)

    @property
    def wrt(self) -> tuple[str, ...]:
        """The arguments whose gradient is computed."""
        names = self.function.Class._default_wrt()
        return () if self.mode == VALUE else (names,) if isinstance(names, str) else names

    def arrays(self, seed: int = 0) -> Arrays:
        """The arguments, drawn from their domains."""
        drawn = self.family.draw(self.function, np.random.default_rng(seed), self.shape)
        return casted(drawn, dtype_of(self.dtype))

    def call(self, arrays: Arrays, out: Any = None) -> Callable[[], Any]:
        """The call that is measured; `out` is given to it unless it is None."""
        method = self.function if self.mode == VALUE else getattr(self.function, self.mode)
        operands = tuple(arrays.values())
        if out is None:
            return lambda: method(*operands)
        return lambda: method(*operands, out=out)

    def out(self, arrays: Arrays, new: Callable[[Any], Any] | None = None) -> Any:
        """What `out` takes: the differentiated arguments themselves, or what `new` makes of each."""
        outs = tuple(arrays[n] if new is None else new(arrays[n]) for n in self.wrt)
        return outs[0] if len(outs) == 1 else outs

    def traffic(self, arrays: Arrays) -> int:
        """Bytes that must move: each argument read once, each gradient written once."""
        read = {n: a.nbytes for n, a in arrays.items()}
        if self.loss == "nll_loss":  # of a row of scores it reads one
            read["input"] = arrays["target"].size * arrays["input"].itemsize
        return sum(read.values()) + sum(arrays[n].nbytes for n in self.wrt)


def dimensions(shape: Iterable[int]) -> str:
    """A shape as it is written on the command line."""
    return "x".join(map(str, shape))


def cases(
    losses: Iterable[str],
    shapes: Iterable[Shape] = (),
    sizes: Iterable[int] = (),
    *,
    quick: bool = False,
    **settings: Any,
) -> list[Case]:
    """The cases of some losses: at the given shapes and sizes, or at their family's own.

    Raises
    ------
    ValueError
        If a loss cannot take one of the shapes.
    """
    made = []
    for loss in losses:
        family = family_of(nl.registry[loss])
        for shape in shapes:
            if not family.ndim[0] <= len(shape) <= family.ndim[1] or min(shape) < 1:
                raise ValueError(f"{loss} cannot take the shape {dimensions(shape)}: wanted {family.axes}")
        own = [*shapes, *map(family.sized, sizes)] or (family.quick if quick else family.shapes)
        made += [Case(loss, shape, **settings) for shape in own]
    return made

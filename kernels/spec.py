"""The one language between losses and devices: a problem for each family, and what goes with it.

`numbaloss` makes a problem of a checked call; `kernels.devices` sends it to the device that its arrays are
on. No record holds a loss: `name` is there for errors alone. Arrays are NumPy's, or those of a device as its
backend describes them. Light to import: no kernel is compiled for it.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

# Elements that a CPU kernel handles at once: large enough to amortise a call, small enough for a block's
# operands to stay in the second-level cache.
BLOCK = 8192

# ---- modes of a call ----------------------------------------------------------------------------------

VALUE, GRAD, VALUE_AND_GRAD, VALUE_GRAD_HESS = "value", "grad", "value_and_grad", "value_grad_hess"
# The same without the value, as boosters want it: what stands in its place means nothing.
GRAD_HESS = "grad_hess"
OF_CURVATURES = VALUE_GRAD_HESS, GRAD_HESS

# Given back by a prepared call that the general one must serve.
MISSING = object()


# ---- dtypes -------------------------------------------------------------------------------------------

# How an array's elements are stored.
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = range(4)
CODES = {"float64": FLOAT64, "float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}

SINGLE, DOUBLE, INT64 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64)


@cache
def code_of(dtype: np.dtype) -> Any:
    """Return the code of a dtype, or None if it is no float that losses are computed on."""
    return CODES.get(dtype.name) if dtype.isnative else None


def common_dtype(dtypes: Any) -> np.dtype:
    """Return the dtype that floats promote to, as in NumPy; the two halves meet in float32."""
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    return DOUBLE if DOUBLE in distinct else SINGLE


def arithmetic_dtype(dtype: np.dtype) -> np.dtype:
    """Return float64 for float64, float32 for all others."""
    return DOUBLE if dtype == DOUBLE else SINGLE


# ---- arrays -------------------------------------------------------------------------------------------


class OnDevice:
    """The base of a device's described arrays: shape, strides and address, but no element here."""

    __slots__ = ()


def is_described(array: Any) -> bool:
    """Return whether an array is a device's, described by its backend."""
    return isinstance(array, OnDevice)


class Memo(dict[Any, Any]):
    """A bounded memo: emptied when it holds `MOST` entries.

    A loop whose options change with every step must not take memory without end.
    """

    MOST = 4096

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= self.MOST:
            self.clear()
        super().__setitem__(key, value)


# ---- what stands for the curvature --------------------------------------------------------------------

# The second derivative; the curvature of a parabola above the loss that touches it; absolute values of the
# second derivative and of the gradient; of class scores, the sum of the absolute values in a row of the
# Hessian; the second derivative's mean under the model.
EXACT, MAJORIZER, ABSOLUTE, GRADIENT, GERSHGORIN, FISHER = CURVATURES = (
    "exact", "majorizer", "absolute", "gradient", "gershgorin", "fisher"
)  # fmt: skip


# ---- functions of one element -------------------------------------------------------------------------


class Scalars(NamedTuple):
    """A loss's functions of one element, and what they take.

    `value`, and `slopes` that replace derived ones (by operand), take the operands, then the options.
    An entry of `options` is None for a number given at run time, else the bool it is compiled with.
    `domains` has, per operand, the closed interval it must lie in and whether NaN may pass, or None; `absent`
    has the numbers that stand for operands which the call does not give. `curvatures` are stated by hand, as
    slopes are: `MAJORIZER` or `FISHER`, the operand, the function.
    """

    name: str
    arity: int
    value: Callable[..., Any]
    slopes: tuple[tuple[int, Callable[..., Any]], ...] = ()
    options: tuple[bool | None, ...] = ()
    domains: tuple[tuple[float, float, bool] | None, ...] = (None, None, None)
    absent: tuple[float | None, ...] = ()
    curvatures: tuple[tuple[str, int, Callable[..., Any]], ...] = ()


class Request(NamedTuple):
    """What one kernel computes. Arrays are passed in this order: operands, weights, upstream, outputs."""

    weighted: bool = False  # an array multiplies each term
    upstream: bool = False  # an array multiplies each gradient
    terms: bool = False  # the terms are an output, and not summed
    wrt: tuple[int, ...] = ()  # operands to differentiate: an output each
    in_place: tuple[bool, ...] = ()  # per entry of `wrt`: the gradient overwrites its operand
    curvature: bool = False  # the second derivative by the one operand in `wrt` is the last output
    policy: str = EXACT  # what stands for it
    floored: bool = False  # it is at least a number, the last of those that a kernel is given


# ---- functions of one row of class scores -------------------------------------------------------------

# What a definition may ask for by name: see `kernels.lift`.
STATISTICS = ("log_prob", "rest", "class_weight", "cross_entropy", "logsumexp")


class ScoreFunctions(NamedTuple):
    """A loss of one row of class scores, as a function of the row's statistics.

    `value` takes the statistics that it asks for (`STATISTICS`), then the options. An entry of
    `options` is None for a number given at run time, else the bool it is compiled with.
    """

    name: str
    value: Callable[..., Any]
    statistics: tuple[str, ...]
    options: tuple[bool | None, ...] = ()


class ScoreOption(NamedTuple):
    """An option as compiled code checks it: its name, domain and that in words; whether it is a bool."""

    name: str
    domain: Any  # an interval with `low`, `high`, `open_low` and `open_high`; a tuple of values; None for any
    said: str
    is_flag: bool = False


class ScoreRequest(NamedTuple):
    """What one kernel of class scores computes: the rest of a call is bound away."""

    probabilities: bool = False  # the target holds probabilities of the classes, not labels
    weighted: bool = False  # labels: classes have weights
    smoothed: bool = False  # labels: label smoothing, and class weights
    row_factors: bool = False  # an array multiplies the rows' values, another one their gradients
    grad: bool = False  # the gradient by the scores
    target_grad: bool = False  # that by the probabilities
    by_weight: bool = False  # `target_grad` is for the class weights: without them and without smoothing
    curvature: bool = False  # the diagonal of the Hessian
    policy: str = EXACT  # what stands for it
    floored: bool = False  # it is at least a number, the last of those that a kernel is given
    softcap: bool = False  # scores are capped first
    lse_square: bool = False  # the squared logsumexp is added to the value
    valued: bool = True  # the value itself; where it costs next to nothing it is always computed


class MarginFunctions(NamedTuple):
    """A loss of each of a row's own classes against all that are not.

    ``terms(score, own, <options>)`` of another class's score and an own one's is summed over all such pairs
    of a row; it depends on their difference alone. ``finish(total, classes, weight)`` is the row's loss,
    linear in the sum; `weight` is its class's times its own. An entry of `options` is None for a number given
    at run time, else the bool or number that it is compiled with.
    """

    name: str
    terms: Callable[..., Any]
    finish: Callable[..., Any]
    options: tuple[bool | float | None, ...] = ()  # that `terms` takes
    many: bool = False  # a row has a list of classes, as long as the scores or ended by -1


class NllFunctions(NamedTuple):
    """A loss of the own class's score alone: ``value(score, weight)``, linear in the score.

    `weight` is the row's: its class's times its own.
    """

    name: str
    value: Callable[..., Any]


# ---- rows of vectors ----------------------------------------------------------------------------------

# Kinds of distance between two vectors: sums of powers of the differences, and their roots; the largest
# difference; 1 less the cosine of the angle.
POWER, SUM, SQUARES, ROOT_OF_SQUARES, LARGEST, COSINE = range(6)

COSINE_EPS = 1e-12  # under each squared norm, as in PyTorch
DISTANCE_EPS = 1e-6  # added to each coordinate's difference, as in PyTorch's PairwiseDistance


class Distance(NamedTuple):
    """A distance between two vectors that has kernels of its own, safe from overflow and underflow.

    A definition that names one takes distances in place of sums of terms: from the first vector to the
    second, and to the third. With `swap` the second of them is the smaller of those from the third vector to
    the first and to the second; at a tie each takes half of the gradient.
    """

    kind: int
    p: float = 2.0  # of the norm
    eps: float = 0.0  # added to each coordinate's difference, or under each squared norm
    swap: bool = False


class VectorFunctions(NamedTuple):
    """A loss's functions of rows of vectors, and their arguments.

    `terms` takes one coordinate of each vector, then options by name; it gives `sums` numbers (a tuple, or
    one number), which are added up over a row. `finish` takes the sums, then row arrays and options by name;
    it gives the row's value. `terms` is None for a loss of distances: then `sums` is 1 for pairs, 2 for
    triplets.

    With `homogeneous` = n a row whose sums overflow or underflow is scaled first: vectors and the options
    named in `lengths`, all times r, must make the value r**n times as large. (A contrastive loss of squared
    distances: n = 2, its margin a length.)
    """

    name: str
    arity: int  # vectors a row: 2 or 3
    terms: Callable[..., Any] | None
    finish: Callable[..., Any]
    sums: int
    row_arrays: tuple[str, ...] = ()  # of one number a row
    options: tuple[str, ...] = ()  # those that the functions may ask for
    flags: tuple[bool | None, ...] = ()  # per option a bool it is compiled with, None for a number; or none
    homogeneous: int | None = None  # 0, 1 or 2
    lengths: tuple[str, ...] = ()  # options that scale as the vectors do


class VectorRequest(NamedTuple):
    """The outputs that blocks of vectors compute."""

    wrt: tuple[int, ...] = ()  # vectors to differentiate
    row_wrt: tuple[int, ...] = ()  # row arrays to differentiate
    curvature: bool = False  # the second derivative by the one vector, or row array, that is differentiated
    integers: tuple[bool, ...] = ()  # per row array: whether it holds integers


# ---- rows of class scores that are shared out ---------------------------------------------------------

# Numbers of a row, as ranks exchange them: the largest score; the sum of the exponentials of the classes that
# are not the row's own, divided as `kernels.powers` says; the own class's score; the weighted sum of
# distances from the largest.
MAXIMUM, OTHERS, HIT, FAR, NUMBERS_OF_ROW = range(5)
# Of a row's label: of another rank's classes; of a row that does not count, and is not read.
ELSEWHERE, DEAD = -1, -2
# Numbers that make a row's gradient: the largest score; what multiplies exponentials; what multiplies a
# class's weight; the own class's gradient.
TOP, SLOPE, ASKED, OWN_SLOPE, FACTORS_OF_ROW = range(5)


# ---- problems -----------------------------------------------------------------------------------------


class Weighting(NamedTuple):
    """What multiplies and divides a problem's terms, and how they are reduced.

    Attributes
    ----------
    reduction : str
        ``'none'``: the terms are the value. Any other: their sum, divided.
    sample_weight : array or None
        Broadcasts to the terms' shape. A term of weight zero is zero, and so are its gradients.
    upstream : array or None
        Multiplies each term's gradients: of the terms' shape, or 0-d on a device.
    factor : float
        Multiplies all gradients.
    divisor : float, 0-d array or None
        None stands for what the rows count for.
    """

    reduction: str = "sum"
    sample_weight: Any = None
    upstream: Any = None
    factor: float = 1.0
    divisor: Any = 1.0


# What a mean of elements counts; of BY_DATA the divisor was made of a call's own arrays.
BY_TERMS, BY_ROWS, BY_WEIGHTS, BY_DATA = "terms", "rows", "weights", "data"


class Elements(NamedTuple):
    """A term for each element of two or three arrays."""

    name: str
    scalars: Scalars
    operands: tuple[Any, ...]  # each broadcasts to `shape`
    names: tuple[str, ...]  # of the operands
    numbers: tuple[float, ...]  # the options that are given at run time
    weighting: Weighting
    counts: str  # BY_TERMS, BY_ROWS or BY_WEIGHTS: what a divisor of None stands for; or BY_DATA
    valued: bool  # whether the value is asked for
    shape: tuple[int, ...]  # of the terms
    dtype: Any  # that the arrays promote to
    arithmetic: Any
    curvature: str = EXACT  # what stands for it
    floor: float | None = None  # that it is not below, before what multiplies and divides the terms


class Scores(NamedTuple):
    """A loss of the softmax of each row of class scores, (C), (N, C) or (N, C, d1, ...)."""

    name: str
    functions: ScoreFunctions
    numbers: tuple[float, ...]  # the options that are given at run time
    input: Any
    target: Any  # class indices, or probabilities of the input's shape
    has_probabilities: bool
    weight: Any  # of the classes, or None
    ignore_index: int
    label_smoothing: float
    softcap: float | None  # scores are first `softcap * tanh(score / softcap)`
    lse_square_scale: float  # multiplies the squared logsumexp that is added to a row's value
    weighting: Weighting
    dtype: Any
    arithmetic: Any
    curvature: str = EXACT  # what stands for it
    floor: float | None = None  # that it is not below, before what multiplies and divides a row's value
    valued: bool = True  # whether the value is asked for


class Picks(NamedTuple):
    """One score of each row, that of its class: (C), (N, C) or (N, C, d1, ...)."""

    name: str
    functions: NllFunctions  # on CUDA devices it is the negative log-likelihood
    input: Any
    target: Any  # class indices
    weight: Any  # of the classes, or None
    ignore_index: int
    weighting: Weighting
    dtype: Any
    arithmetic: Any


# A row's class against all others; each of its classes against all that are not; the mean of its logits'
# binary cross entropies.
ONE, MANY, SOFT = "one_label", "many_labels", "soft_labels"


class Margins(NamedTuple):
    """Margins between a row's own classes and all others; scores are (..., C)."""

    name: str
    kind: str  # ONE, MANY or SOFT
    functions: MarginFunctions | None  # None of SOFT; CUDA devices have the hinges, by `p` and `margin`
    numbers: tuple[float, ...]  # the options of `functions` that are given at run time
    input: Any
    target: Any  # class indices (...) or (..., C), or soft labels (..., C)
    weight: Any  # of the classes, or None; of SOFT one that broadcasts to the input
    p: int
    margin: float
    weighting: Weighting
    dtype: Any
    arithmetic: Any


class Vectors(NamedTuple):
    """Pairs or triplets of vectors (..., D): each row has one term, through sums over it or distances."""

    name: str
    functions: VectorFunctions
    numbers: tuple[float, ...]  # the options that are given at run time, in the order of the functions'
    vectors: tuple[Any, ...]
    names: tuple[str, ...]  # of the vectors
    row_arrays: tuple[Any, ...]  # floating or integer, (...); their names are the functions'
    distance: Distance | None  # of definitions without terms
    weighting: Weighting
    dtype: Any
    arithmetic: Any


class Sequences(NamedTuple):
    """Labels that are not aligned with their frames: CTC."""

    name: str
    log_probs: Any  # (T, N, C), or (T, C) of a single sequence
    targets: Any  # (N, S), all sequences' labels joined, or (S) or (1, S) of a single sequence
    input_lengths: Any  # (N), or () or (1) of a single sequence; of any integer dtype, as the targets
    target_lengths: Any
    blank: int
    zero_infinity: bool
    weighting: Weighting
    shape: tuple[int, ...]  # of the terms: (N), or () of a single sequence
    dtype: Any
    arithmetic: Any


class Chunking(NamedTuple):
    """How scores are cut into chunks of rows: by one of these at most, which is not 0."""

    rows: int = 0
    memory: int = 0  # bytes


class Linear(NamedTuple):
    """A loss of the scores that a linear layer gives, which are never in memory as a whole."""

    name: str
    functions: ScoreFunctions
    input: Any  # (F) or (N, F)
    linear_weight: Any  # (C, F) or (C, d1, ..., F)
    linear_bias: Any  # (C) or (C, d1, ...), or None
    target: Any
    has_probabilities: bool
    weight: Any  # of the classes, or None
    ignore_index: int
    label_smoothing: float
    softcap: float | None
    lse_square_scale: float
    chunking: Chunking
    weighting: Weighting
    shape: tuple[int, ...]  # of the terms
    dtype: Any
    arithmetic: Any


# ---- words of errors ----------------------------------------------------------------------------------


def _at(index: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, index))}]" if index else ""


def out_of_domain(
    name: str,
    argument: str,
    index: tuple[int, ...],
    domain: tuple[float, float, bool] | None,
    value: float | None = None,
) -> ValueError:
    """Word the error for an element out of its domain; a device does not tell its `value`."""
    assert domain is not None
    low, high, _ = domain
    wanted = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f">= {low:g}"
    got = f"but {argument}{_at(index)} is not" if value is None else f"got {argument}{_at(index)} = {value:g}"
    return ValueError(f"{name}: {argument} must be {wanted}, {got}")


def bad_index(
    name: str, index: tuple[int, ...], label: int, classes: int, of: str = "input", most: int | None = None
) -> IndexError:
    """Word the error for a class index out of range; of one beyond `most` only that is known."""
    said = (
        f"{label}" if most is None or abs(label) < most else f"{label} or {'above' if label > 0 else 'below'}"
    )
    return IndexError(f"{name}: target{_at(index)} is {said}, but {of} has {classes} classes")


def bad_label(
    name: str,
    sequence: int,
    label: int,
    classes: int,
    index: tuple[int, ...] | None = None,
    place: int | None = None,
) -> IndexError:
    """Word the error for a label that is no class; of its index a device tells the sequence alone.

    Of joined labels `place` is the label's number in its sequence.
    """
    said = f"targets has {label} for sequence {sequence}"
    if index is not None:
        said = f"targets{_at(index)} is {label}"
    where = "" if place is None else f" (label {place} of sequence {sequence})"
    return IndexError(f"{name}: {said}, but log_probs has {classes} classes{where}")


def bad_length(name: str, argument: str, index: tuple[int, ...], most: int, length: int) -> ValueError:
    """Word the error for a length that a sequence cannot have."""
    of = "frames of log_probs" if argument == "input_lengths" else "labels of targets"
    return ValueError(f"{name}: {argument}{_at(index)} must be in [0, {most}], the {of}, got {length}")


def wrong_length(p: Sequences) -> ValueError | None:
    """Return the error for the first length that a sequence cannot have; None if those at hand are right."""
    joined = p.targets.ndim == 1 and bool(p.shape)
    for n, most in (("input_lengths", p.log_probs.shape[0]), ("target_lengths", p.targets.shape[-1])):
        array = getattr(p, n)
        if is_described(array):  # its elements are checked there
            continue
        lengths = array.reshape(-1)
        wrong = (lengths < 0) | (lengths > most)
        if wrong.any():
            k = int(wrong.argmax())
            return bad_length(p.name, n, (k,) if array.ndim else (), most, lengths[k])
    if joined and not is_described(p.target_lengths) and p.target_lengths.sum() != p.targets.size:
        return ValueError(
            f"{p.name}: target_lengths must sum to the {p.targets.size} labels of targets, "
            f"got {p.target_lengths.sum()}"
        )
    return None

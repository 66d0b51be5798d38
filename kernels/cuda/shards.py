"""Class scores of which other ranks have other classes: each row's statistics, and the gradient by them.

`kernels.cpu.shards` is its twin, and says what ranks exchange. A block takes a row: its threads keep a
running maximum, and a sum relative to it that is scaled anew whenever that rises, so the scores are read
once. Sums are carried in two numbers. What ranks exchange goes by way of the host, which waits for it.
"""

from typing import Any, NamedTuple

import numpy as np

from ..math import exp, tanh
from ..powers import from_largest
from ..spec import (
    ASKED,
    DEAD,
    FACTORS_OF_ROW,
    FAR,
    FLOAT32,
    FLOAT64,
    HIT,
    MAXIMUM,
    NUMBERS_OF_ROW,
    OTHERS,
    OWN_SLOPE,
    SLOPE,
    TOP,
    code_of,
)
from .arithmetic import to_host
from .arrays import DeviceArray, current_queue, flat
from .reduce import MOST_BLOCKS, THREADS, add, block_max, block_sum, whole
from .target import Binary, as_kernel, compile, cuda, storage, types

# Bound by `kernel`: the access to arrays, the arithmetic type; whether there is label smoothing, and a cap.
array: Any = storage(FLOAT32)
T: Any = np.float32
SMOOTHED: Any = False
CAPS: Any = False


def score(x, at, cap):
    """A score, capped where that is asked for."""
    v = array.load(x, at)
    if CAPS:
        v = cap * tanh(v / cap)
    return v


def statistics(x, labels, weight, found, rows, classes, cap):
    """Each row's largest score, sum of the others' exponentials, own score, and distance by weights."""
    low, zero = T(-np.inf), T(0)
    i = cuda.blockIdx.x
    while i < rows:
        label = labels[i]
        m, hi, lo, far, far_lo, passed, passed_lo = low, zero, zero, zero, zero, zero, zero
        if label != DEAD:
            c = np.int64(cuda.threadIdx.x)
            while c < classes:
                v = score(x, i * classes + c, cap)
                if v > m:
                    by = exp(m - v) if m != low else zero
                    hi, lo = hi * by, lo * by
                    if SMOOTHED:
                        moved = zero if m == low else v - m
                        far, far_lo = add(far, far_lo, (passed + passed_lo) * moved if m != low else zero)
                    m = v
                if SMOOTHED:
                    w = weight[c]
                    if w != zero:
                        far, far_lo = add(far, far_lo, w * ((m if m != low else T(np.inf)) - v))
                        passed, passed_lo = add(passed, passed_lo, w)
                if c == label:
                    found[i * NUMBERS_OF_ROW + HIT] = np.float64(v)
                elif v != low:
                    hi, lo = add(hi, lo, exp(v - m))
                c += cuda.blockDim.x
        top = block_max(m)
        by = exp(m - top) if m != low else zero
        if hi != zero or hi != hi:
            hi, lo = hi * by if hi == hi else hi, lo * by
        hi, lo = block_sum(hi, lo)
        if SMOOTHED:
            more = passed + passed_lo
            if m != low and more != zero:
                far, far_lo = add(far, far_lo, more * (top - m))
            far, far_lo = block_sum(far, far_lo)
        if cuda.threadIdx.x == 0:
            found[i * NUMBERS_OF_ROW + MAXIMUM] = np.float64(top)
            found[i * NUMBERS_OF_ROW + OTHERS] = np.float64(hi) + (np.float64(lo) if hi - hi == zero else 0.0)
            found[i * NUMBERS_OF_ROW + FAR] = np.float64(whole(far, far_lo))
            if label < 0:
                found[i * NUMBERS_OF_ROW + HIT] = 0.0
        i += cuda.gridDim.x


def gradient(x, labels, weight, factors, g, rows, classes, cap):
    """The gradient of each row by its factors; it may lie where the scores do."""
    one = T(1)
    i = cuda.blockIdx.x
    while i < rows:
        label, at = labels[i], i * FACTORS_OF_ROW
        top, slope, asked = T(factors[at + TOP]), T(factors[at + SLOPE]), T(factors[at + ASKED])
        c = np.int64(cuda.threadIdx.x)
        while c < classes:
            made = T(0)
            if label != DEAD:
                v = score(x, i * classes + c, cap)
                made = slope * exp(v - top)
                if SMOOTHED:
                    made = made - asked * weight[c]
                if c == label:
                    made = T(factors[at + OWN_SLOPE])
                if CAPS:
                    t = v / cap
                    made = made * (one - t * t)
            array.store(g, i * classes + c, made)
            c += cuda.blockDim.x
        i += cuda.gridDim.x


def kernel(template: Any, code: int, smoothed: bool, capped: bool) -> Any:
    """One of the two kernels, for scores of one storage, in plain Python."""
    access = storage(code)
    scope = dict(array=access, T=access.T, SMOOTHED=smoothed, CAPS=capped)
    return as_kernel(template, scope, "shards", (code, smoothed, capped))


def compile_statistics(code: int, cc: tuple[int, int], smoothed: bool, capped: bool) -> Binary:
    """Compile `statistics`.

    Its arguments: scores, labels, class weights, the rows' numbers; rows, classes; the cap.
    """
    access = storage(code)
    weight = types.CPointer(access.arithmetic) if smoothed else types.none
    integers, wide = types.CPointer(types.int64), types.CPointer(types.float64)
    arguments = (access.pointer, integers, weight, wide, types.int64, types.int64, access.arithmetic)
    return compile(kernel(statistics, code, smoothed, capped), arguments, cc, THREADS)


def compile_gradient(code: int, cc: tuple[int, int], smoothed: bool, capped: bool) -> Binary:
    """Compile `gradient`.

    Its arguments: scores, labels, class weights, the rows' factors, the gradient; rows, classes; the cap.
    """
    access = storage(code)
    weight = types.CPointer(access.arithmetic) if smoothed else types.none
    integers, wide = types.CPointer(types.int64), types.CPointer(types.float64)
    pointers = access.pointer, integers, weight, wide, access.pointer
    arguments = (*pointers, types.int64, types.int64, access.arithmetic)
    return compile(kernel(gradient, code, smoothed, capped), arguments, cc, THREADS)


class Shard(NamedTuple):
    """The scores of some classes, as (rows, classes): see `kernels.cpu.shards`."""

    scores: DeviceArray
    labels: np.ndarray
    weight: np.ndarray | None
    softcap: float | None
    arithmetic: np.dtype

    def launch(self, make: Any, before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
        queue, (rows, classes) = current_queue(), self.scores.shape
        queue.launch(
            (max(1, min(MOST_BLOCKS, rows)), THREADS),
            make,
            (*before, *after, rows, classes, 1.0 if self.softcap is None else self.softcap),
            code=code_of(self.scores.dtype if self.plain else self.arithmetic),
            smoothed=self.weight is not None,
            capped=self.softcap is not None,
        )

    @property
    def plain(self) -> bool:
        """Whether scores are computed on as they are: in float64 arithmetic those of float64 alone."""
        return (code_of(self.scores.dtype) == FLOAT64) == (self.arithmetic == np.float64)

    def arrays(self) -> tuple[Any, ...]:
        """Return scores, labels and weights on the device."""
        queue, dtype = current_queue(), self.scores.dtype if self.plain else self.arithmetic
        weight = None if self.weight is None else queue.array(self.weight)
        return flat(self.scores, self.scores.shape, dtype, queue), queue.array(self.labels), weight

    def statistics(self, out: np.ndarray) -> None:
        """Store each row's numbers, (R, `NUMBERS_OF_ROW`)."""
        out[:] = -np.inf, 0, 0, 0  # of no classes
        if self.scores.size:
            found = current_queue().empty(out.shape, np.float64)
            self.launch(compile_statistics, self.arrays(), (found,))
            out[:] = to_host(found)
            with np.errstate(all="ignore"):
                out[:, OTHERS] *= np.where(out[:, OTHERS] == 0, 1, from_largest(out[:, MAXIMUM]))

    def gradient(self, factors: np.ndarray, out: DeviceArray) -> None:
        """Write the gradient of factors (R, `FACTORS_OF_ROW`) into an array like the scores, or these."""
        if not self.scores.size:
            return
        queue, (scores, labels, weight) = current_queue(), self.arrays()
        plain = out.dtype == scores.dtype and out.flags.c_contiguous
        made = out if plain else queue.empty(out.shape, scores.dtype)
        self.launch(compile_gradient, (scores, labels, weight), (queue.array(factors), made))
        if not plain:
            out.assign(made)

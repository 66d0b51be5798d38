"""Losses of a linear layer's scores: CuPy's matrix product, and the kernels of `softmax`, by chunks.

A chunk of scores is made, becomes its gradient where it lies, and is multiplied into the gradients of input,
weight and bias. The host does not know which terms count: a kernel settles that first, as the weight of each
term, and rows of the input that have none are copied as zeros, so that what they hold goes nowhere.
"""

import math
from typing import Any

import numpy as np

from .. import class_weights
from ..chunks import CUDA_ROWS, chunk_rows
from ..lift import scales_with_masses
from ..spec import INT64, Linear, Request, Scores, bad_index, code_of
from . import arithmetic, copy, elementwise, faults, rows, softmax
from .arrays import DeviceArray, Queue, current_queue, flat, total
from .reduce import THREADS
from .rows import INTEGERS, row_state
from .target import FAULT_MOST, Binary, as_kernel, compile, cuda, record, storage, types

# What the kernel is bound to.
T: Any = np.float32
OWN_ONLY: Any = True


def settle(labels, weight, sample_weight, rows, positions, classes, ignore, chosen, shares, faults):
    """Store each term's share, and a class that may index: what counts nothing has no share.

    A class index out of range makes the share NaN, and is recorded. Arrays are in the order (positions,
    rows); what is recorded is the place in the order (rows, positions).
    """
    n = rows * positions
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    while i < n:
        live, fill, label, share, _, _ = row_state(
            labels, weight, sample_weight, None, i, n, classes, ignore, T(1), OWN_ONLY, False, faults
        )
        if fill != fill:
            record(faults, i % rows * positions + i // rows, label)
        chosen[i] = label if live else 0
        shares[i] = share if live else fill
        i += cuda.gridDim.x * THREADS


def kernel(code: int, own_only: bool) -> Any:
    """`settle` for shares of one storage; `own_only` says that a row counts nothing if its class does not."""
    scope = dict(T=storage(code).T, OWN_ONLY=own_only)
    return as_kernel(settle, scope, "settle", code)


def compile_settle(
    code: int, cc: tuple[int, int], own_only: bool, weighted: bool, sample_weighted: bool
) -> Binary:
    """Compile `settle`, to be launched as `rows.counts` is."""
    numbers = storage(code).pointer
    arguments = (
        INTEGERS,
        numbers if weighted else types.none,
        numbers if sample_weighted else types.none,
        *[types.int64] * 4,
        INTEGERS,
        numbers,
        INTEGERS,
    )
    return compile(kernel(code, own_only), arguments, cc, THREADS)


# ---- launching ----------------------------------------------------------------------------------------

INSTALL = (
    "matrix products on a CUDA device need CuPy and cuBLAS: pip install 'cupy-cuda12x[ctk]' or "
    "'cupy-cuda13x[ctk]', as your driver's CUDA version is"
)


# ---- arrays -------------------------------------------------------------------------------------------


def add(into: DeviceArray, more: DeviceArray) -> None:
    """Add an array to another, both contiguous and of one dtype."""
    if into.size:
        request = Request(terms=True)
        elementwise.launch(elementwise.SUM, request, [into, more], [into], 1.0, None, (), None, None)


def clear(array: DeviceArray) -> None:
    """Make an array zero."""
    array.assign(array.queue.number(0, array.dtype).broadcast_to(array.shape))


def assign_rows(matrix: DeviceArray, source: DeviceArray, shares: DeviceArray | None) -> None:
    """Copy a matrix, maybe onto itself; rows that have no share become zero, whatever they hold."""
    if shares is None or not matrix.size:
        matrix.assign(source)
        return
    strides = ([s // a.itemsize for s in a.strides] for a in (source, matrix))
    shape, *steps = copy.collapse(matrix.shape, *strides, (1, 0))
    matrix.queue.launch(
        copy.launch(matrix.size),
        copy.compile_copy,
        (source, matrix, shares, matrix.size, *shape, *[s for each in steps for s in each]),
        dtype=source.dtype,
        to=matrix.dtype,
        axes=len(shape),
        wide=matrix.size >= copy.WIDE,
        shares=code_of(shares.dtype),
    )


def as_matrix(array: DeviceArray, dtype: np.dtype) -> DeviceArray | None:
    """An array (C, ..., F) of one position as a matrix, if products take it as it lies."""
    if array.dtype != dtype:
        return None
    if array.flags.c_contiguous:
        return array.reshape(array.shape[0], array.shape[-1])
    return array if array.ndim == 2 and array.flags.f_contiguous else None


# ---- products -----------------------------------------------------------------------------------------


def product(a: DeviceArray, b: DeviceArray, out: DeviceArray, more: bool = False) -> None:
    """Store ``a @ b``, or add it to what is there (`more`): of matrices contiguous in either order."""
    if a.size and b.size:
        multiply(a, b, out, more)
    elif not more:
        clear(out)


class External:
    """A stream, by CUDA's protocol for Python."""

    def __init__(self, stream: int) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream


def multiply(a: DeviceArray, b: DeviceArray, out: DeviceArray, more: bool) -> None:
    """`product` of matrices that are not empty. Only here CuPy is imported."""
    import cupy
    from cupy import cublas

    def seen(x: DeviceArray) -> Any:
        # By its address: with __cuda_array_interface__ CuPy would ask the driver for the device each time.
        memory = cupy.cuda.UnownedMemory(x.address, x.size * x.itemsize, x.owner, x.queue.device)
        return cupy.ndarray(x.shape, x.dtype, cupy.cuda.MemoryPointer(memory, 0), x.strides)

    # CuPy 14 has another way, which takes streams by CUDA's protocol, and warns of this one.
    from_external = getattr(cupy.cuda.Stream, "from_external", None)
    make = cupy.cuda.ExternalStream if from_external is None else lambda s: from_external(External(s))
    with make(out.queue.stream):
        cublas.gemm("N", "N", seen(a), seen(b), out=seen(out), beta=float(more))


class Layer:
    """A position's weight and bias; and their gradients, which are sums over chunks.

    `at` says which position, as slices of one element.
    """

    def __init__(self, p: Linear, outputs: dict[str, Any], at: tuple[slice, ...], queue: Queue) -> None:
        def part(array: Any) -> Any:
            return None if array is None else array[(slice(None), *at)]

        self.dtype, self.queue, self.classes = p.arithmetic, queue, p.linear_weight.shape[0]
        given, bias = part(p.linear_weight), part(p.linear_bias)
        self.weight: Any = as_matrix(given, self.dtype)
        if self.weight is None:
            self.weight = as_matrix(given.astype(self.dtype), self.dtype)
        self.bias = None
        if bias is not None:
            self.bias = bias.astype(self.dtype, copy=False).reshape(1, self.classes)
        self.by_weight, self.by_bias = part(outputs.get("linear_weight")), part(outputs.get("linear_bias"))
        self.weight_sum: Any = None
        self.bias_sum: Any = None
        if self.by_bias is not None:
            self.bias_sum = queue.empty((1, self.classes), self.dtype)
        if self.by_weight is not None:
            if not np.may_share_memory(self.by_weight, given):
                self.weight_sum = as_matrix(self.by_weight, self.dtype)
            if self.weight_sum is None:
                self.weight_sum = queue.empty(self.weight.shape, self.dtype)

    def score(self, x: DeviceArray, scores: DeviceArray) -> None:
        if self.bias is not None:
            scores.assign(self.bias.broadcast_to(scores.shape))
        product(x, self.weight.transpose(1, 0), scores, self.bias is not None)

    def add(self, g: DeviceArray, x: DeviceArray, more: bool) -> None:
        """Add what a chunk has in the gradients, the first one (not `more`) to nothing."""
        if self.weight_sum is not None:
            product(g.transpose(1, 0), x, self.weight_sum, more)
        if self.bias_sum is not None:
            ones = flat(np.ones(()), (1, g.shape[0]), self.dtype, self.queue)
            product(ones, g, self.bias_sum, more)

    def deliver(self) -> None:
        """Write the gradients, which may lie over the arrays themselves."""
        for out, made in ((self.by_weight, self.weight_sum), (self.by_bias, self.bias_sum)):
            if out is not None and out.address != made.address:
                out.assign(made.reshape(out.shape))


# ---- calls --------------------------------------------------------------------------------------------


class ByPosition:
    """The order of a call's terms here: positions first, then rows."""

    def __init__(self, ndim: int) -> None:
        self.rows = (*range(1, ndim), *range(min(ndim, 1)))


class Work:
    """A call. Its positions come one after the other, in chunks of rows."""

    def __init__(self, p: Linear, outputs: dict[str, Any]) -> None:
        self.p, self.outputs, self.queue, self.dtype = p, outputs, current_queue(), p.arithmetic
        self.classes, *self.inner, self.features = p.linear_weight.shape
        self.batch, self.positions = math.prod(p.input.shape[:-1]), math.prod(self.inner)
        self.rows = rows.Rows(p, [p.input], p.shape, ByPosition(len(p.shape)))
        self.weight = None if p.weight is None else flat(p.weight, (self.classes,), self.dtype, self.queue)
        self.of_scores = Scores(
            p.name,
            p.functions,
            (),
            None,
            None,
            p.has_probabilities,
            p.weight,
            p.ignore_index,
            p.label_smoothing,
            p.softcap,
            p.lse_square_scale,
            p.weighting,
            p.dtype,
            p.arithmetic,
        )

    def empty(self, *shape: int) -> DeviceArray:
        return self.queue.empty(shape, self.dtype)

    def batched(self, array: Any) -> Any:
        """An array of the call, or None, with an axis of rows."""
        return array if array is None or self.p.input.ndim == 2 else array[None]

    def copied(self, array: DeviceArray) -> bool:
        """Whether a chunk of an array of the scores' shape is not as kernels take it."""
        return array.dtype != self.dtype or self.positions > 1 or not array.flags.c_contiguous

    def run(self) -> DeviceArray:
        """Write the gradients; give the value, or the terms."""
        these, outputs = self.rows, self.outputs
        terms = these.terms()
        if not these.count:
            for out in outputs.values():
                clear(out)
            return these.finish(None, 1.0, None) if terms is None else terms
        divisor, by = self.settle()
        self.factor, self.gradients_by = these.factor / divisor, these.gradients_by(by) if outputs else None
        self.terms = self.empty(these.count)
        self.chunks()
        if terms is not None:
            ordered = terms.transpose(these.axes.rows)
            ordered.assign(self.terms.reshape(ordered.shape))
            return terms
        value: Any = elementwise.over(total(self.terms, 1.0 / divisor, self.dtype), by, self.dtype)
        return value.astype(self.p.dtype, copy=False)

    def settle(self) -> tuple[float, DeviceArray | None]:
        """Find out what each term counts for, and give what the mean divides by, as `Rows.divisors` does."""
        these, queue = self.rows, self.queue
        self.labels, self.slot, self.weights = None, None, these.sample_weight
        if self.p.has_probabilities:
            return these.divisors()
        labels = these.over_rows(self.p.target, INT64)
        self.labels, self.weights = queue.empty((these.count,), INT64), self.empty(these.count)
        self.slot = queue.slot(*_fault(self.p))
        queue.launch(
            rows.counts_launch(these.count),
            compile_settle,
            (
                *(labels, self.weight, these.sample_weight),
                *(self.batch, self.positions, self.classes, self.p.ignore_index),
                *(self.labels, self.weights, self.slot),
            ),
            code=code_of(self.dtype),
            own_only=not self.p.label_smoothing and scales_with_masses(self.p),
            weighted=self.weight is not None,
            sample_weighted=these.sample_weight is not None,
        )
        faults.check_now(queue.device)
        return these.divisors(
            lambda: rows.count_rows(these, labels, self.weight, self.classes, self.p.ignore_index)
        )

    def chunks(self) -> None:
        p, outputs = self.p, self.outputs
        # As large as the scores are copies of the probabilities and of the gradient by them, and two arrays
        # for that by the class weights.
        copies = (
            p.has_probabilities and self.copied(p.target),
            "target" in outputs and self.copied(outputs["target"]),
        )
        arrays = 1 + sum(copies) + 2 * ("weight" in outputs)
        row_bytes = arrays * self.classes * self.dtype.itemsize
        height, _ = chunk_rows(self.batch, row_bytes, *p.chunking, CUDA_ROWS, 0)
        self.scores, self.x = self.empty(height * self.classes), self.empty(height * self.features)
        self.by_weight: Any = None
        self.by_input = self.batched(outputs.get("input"))
        if self.by_input is not None and self.positions > 1:
            self.by_input = self.empty(self.batch, self.features)
            clear(self.by_input)
        if "weight" in outputs:
            self.by_weight = self.empty(self.classes)
            clear(self.by_weight)
        for k, place in enumerate(np.ndindex(*self.inner)):
            at = tuple(slice(i, i + 1) for i in place)
            layer = Layer(p, outputs, at, self.queue)
            for start in range(0, self.batch, height):
                self.chunk(layer, k * self.batch, slice(start, min(start + height, self.batch)), at)
            layer.deliver()
        # Only now: each position reads the input, and each chunk the class weights.
        if self.by_input is not None and self.positions > 1:
            outputs["input"].assign(self.by_input)
        if self.by_weight is not None:
            outputs["weight"].assign(self.by_weight)

    def chunk(self, layer: Layer, before: int, rows: slice, at: tuple[slice, ...]) -> None:
        """The terms of some rows at a position, before whose terms there are so many, and what they add."""
        n = rows.stop - rows.start
        terms = slice(before + rows.start, before + rows.stop)
        x, scores = (
            room[: n * width].reshape(n, width)
            for room, width in ((self.x, self.features), (self.scores, self.classes))
        )
        shares = None if self.weights is None else self.weights[terms]
        assign_rows(x, self.batched(self.p.input)[rows], shares)
        layer.score(x, scores)
        q: Any = None
        by_target = made = None
        if self.p.has_probabilities:
            q = self.batched(self.p.target)[(rows, slice(None), *at)]
            q = q.astype(self.dtype, copy=False).reshape(n, self.classes)
        if self.by_weight is not None:
            self.add_by_weight(terms, scores, q)
        if "target" in self.outputs:
            by_target = self.batched(self.outputs["target"])[(rows, slice(None), *at)]
            made = self.empty(*by_target.shape) if self.copied(by_target) else by_target
        g = scores if self.outputs.keys() & {"input", "linear_weight", "linear_bias"} else None
        self.launch(terms, scores, q, self.terms[terms], g, made)
        if by_target is not None and made is not by_target:
            by_target.assign(made)
        if g is None:
            return
        layer.add(g, x, rows.start > 0)
        if self.by_input is None:
            return
        product(g, layer.weight, x)
        if self.positions == 1:
            assign_rows(self.by_input[rows], x, shares)
        else:
            if shares is not None:
                assign_rows(x, x, shares)
            add(self.by_input[rows], x)

    def add_by_weight(self, terms: slice, scores: DeviceArray, q: DeviceArray) -> None:
        """Add a chunk's part of the gradient by the class weights."""
        distances = self.empty(*scores.shape)
        self.launch(terms, scores, q, None, None, distances, by_weight=True)
        parts = class_weights.attributed(
            distances, q, self.p.label_smoothing, scores.shape, self.dtype, arithmetic
        )
        sums = self.empty(self.classes)
        arithmetic.fold(parts, sums, (1,))
        add(self.by_weight, sums)

    def launch(
        self,
        at: slice,
        scores: DeviceArray,
        q: DeviceArray | None,
        terms: DeviceArray | None,
        g: DeviceArray | None,
        by_target: DeviceArray | None,
        by_weight: bool = False,
    ) -> None:
        """Launch the kernels of `softmax`, whose terms and gradients are as asked for."""
        labels, weights, upstream = (
            None if a is None else a[at] for a in (self.labels, self.weights, self.rows.upstream)
        )
        softmax.launch(
            self.of_scores,
            scores,
            q,
            labels,
            self.weight,
            weights,
            upstream,
            terms,
            [g, by_target, None],
            (scores.shape[0], self.classes, 1),
            self.factor,
            self.gradients_by,
            self.slot,
            False,
            by_weight,
        )


def run(p: Linear, outputs: dict[str, Any]) -> Any:
    """Write the gradients by their arguments' names; return the value, or the terms."""
    current_queue().record = None  # the library's products are not its own steps
    try:
        return Work(p, outputs).run()
    except ImportError as error:
        raise TypeError(f"{p.name}: {INSTALL}") from error


def _fault(p: Linear) -> tuple[Any, Any]:
    """Return a kind of call, and the error for a class index."""
    name, shape, classes = p.name, p.shape, p.linear_weight.shape[0]

    def error(position: int, label: int) -> IndexError:
        index = tuple(map(int, np.unravel_index(position, shape)))
        return bad_index(name, index, label, classes, "linear_weight", FAULT_MOST)

    return (name, shape, classes), error

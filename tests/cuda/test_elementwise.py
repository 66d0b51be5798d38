"""The elementwise kernels' own Python, in the block interpreter, against the reference."""

import itertools

import numpy as np
import pytest
from interpreter import ORDERS, launch

from numbaloss import reference, testing
from numbaloss.families.elementwise import ElementwiseLoss
from numbaloss.kernels.cuda import elementwise, reduce
from numbaloss.kernels.cuda.target import recorded, storage
from numbaloss.kernels.spec import CODES, Request
from numbaloss.loss import registry

ELEMENTWISE = [name for name, loss in registry.items() if issubclass(loss.Class, ElementwiseLoss)]
CASES = [(name, k) for name in ELEMENTWISE for k, _ in enumerate(testing.combinations(registry[name]))]
TILE = reduce.THREADS * reduce.IN_FLIGHT // 4  # float32 elements of a block


def aligned(a, offset=0):
    """A copy of an array that starts at a multiple of 16 bytes, or `offset` elements further."""
    room = np.empty(a.size + offset + 16, a.dtype)
    start = -(room.ctypes.data // a.itemsize) % (16 // a.itemsize) + offset
    room[start : start + a.size] = a
    return room[start : start + a.size]


class Call:
    """A loss with its options and flat arrays, to be run as a kernel and by the reference."""

    def __init__(self, name, n, options=None, dtype=np.float32, seed=0, missing=(), off_bounds=False):
        self.loss, self.n, self.dtype = registry[name], n, np.dtype(dtype)
        self.options = next(testing.combinations(self.loss)) if options is None else options
        rng = np.random.default_rng(seed)
        drawn = testing.samples(self.loss, rng, (n,))
        cls = self.loss.Class
        if off_bounds:  # labels and limits, where derivatives are one-sided or a convention
            for k, operand in cls.operands.items():
                x = drawn[k] + rng.uniform(1e-3, 1e-2, n)
                drawn[k] = np.clip(x, operand.low + 1e-3, operand.high - 1e-3)
        self.names = [k for k in cls._arrays if k not in missing]
        self.arrays = {k: aligned(drawn[k].astype(dtype)) for k in self.names}
        self.weights = self.upstream = None

    def exact(self, **moved):
        """The terms in float64, unweighted, of the arrays as they were rounded."""
        arrays = {k: a.astype(np.float64) for k, a in self.arrays.items()}
        reference_loss = getattr(reference, self.loss.__name__)
        return reference_loss(**{**arrays, **moved, **self.options, "reduction": "none"})

    def slope(self, name, order=1):
        """The terms' derivatives by differences; NaN at kinks."""
        x = self.arrays[name].astype(np.float64)
        h = 1e-6 if order == 1 else 1e-4
        low, mid, high = (self.exact(**{name: x + d * h * np.maximum(1, abs(x))}) for d in (-1, 0, 1))
        h = h * np.maximum(1, abs(x))
        if order == 2:
            return (high - 2 * mid + low) / h**2
        left, right = (mid - low) / h, (high - mid) / h
        smooth = testing.smooth(left, right)
        if hasattr(self.loss.Class, f"slope_{name}"):
            smooth &= (left != 0) | (right != 0)  # it may pass a clamp
        return np.where(smooth, (left + right) / 2, np.nan)

    def run(self, request=None, order="forward", vectors=True, divisor=None, summed=True, seed=0):
        """The kernel's outputs in order, then the value that `finish` gives, then the fault."""
        request = request or Request(wrt=tuple(range(len(self.names))))
        cls, n = self.loss.Class, self.n
        code = CODES[self.dtype.name]
        T = storage(code).T
        names = cls._option_names
        statics = tuple(self.options[o] if isinstance(self.options[o], bool) else None for o in names)
        numbers = tuple(T(self.options[o]) for o in names if not isinstance(self.options[o], bool))
        scalars = cls._scalars(statics, len(self.names))
        operands = list(self.arrays.values())
        blank = [aligned(np.full(n, np.nan, self.dtype)) for _ in range(5)]
        in_place = request.in_place or (False,) * len(request.wrt)
        gradients = [
            operands[k] if same else new
            for k, same, new in zip(request.wrt, in_place, blank[2:], strict=False)
        ]
        terms = blank[0] if request.terms else None
        curvature = blank[1] if request.curvature else None
        grid = reduce.launch(n, T)
        partials = np.full(2 * grid.blocks, np.nan, T) if summed else None
        faults = np.zeros(1, np.int64)
        arguments = [
            *operands,
            *[None] * (3 - len(operands)),
            self.weights if request.weighted else None,
            self.upstream if request.upstream else None,
            terms,
            *gradients,
            *[None] * (3 - len(gradients)),
            curvature,
        ]
        factor = 1 / max(n, 1)
        kernel = elementwise.kernel(scalars, request, code, vectors)
        checked = any(scalars.domains)
        more = (n, T(factor), divisor, numbers, partials, faults if checked else None)
        launch(kernel, *grid, *arguments, *more, order=order, seed=seed)
        value = np.full(1, np.nan, self.dtype)
        if summed:
            finish = reduce.finish_kernel(code)
            launch(finish, 1, 64, partials, grid.blocks, factor, divisor, value, order=order)
        outputs = [a for a in (terms, *gradients, curvature) if a is not None]
        return [a.astype(np.float64) for a in outputs], float(value[0]), recorded(int(faults[0]))


def close(got, wanted, roundings=32, dtype=np.float32, atol=1e-9):
    """As near as some roundings of float32 leave numbers of which some are differences of larger ones."""
    wanted = np.asarray(wanted)
    known = ~np.isnan(wanted)
    assert known.mean() > 0.25 or known.size < 9
    got, wanted = np.asarray(got)[known], wanted[known]
    typical = np.median(np.abs(wanted)) if wanted.size else 0.0
    error = roundings * np.finfo(np.float32).eps * (np.abs(wanted) + typical) + atol
    if dtype is not np.float32:
        error += float(testing.finfo(dtype).eps) * np.abs(wanted) + float(
            testing.finfo(dtype).smallest_subnormal
        )
    np.testing.assert_array_less(np.abs(got - wanted), error)


@pytest.mark.parametrize("name, k", CASES)
def test_value_and_gradients(name, k):
    options = next(itertools.islice(testing.combinations(registry[name]), k, None))
    call = Call(name, 203, options, seed=k, off_bounds=True)
    gradients, value, fault = call.run()
    assert fault is None
    close(value, call.exact().mean())
    for n, g in zip(call.names, gradients, strict=True):
        close(g * call.n, call.slope(n))


def weighted_call(name):
    """A call with weights and an upstream gradient, NaN and infinity where the weight is zero."""
    call = Call(name, 101, off_bounds=True)
    rng = np.random.default_rng(1)
    call.weights = aligned(rng.integers(0, 3, call.n).astype(np.float32))
    call.upstream = aligned(rng.uniform(-1, 1, call.n).astype(np.float32))
    terms, slopes = call.exact() * call.weights, [call.slope(n) * call.weights for n in call.names]
    curvature = call.slope(call.names[0], 2) * call.weights
    hidden = np.flatnonzero(call.weights == 0)
    call.arrays[call.names[0]][hidden[::2]] = np.nan
    call.arrays[call.names[1]][hidden[1::2]] = np.inf
    return call, hidden, terms, slopes, curvature


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_terms_weights_and_upstream(name):
    call, hidden, wanted, slopes, _ = weighted_call(name)
    wrt = tuple(range(len(call.names)))
    request = Request(weighted=True, upstream=True, terms=True, wrt=wrt)
    (terms, *gradients), _, fault = call.run(request, order="random", summed=False)
    assert fault is None
    for x in (terms, *gradients):
        assert not x[hidden].any()
    shown = call.weights != 0
    close(terms[shown], wanted[shown])
    for gradient, slope in zip(gradients, slopes, strict=True):
        close(gradient[shown] * call.n, (slope * call.upstream)[shown])


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_curvature(name):
    call, hidden, terms, slopes, wanted = weighted_call(name)
    request = Request(weighted=True, upstream=True, wrt=(0,), curvature=True)
    (gradient, curvature), value, _ = call.run(request, order="reverse")
    assert not curvature[hidden].any() and not gradient[hidden].any()
    close(value, terms.mean())
    smooth = ~np.isnan(slopes[0]) & (call.weights != 0)
    close((gradient * call.n)[smooth], (slopes[0] * call.upstream)[smooth])
    close((curvature * call.n)[smooth], (wanted * call.upstream)[smooth], roundings=1e3, atol=1e-6)


SIZES = (0, 1, 7, 8, 9, TILE - 1, TILE, TILE + 1, 2 * TILE + 5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("n", SIZES)
def test_sizes_orders_and_dtypes(n, dtype, request):
    T = request.getfixturevalue("bfloat16") if dtype == "bfloat16" else np.dtype(dtype)
    results = []
    for order, vectors in ((o, v) for o in ORDERS for v in (True, False)):
        call = Call("huber_loss", n, dtype=T)
        (g, _), value, _ = call.run(order=order, vectors=vectors)
        results.append((g, value))
    g, value = results[0]
    for other, also in results[1:]:
        np.testing.assert_array_equal(other, g)
        np.testing.assert_allclose(also, value, rtol=1e-7)
    if n:
        close(value, call.exact().mean(), dtype=T.type)
        close(g, call.slope("input") / n, dtype=T.type)


def test_more_tiles_than_blocks(monkeypatch):
    whole, few = Call("huber_loss", 5 * TILE + 3), Call("huber_loss", 5 * TILE + 3)
    wanted, value, _ = whole.run()
    monkeypatch.setattr(reduce, "MOST_BLOCKS", 2)
    got, other, _ = few.run()
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_allclose(other, value, rtol=1e-7)


@pytest.mark.parametrize("order", ORDERS)
def test_the_same_bits_in_every_order(order):
    call, other = Call("kl_div", TILE + 77), Call("kl_div", TILE + 77)
    assert call.run(order=order, seed=3)[1] == other.run()[1]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_in_place(name):
    apart, over = Call(name, 37), Call(name, 37)
    wrt = tuple(range(len(apart.names)))
    wanted, value, _ = apart.run(Request(wrt=wrt))
    got, same, _ = over.run(Request(wrt=wrt, in_place=(True,) * len(wrt)), order="reverse")
    assert value == same
    np.testing.assert_array_equal(got, wanted)


def test_unaligned_arrays_take_the_kernel_without_vectors():
    call, shifted = Call("mse_loss", 70), Call("mse_loss", 70)
    shifted.arrays = {k: aligned(a, offset=1) for k, a in shifted.arrays.items()}
    with pytest.raises(AssertionError, match="not aligned"):
        shifted.run()
    np.testing.assert_array_equal(shifted.run(vectors=False)[0], call.run()[0])


def test_a_third_operand_may_be_absent():
    call = Call("binary_cross_entropy_with_logits", 33, missing=("pos_weight",))
    gradients, value, _ = call.run()
    assert len(gradients) == 2
    close(value, call.exact().mean())


def test_divisor_on_the_device():
    call = Call("huber_loss", 300)
    call.weights = aligned(np.random.default_rng(2).uniform(size=300).astype(np.float32))
    code = CODES["float32"]
    grid = reduce.launch(call.n, np.float32)
    partials, divisor = np.full(2 * grid.blocks, np.nan, np.float32), np.zeros(1, np.float32)
    launch(reduce.sums_kernel(code), *grid, call.weights, call.n, partials)
    launch(reduce.finish_kernel(code), 1, 64, partials, grid.blocks, 1.0, None, divisor)
    np.testing.assert_allclose(divisor[0], call.weights.sum(dtype=np.float64), rtol=1e-7)
    (gradient,), value, _ = call.run(Request(weighted=True, wrt=(0,)), divisor=divisor)
    total = divisor[0].astype(np.float64) * call.n  # `run` divides by the number of elements too
    close(value, (call.exact() * call.weights).sum() / total)
    close(gradient, call.slope("input") * call.weights / total)


def test_a_mean_over_no_weight_is_nan_and_its_gradient_zero():
    call = Call("mse_loss", 20)
    call.weights = aligned(np.zeros(20, np.float32))
    request = Request(weighted=True, wrt=(0,))
    (gradient,), value, _ = call.run(request, divisor=np.zeros(1, np.float32))
    assert np.isnan(value) and not gradient.any()
    call.weights[:2] = 1, -1
    (gradient,), value, _ = call.run(request, divisor=np.zeros(1, np.float32))
    assert np.isnan(value) and np.isnan(gradient[:2]).all() and not gradient[2:].any()


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_out_of_domain_is_nan_and_recorded(order, vectors):
    n = TILE + 3
    for bad in ([5, 900, n - 1], [n - 1], [TILE - 1, n - 2]):
        call = Call("binary_cross_entropy", n)
        call.arrays["target"][bad] = 1.5
        request = Request(terms=True, wrt=(0, 1))
        outputs, value, fault = call.run(request, order=order, vectors=vectors)
        assert fault == (bad[0], 1) and np.isnan(value)
        for x in outputs:
            np.testing.assert_array_equal(np.flatnonzero(np.isnan(x)), bad)


def test_a_zero_weight_excuses_what_is_out_of_domain():
    call = Call("binary_cross_entropy", 40)
    call.arrays["input"][7] = np.nan
    call.weights = aligned((np.arange(40) != 7).astype(np.float32))
    (gradient,), value, fault = call.run(Request(weighted=True, wrt=(0,)))
    assert fault is None and gradient[7] == 0 and np.isfinite(value)


def test_bounds_of_binary_cross_entropy():
    call = Call("binary_cross_entropy", 4)
    call.arrays["input"][:], call.arrays["target"][:] = [0, 0, 1, 1], [0, 1, 0, 1]
    (terms, gradient), _, fault = call.run(Request(terms=True, wrt=(0,)), summed=False)
    assert fault is None
    np.testing.assert_array_equal(terms, [0, 100, 100, 0])
    np.testing.assert_allclose(gradient * 4, [0, -1e12, 1e12, 0], rtol=1e-6)


def test_infinite_terms_give_an_infinite_mean():
    call = Call("mse_loss", 50)
    call.arrays["input"][17] = np.inf
    assert call.run()[1] == np.inf
    call.arrays["target"][18] = np.nan
    assert np.isnan(call.run()[1])


def test_a_sum_keeps_what_float32_would_lose():
    call = Call("l1_loss", 40000)
    call.arrays["target"][:] = 0
    call.arrays["input"][:] = 0.1
    call.arrays["input"][0] = 1e7
    value = call.run(Request())[1] * call.n
    np.testing.assert_allclose(value, 1e7 + 39999 * float(np.float32(0.1)), rtol=1e-7)

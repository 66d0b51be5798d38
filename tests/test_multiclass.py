"""Cross entropy and the negative log-likelihood: every target, layout and edge against the reference."""

import itertools
import math
import pickle

import numba
import numpy as np
import pytest
from sweeps import sweep

from numbaloss import reference
from numbaloss.losses.multiclass import CrossEntropyLoss, NLLLoss

cross_entropy, nll_loss = CrossEntropyLoss.function, NLLLoss.function

# One of each layout that kernels know: no batch, short rows, rows with and without a whole number of vectors,
# columns, columns in more than one tile, more classes than a group of columns.
SHAPES = [(5,), (37, 10), (6, 65), (3, 128), (2, 4, 3), (2, 3, 5, 7), (1, 70, 9), (2, 20, 1500)]

# Rounding errors of float32 arithmetic: a few ulps of each term, and of sums that they enter.
TOLERANCE = {np.float64: {"rtol": 1e-11, "atol": 1e-12}, np.float32: {"rtol": 2e-5, "atol": 2e-6}}


def rows_of(shape):
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def classes_of(shape):
    return shape[min(1, len(shape) - 1)]


def sample(shape, kind="indices", dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) * 3).astype(dtype)
    if kind == "indices":
        target = rng.integers(0, classes_of(shape), rows_of(shape))
    else:
        axis = min(1, len(shape) - 1)
        target = rng.random(shape)
        target = (target / target.sum(axis=axis, keepdims=True)).astype(dtype)
    return x, target


def ignoring(target, index=-100):
    """The target with every third row ignored."""
    target = np.array(target)
    target.reshape(-1)[::3] = index
    return target


def gradient_of(loss, x, target, grad_output=None, **options):
    """The gradient of cross entropy by hand, or of the likelihood, in float64."""
    shape = x.shape
    axis, rows = min(1, x.ndim - 1), rows_of(shape)
    options = {"weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0} | options
    if loss is nll_loss:
        del options["label_smoothing"]
    oracle = getattr(reference, loss.__name__)
    terms_options = options | {"reduction": "none"}
    # Each term depends on its own row: one column of differences gives the whole Jacobian.
    x = x.astype(np.float64)
    g = np.empty(shape)
    for c in range(shape[axis]):
        at = (slice(None),) * axis + (c,)
        moved = [x.copy(), x.copy()]
        for m, step in zip(moved, (-1e-5, 1e-5), strict=True):
            m[at] += step
        low, high = (oracle(m, target, **terms_options) for m in moved)
        g[at] = (high - low) / 2e-5
    scale = np.broadcast_to(np.float64(1 if grad_output is None else grad_output), rows)
    if options["reduction"] == "mean":
        total = oracle(x, target, **options | {"reduction": "sum"})
        mean = oracle(x, target, **options)
        scale = scale * (mean / total)
    return g * np.expand_dims(scale, axis)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.thin(6)
def test_reference_and_torch(kind, shape, dtype, torch):
    """Values, and gradients by every argument that PyTorch differentiates."""
    import torch.nn.functional as F

    x, target = sample(shape, kind, dtype)
    if kind == "indices" and shape[1:]:
        target = ignoring(target)
    rng = np.random.default_rng(1)
    class_weight = rng.uniform(0.2, 2, classes_of(shape)).astype(dtype)
    tight = TOLERANCE[dtype]
    losses = [cross_entropy] if kind == "probabilities" else [cross_entropy, nll_loss]
    for loss, smoothing, weight, reduction in itertools.product(
        losses, (0.0, 0.1, 1.0), (None, class_weight), ("none", "mean", "sum")
    ):
        if loss is nll_loss and smoothing:
            continue
        options = {"weight": weight, "reduction": reduction}
        if loss is cross_entropy:
            options["label_smoothing"] = smoothing
        wrt = ("input", "target", "weight") if kind == "probabilities" else ("input",)
        wrt = wrt if weight is not None else wrt[:2]
        up = rng.normal(size=rows_of(shape)).astype(dtype) if reduction == "none" else 1.5

        tensors = {"input": torch.tensor(x), "target": torch.tensor(target)}
        tensors["weight"] = None if weight is None else torch.tensor(weight)
        for n in wrt:
            tensors[n].requires_grad_()
        expected = getattr(F, loss.__name__)(**{**options, **tensors})
        expected.backward(torch.as_tensor(np.asarray(up, dtype)).expand(expected.shape))

        value, gradients = loss.value_and_grad(x, target, wrt=wrt, grad_output=up, **options)
        assert np.asarray(value).dtype == dtype and np.shape(value) == tuple(expected.shape)
        np.testing.assert_allclose(value, expected.detach().numpy(), **tight)
        np.testing.assert_allclose(value, getattr(reference, loss.__name__)(x, target, **options), **tight)
        np.testing.assert_allclose(loss(x, target, **options), value, **tight)
        for n, g in zip(wrt, gradients, strict=True):
            like = {"input": x, "target": target, "weight": weight}[n]
            assert g.dtype == like.dtype and g.shape == like.shape
            # Sums over rows and positions have as many roundings.
            size = 30 if n == "weight" and dtype == np.float32 else 1
            scale = {"rtol": tight["rtol"], "atol": tight["atol"] * size * max(1, abs(np.max(np.abs(g))))}
            np.testing.assert_allclose(g, tensors[n].grad.numpy(), **scale, err_msg=n)


@pytest.mark.parametrize("loss", [cross_entropy, nll_loss], ids=lambda f: f.__name__)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.thin(6)
def test_sample_weight_and_normalizer(loss, reduction):
    x, target = sample((7, 4, 3))
    target = ignoring(target)
    rng = np.random.default_rng(2)
    oracle = getattr(reference, loss.__name__)
    weight = rng.random(4)
    for shape in [(7, 3), (7, 1), (3,), ()]:
        sample_weight = rng.random(shape)
        for normalizer in (None, 12.5):
            options = {
                "weight": weight, "reduction": reduction, "sample_weight": sample_weight,
                "normalizer": normalizer,
            }  # fmt: skip
            np.testing.assert_allclose(loss(x, target, **options), oracle(x, target, **options), rtol=1e-12)
            g = loss.grad(x, target, **options)
            expected = gradient_of(loss, x, target, **options)
            np.testing.assert_allclose(g, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", sweep(SHAPES, *SHAPES[::3]), ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.thin(6)
def test_zero_sample_weight_is_zero(kind, shape):
    """Also where the row is NaN, in every layout; its class index is checked all the same."""
    x, target = sample(shape, kind)
    rows = rows_of(shape)
    w = np.ones(rows)
    w.reshape(-1)[::2] = 0
    axis = min(1, x.ndim - 1)
    bad = np.where(np.expand_dims(w, axis) == 0, np.nan, x)
    options = {"sample_weight": w, "label_smoothing": 0.1, "reduction": "sum"}
    value, g = cross_entropy.value_and_grad(bad, target, **options)
    expected, expected_g = cross_entropy.value_and_grad(x, target, **options)
    assert value == expected
    np.testing.assert_array_equal(g, expected_g)
    assert not g[np.broadcast_to(np.expand_dims(w, axis) == 0, shape)].any()
    terms, h = cross_entropy.value_grad_hess(bad, target, **options | {"reduction": "none"})[::2]
    assert np.isfinite(terms).all() and np.isfinite(h).all()
    if kind == "indices":
        wrong = np.array(target)
        wrong.reshape(-1)[0] = 99999
        with pytest.raises(IndexError):
            cross_entropy(bad, wrong, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ignored_rows_are_not_read(shape):
    x, target = sample(shape)
    target = ignoring(target)
    axis = min(1, x.ndim - 1)
    hidden = np.broadcast_to(np.expand_dims(target == -100, axis), shape)
    for loss, smoothing in ((cross_entropy, {}), (cross_entropy, {"label_smoothing": 0.2}), (nll_loss, {})):
        expected = loss.value_and_grad(x, target, **smoothing)
        for junk in (np.nan, np.inf, -np.inf):
            poisoned = np.where(hidden, junk, x)
            value, g = loss.value_and_grad(poisoned, target, **smoothing)
            np.testing.assert_equal(value, expected[0])
            np.testing.assert_array_equal(g, expected[1])
        assert not g[hidden].any()


@pytest.mark.parametrize("shape", [(6, 5), (6, 70), (2, 5, 3)], ids=str)
def test_ignore_index_may_be_a_class(shape):
    x, target = sample(shape)
    np.testing.assert_allclose(
        cross_entropy(x, target, ignore_index=2), reference.cross_entropy(x, target, ignore_index=2)
    )


@pytest.mark.parametrize("loss", [cross_entropy, nll_loss], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(4, 5), (4, 70), (4, 5, 3)], ids=str)
def test_all_ignored(loss, shape):
    x = np.full(shape, np.nan)
    target = np.full(rows_of(shape), -100)
    value, g = loss.value_and_grad(x, target)
    assert math.isnan(value) and not g.any()
    assert loss(x, target, reduction="sum") == 0
    assert not loss(x, target, reduction="none").any()
    assert loss(x, target, normalizer=3.0) == 0


@pytest.mark.parametrize("loss", [cross_entropy, nll_loss], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)], ids=str)
def test_empty_batch(loss, shape):
    x, target = np.zeros(shape, np.float32), np.zeros(rows_of(shape), int)
    value, g = loss.value_and_grad(x, target)
    assert math.isnan(value) and value.dtype == np.float32 and g.shape == shape
    assert loss(x, target, reduction="sum") == 0
    assert loss(x, target, reduction="none").shape == rows_of(shape)


@pytest.mark.parametrize("classes", [4, 70])
@pytest.mark.parametrize("inner", [(), (3,)], ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
class TestExtremes:
    """What PyTorch loses, or makes NaN, in each layout: the rows' scores go to all inner positions."""

    @staticmethod
    def spread(rows, classes, inner, dtype):
        x = np.full((len(rows), classes), -np.inf)
        for row, scores in zip(x, rows, strict=True):
            row[: len(scores)] = scores
        return (
            np.repeat(x.reshape(*x.shape, *(1,) * len(inner)), *(inner or (1,)), axis=-1).astype(dtype)
            if inner
            else x.astype(dtype)
        )

    def labels(self, rows, inner):
        return np.broadcast_to(np.reshape(rows, (-1, *(1,) * len(inner))), (len(rows), *inner)).copy()

    def test_large_scores(self, classes, inner, dtype):
        x = self.spread([[1e8, 1e8], [-1e8, -1e8], [1e30, 0.0]], classes, inner, dtype)
        value = cross_entropy(x, self.labels([0, 1, 0], inner), reduction="none")
        expected = self.labels([math.log(2), math.log(2), 0.0], inner)
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=0)

    def test_infinite_scores(self, classes, inner, dtype):
        x = self.spread([[0.0], [], [np.inf, 0.0], [0.0, -np.inf, 0.0]], classes, inner, dtype)
        value, g = cross_entropy.value_and_grad(x, self.labels([0, 0, 0, 1], inner), reduction="none")
        expected = self.labels([0.0, np.nan, np.nan, np.inf], inner)
        np.testing.assert_array_equal(value, expected)
        assert np.isnan(g[1]).all() and np.isfinite(g[0]).all() and np.isfinite(g[3]).all()

    def test_nan_stays_in_its_row(self, classes, inner, dtype):
        x = np.zeros((3, classes, *inner), dtype)
        x[1, 1] = -np.nan
        value, g = cross_entropy.value_and_grad(x, self.labels([0, 0, 0], inner), reduction="none")
        assert np.isnan(value[1]).all() and np.isnan(g[1]).all()
        assert np.isfinite(value[[0, 2]]).all() and np.isfinite(g[[0, 2]]).all()

    def test_sure_and_right(self, classes, inner, dtype):
        """Loss and gradient of the true class are tiny and exact, where 1 - p would be 0."""
        x = self.spread([[0.0, -25.0]], classes, inner, dtype)
        value, g, h = cross_entropy.value_grad_hess(x, self.labels([0], inner), reduction="sum")
        count = math.prod(inner)
        small = math.exp(-25)
        np.testing.assert_allclose(value, count * math.log1p(small), rtol=1e-6)
        np.testing.assert_allclose(g[0, 0], -small / (1 + small), rtol=1e-6)
        np.testing.assert_allclose(g[0, 1], small / (1 + small), rtol=1e-6)
        np.testing.assert_allclose(h[0, 0], small / (1 + small) ** 2, rtol=1e-6)

    def test_zero_times_infinity(self, classes, inner, dtype):
        x = self.spread([[0.0, -np.inf, 0.0]], classes, inner, dtype)
        q = np.zeros_like(x)
        q[0, 0] = q[0, 2] = 0.5
        value, (g, gq) = cross_entropy.value_and_grad(x, q, wrt=("input", "target"), reduction="sum")
        np.testing.assert_allclose(value, math.prod(inner) * math.log(2), rtol=1e-6)
        np.testing.assert_allclose(g, 0, atol=1e-7)
        assert np.isposinf(gq[0, 1]).all()
        weight = np.zeros(classes, dtype)
        weight[[0, 2]] = 1
        smoothed = cross_entropy(
            x, self.labels([0], inner), weight=weight, label_smoothing=0.1, reduction="sum"
        )
        assert np.isfinite(smoothed)
        assert np.isposinf(cross_entropy(x, self.labels([0], inner), label_smoothing=0.1))


LAYOUTS = {
    "fortran": np.asfortranarray,
    "negative": lambda a: a[::-1].copy()[::-1],
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "sliced": lambda a: np.pad(a, 1)[(slice(1, -1),) * a.ndim],
    "channels last": lambda a: np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1),
    "byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "zero stride": lambda a: np.broadcast_to(a[:1], a.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5), (6, 70), (3, 5, 4), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_layouts(kind, shape, layout):
    """Same bits or nearly, whatever the strides; the inputs may be read-only."""
    x, target = sample(shape, kind, np.float32)
    if layout == "zero stride":
        x = np.broadcast_to(x[:1], shape)
    a = LAYOUTS[layout](x)
    a.flags.writeable = False
    b = target if kind == "indices" else LAYOUTS[layout](target)
    b = b.astype(np.int16) if kind == "indices" else b
    b.flags.writeable = False
    plain = np.ascontiguousarray
    if kind == "probabilities":
        target = plain(b).astype(np.float32)
    for reduction in ("none", "mean"):
        value, g = cross_entropy.value_and_grad(a, b, reduction=reduction)
        expected, expected_g = cross_entropy.value_and_grad(plain(x), target, reduction=reduction)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(g, expected_g, rtol=1e-4, atol=1e-7)
        out = LAYOUTS[layout](np.ones_like(x)) if layout not in ("byte order", "zero stride") else None
        if out is not None:
            assert cross_entropy.grad(plain(x), target, reduction=reduction, out=out) is out
            np.testing.assert_allclose(out, expected_g, rtol=1e-4, atol=1e-7)
    if kind == "indices":
        np.testing.assert_allclose(nll_loss(a, b), nll_loss(plain(x), target), rtol=1e-5)
        np.testing.assert_array_equal(nll_loss.grad(a, b), nll_loss.grad(plain(x), target))


@pytest.mark.parametrize("shape", [(40, 10), (9, 70), (3, 5, 40)], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.thin(12)
def test_halves(half, kind, shape, request):
    """Arithmetic in float32: off by the rounding to the input's dtype alone, half a unit of it."""
    half = np.float16 if half == "float16" else request.getfixturevalue("bfloat16")
    x, target = sample(shape, kind)
    x = x.astype(half)
    target = target if kind == "indices" else target.astype(half)
    rounding = 2.0 ** -(11 if half == np.float16 else 8)
    wide = target if kind == "indices" else target.astype(np.float64)
    expected, expected_g = cross_entropy.value_and_grad(x.astype(np.float64), wide, reduction="sum")
    value, g = cross_entropy.value_and_grad(x, target, reduction="sum")
    assert value.dtype == half and g.dtype == half
    np.testing.assert_allclose(float(value), expected, rtol=rounding * 1.01)
    np.testing.assert_allclose(g.astype(np.float64), expected_g, rtol=rounding * 1.01, atol=2e-7)
    if kind == "indices":
        assert cross_entropy.grad(x, target, out=x) is x
        assert nll_loss.grad(x, target).dtype == half


@pytest.mark.more
def test_dtypes_promote():
    x, target = sample((6, 5), "probabilities")
    assert cross_entropy(x.astype("f4"), target.astype("f8")).dtype == np.float64
    assert cross_entropy(x.astype("f2"), target.astype("f4")).dtype == np.float32
    g, gq = cross_entropy.grad(x.astype("f4"), target, wrt=("input", "target"))
    assert g.dtype == np.float32 and gq.dtype == np.float64
    np.testing.assert_allclose(g, cross_entropy.grad(x, target), rtol=1e-4, atol=1e-6)
    x, labels = sample((6, 5), dtype=np.float32)
    assert cross_entropy(x, labels, weight=np.arange(1, 6)).dtype == np.float32
    assert cross_entropy(x, labels, sample_weight=2.0).dtype == np.float32


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4"])
@pytest.mark.parametrize("loss", [cross_entropy, nll_loss], ids=lambda f: f.__name__)
def test_index_dtypes(loss, dtype):
    x, target = sample((9, 5))
    assert loss(x, target.astype(dtype)) == loss(x, target)
    signed = np.dtype(dtype).kind == "i"
    wrong = target.copy().astype(dtype)
    wrong[3] = -7 if signed else np.iinfo(dtype).max - 99  # in uint64, -100 as its bits
    with pytest.raises(IndexError, match=rf"target\[3\] is {wrong[3]}, but input has 5 classes"):
        loss(x, wrong)


@pytest.mark.parametrize("loss", [cross_entropy, nll_loss], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(9, 5), (9, 70), (4, 5, 3), (2, 5, 3, 2)], ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
def test_bad_index_is_found_first(loss, shape, order):
    """The message has its place, and nothing has been written."""
    x, target = sample(shape, dtype=np.float32)
    x = np.asarray(x, order=order)
    place = tuple(n - 1 for n in target.shape)
    target[place] = shape[1]
    before = x.copy()
    at = ", ".join(map(str, place))
    message = rf"^{loss.__name__}: target\[{at}\] is {shape[1]}, but input has {shape[1]} classes$"
    with pytest.raises(IndexError, match=message):
        loss.value_and_grad(x, target, out=x)
    np.testing.assert_array_equal(x, before)


def test_bad_index_of_no_batch():
    with pytest.raises(IndexError, match="^cross_entropy: target is 5, but input has 5 classes$"):
        cross_entropy(np.zeros(5), 5)


@pytest.mark.parametrize("shape", [(6, 5), (6, 70), (3, 5, 4), (3, 5, 300)], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_in_place(kind, shape):
    for order, reduction, smoothing in itertools.product("CF", ("mean", "none"), (0.0, 0.2)):
        x, target = sample(shape, kind, np.float32)
        options = {"reduction": reduction, "label_smoothing": smoothing}
        x = np.asarray(x, order=order)
        expected, g = cross_entropy.value_and_grad(x, target, **options)
        buffer = x.copy(order="K")
        value, got = cross_entropy.value_and_grad(buffer, target, out=buffer, **options)
        assert got is buffer
        np.testing.assert_array_equal(value, expected)
        np.testing.assert_array_equal(got, g)
        if kind == "probabilities":
            _, both = cross_entropy.value_and_grad(x, target, wrt=("input", "target"), **options)
            a, b = x.copy(order="K"), target.copy()
            cross_entropy.grad(a, b, wrt=("input", "target"), out=(a, b), **options)
            np.testing.assert_allclose(a, both[0], rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(b, both[1], rtol=1e-5, atol=1e-7)
        elif not smoothing:
            buffer = x.copy(order="K")
            expected = nll_loss.value_and_grad(x, target, reduction=reduction)
            np.testing.assert_array_equal(
                nll_loss.value_and_grad(buffer, target, out=buffer, reduction=reduction)[0], expected[0]
            )
            np.testing.assert_array_equal(buffer, expected[1])


@pytest.mark.parametrize("shape", [(6, 5), (3, 70), (3, 5, 4)], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.thin(6)
def test_curvature(kind, shape):
    """The diagonal of the Hessian over the scores, against differences of the gradient."""
    x, target = sample(shape, kind)
    weight = np.random.default_rng(3).random(shape[1])
    options = {"weight": weight, "label_smoothing": 0.1, "sample_weight": 0.7, "grad_output": 1.3}
    value, g, h = cross_entropy.value_grad_hess(x, target, **options)
    assert value == cross_entropy(x, target, weight=weight, label_smoothing=0.1, sample_weight=0.7)
    np.testing.assert_allclose(g, cross_entropy.grad(x, target, **options), rtol=1e-12)
    for c in range(shape[1]):
        high, low = x.copy(), x.copy()
        high[:, c] += 1e-5
        low[:, c] -= 1e-5
        gap = cross_entropy.grad(high, target, **options) - cross_entropy.grad(low, target, **options)
        np.testing.assert_allclose(h[:, c], gap[:, c] / 2e-5, rtol=1e-5, atol=1e-9)
    outs = np.empty_like(x), np.empty_like(x)
    got = cross_entropy.value_grad_hess(x, target, out=outs, **options)
    assert got[1] is outs[0] and got[2] is outs[1]
    np.testing.assert_array_equal(outs[1], h)


def test_curvature_of_likelihood_is_zero():
    x, target = sample((4, 5))
    _, g, h = nll_loss.value_grad_hess(x, target)
    assert g.any() and not h.any()


@pytest.mark.parametrize("shape", [(4000, 10), (300, 100), (3, 21, 1000)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bits_do_not_depend_on_threads(shape, reduction):
    x, target = sample(shape, dtype=np.float32)
    value, g = cross_entropy.value_and_grad(x, target, reduction=reduction)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        alone, alone_g = cross_entropy.value_and_grad(x, target, reduction=reduction)
    finally:
        numba.set_num_threads(before)
    np.testing.assert_array_equal(value, alone)
    np.testing.assert_array_equal(g, alone_g)


def test_float32_sums_many_classes_well():
    for shape in [(2, 200_000), (1, 50_000, 2)]:
        x, target = sample(shape, dtype=np.float32)
        expected = cross_entropy(x.astype(np.float64), target)
        np.testing.assert_allclose(cross_entropy(x, target), expected, rtol=3e-7)


def test_class_and_function_agree():
    x, target = sample((6, 5))
    weight = np.arange(1.0, 6)
    criterion = CrossEntropyLoss(weight, ignore_index=2, label_smoothing=0.1)
    assert criterion(x, target) == cross_entropy(
        x, target, weight=weight, ignore_index=2, label_smoothing=0.1
    )
    assert CrossEntropyLoss()(x, target) == cross_entropy(x, target)
    again = pickle.loads(pickle.dumps(criterion))
    assert again(x, target) == criterion(x, target)
    assert NLLLoss(weight, 2, "sum")(x, target) == nll_loss(x, target, weight, 2, "sum")
    assert str(cross_entropy.__signature__).startswith(
        "(input: 'Array', target: 'Array', weight: 'Array | None' = None, ignore_index: 'int' = -100, "
        "reduction: 'str' = 'mean', label_smoothing: 'float' = 0.0"
    )


X, Y = np.zeros((4, 5)), np.zeros(4, int)

ERRORS = [
    ({"target": np.zeros(3, int)}, ValueError, r"target must have shape \(4,\)"),
    ({"target": np.zeros((4, 1), int)}, ValueError, r"target must have shape \(4,\)"),
    ({"target": np.zeros((4, 5), int)}, TypeError, "must be floating, got int64"),
    ({"target": np.zeros(4)}, TypeError, "target must hold integers, got float64"),
    ({"target": np.zeros(4, bool)}, TypeError, "target must hold integers, got bool"),
    ({"target": X, "ignore_index": 0}, ValueError, "ignore_index must not be given"),
    ({"input": X.astype(int)}, TypeError, "input must be float64, float32, float16 or bfloat16, got int64"),
    ({"input": np.zeros(())}, ValueError, "input must have shape"),
    ({"input": np.zeros((4, 0))}, ValueError, "at least one class"),
    ({"weight": np.ones(4)}, ValueError, r"weight must have shape \(5,\), one per class, got \(4,\)"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\]"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got 0.5"),
    ({"ignore_index": 2**70}, ValueError, "ignore_index must fit in 64 bits"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
    (
        {"sample_weight": np.ones(3)},
        ValueError,
        r"sample_weight of shape \(3,\) does not broadcast to \(4,\)",
    ),
    ({"normalizer": 0.0}, ValueError, "normalizer must be > 0"),
    ({"wrt": "target"}, ValueError, "only where target holds class probabilities"),
    ({"wrt": "nothing"}, ValueError, "wrt must be among"),
    ({"target": X, "wrt": "weight"}, ValueError, "wrt names 'weight', which is not given"),
    ({"grad_output": np.ones(4)}, ValueError, "grad_output must be a number"),
    ({"grad_output": np.ones(3), "reduction": "none"}, ValueError, "grad_output must have the value's shape"),
    ({"out": np.zeros((4, 6))}, ValueError, r"out for input must have shape \(4, 5\)"),
    ({"out": np.zeros((4, 5), "i4")}, TypeError, "out for input must be float64"),
    ({"out": X[::-1]}, ValueError, "out for input overlaps input"),
    ({"out": (X.copy(),)}, TypeError, "out for input must be a NumPy array"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors(arguments, kind, message):
    with pytest.raises(kind, match=f"^cross_entropy: .*{message}"):
        cross_entropy.value_and_grad(**{"input": X, "target": Y} | arguments)


def test_errors_of_nll_loss():
    with pytest.raises(ValueError, match=r"^nll_loss: target must have shape \(4,\)"):
        nll_loss(X, X)
    with pytest.raises(ValueError, match="^nll_loss: wrt must be among 'input'"):
        nll_loss.grad(X, Y, wrt="target")
    with pytest.raises(TypeError, match="label_smoothing"):
        nll_loss(X, Y, label_smoothing=0.1)


def test_curvature_is_over_scores():
    q = np.full((4, 5), 0.2)
    with pytest.raises(ValueError, match="value_grad_hess takes wrt='input', got 'target'"):
        cross_entropy.value_grad_hess(X, q, wrt="target")
    with pytest.raises(ValueError, match="out for curvature overlaps"):
        a = X.copy()
        cross_entropy.value_grad_hess(a, Y, out=(np.empty_like(a), a))


def test_gradient_may_not_lie_over_the_target():
    q = np.full((4, 5), 0.2)
    with pytest.raises(ValueError, match="out for input overlaps target"):
        cross_entropy.grad(X, q, out=q)
    both = np.empty((4, 5))
    with pytest.raises(ValueError, match="two arrays in out overlap"):
        cross_entropy.grad(X, q, wrt=("input", "target"), out=(both, both))

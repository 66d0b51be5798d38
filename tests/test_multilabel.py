"""Margin losses of one class or several for each row, against PyTorch and the float64 reference."""

import math
import pickle

import numba
import numpy as np
import pytest

from numbaloss import reference
from numbaloss.kernels.cpu.arithmetic import mean_of_rows
from numbaloss.losses.multilabel import (
    MultiLabelMarginLoss,
    MultiLabelSoftMarginLoss,
    MultiMarginLoss,
    multi_margin_loss,
    multilabel_margin_loss,
    multilabel_soft_margin_loss,
)

ROWS, CLASSES = 9, 7
WEIGHT = np.linspace(0.2, 2.0, CLASSES)
CASES = {
    "multi_margin": (multi_margin_loss, {}),
    "multi_margin squared": (multi_margin_loss, {"p": 2, "margin": 0.7}),
    "multi_margin weighted": (multi_margin_loss, {"margin": -0.2, "weight": WEIGHT}),
    "multi_margin squared, weighted": (multi_margin_loss, {"p": 2, "weight": WEIGHT}),
    "multilabel_margin": (multilabel_margin_loss, {}),
    "multilabel_soft_margin": (multilabel_soft_margin_loss, {}),
    "multilabel_soft_margin weighted": (multilabel_soft_margin_loss, {"weight": WEIGHT}),
}
REDUCTIONS = ("none", "mean", "sum")
# Each value is a sum of at most 50 rounded terms, each gradient of a few.
TOLERANCE = {np.float32: dict(rtol=4e-6, atol=1e-6), np.float64: dict(rtol=1e-13, atol=1e-14)}


@pytest.fixture(params=CASES)
def case(request, rng):
    """A loss, float64 arrays and options."""
    function, options = CASES[request.param]
    return function, *arrays(function, rng), options


def arrays(function, rng, shape=(ROWS, CLASSES)):
    operands = function.Class.operands
    return rng.normal(size=shape), operands["target"].draw(rng, shape)


def options_as(options, dtype):
    return {n: v.astype(dtype) if isinstance(v, np.ndarray) else v for n, v in options.items()}


def floats_as(dtype, *arrays):
    return [a.astype(dtype) if a.dtype.kind == "f" else a for a in arrays]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("batched", (True, False))
@pytest.mark.thin(5)
def test_torch(case, dtype, reduction, batched, torch):
    function, x, y, options = case
    x, y = floats_as(dtype, x, y) if batched else floats_as(dtype, x[1], np.asarray(y[1]))
    options = options_as(options, dtype)
    tx = torch.tensor(x, requires_grad=True)
    theirs = getattr(torch.nn.functional, function.__name__)(
        tx,
        torch.tensor(y),
        reduction=reduction,
        **{n: torch.tensor(v) if isinstance(v, np.ndarray) else v for n, v in options.items()},
    )
    theirs.sum().backward()
    value, gradient = function.value_and_grad(x, y, reduction=reduction, **options)
    assert value.dtype == gradient.dtype == dtype
    assert value.shape == theirs.shape
    np.testing.assert_allclose(value, theirs.detach().numpy(), **TOLERANCE[dtype])
    np.testing.assert_allclose(gradient, tx.grad.numpy(), **TOLERANCE[dtype])
    # The soft margin's sum is vectorised differently without a gradient.
    alone = function(x, y, reduction=reduction, **options)
    np.testing.assert_allclose(alone, value, rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(function.grad(x, y, reduction=reduction, **options), gradient)


def test_gradients_by_target_and_weight(rng, torch):
    x, y = arrays(multilabel_soft_margin_loss, rng)
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, y, WEIGHT)]
    torch.nn.functional.multilabel_soft_margin_loss(*tensors).backward()
    wrt = ("input", "target", "weight")
    for options in ({}, {"normalizer": ROWS}):
        _, gradients = multilabel_soft_margin_loss.value_and_grad(x, y, WEIGHT, wrt=wrt, **options)
        for ours, t in zip(gradients, tensors, strict=True):
            np.testing.assert_allclose(ours, t.grad.numpy(), **TOLERANCE[np.float64])
    with pytest.raises(ValueError, match="multi_margin_loss: wrt must be among 'input', got 'weight'"):
        multi_margin_loss.grad(x, np.zeros(ROWS, int), weight=WEIGHT, wrt="weight")


LONE = {
    "row, (1)": ((5,), (1,)),
    "score": ((), ()),
    "score, (1)": ((), (1,)),
    "list of one": ((1,), ()),
}


@pytest.mark.parametrize("p", (1, 2))
@pytest.mark.parametrize("lone", LONE)
def test_shapes_of_a_lone_row(lone, p, rng, torch):
    """As in PyTorch: terms have the label's shape."""
    shape, of_target = LONE[lone]
    x, y = rng.normal(size=shape), np.zeros(of_target, int)
    for function, options in ((multi_margin_loss, {"p": p}), (multilabel_margin_loss, {})):
        if function is multilabel_margin_loss and shape == (5,):
            with pytest.raises(ValueError, match="target must have input's shape"):
                function(x, y)
            continue
        theirs = getattr(torch.nn.functional, function.__name__)
        for reduction in REDUCTIONS:
            given = {**options, "reduction": reduction}
            tx = torch.tensor(x, requires_grad=True)
            wanted = theirs(tx, torch.tensor(y), **given)
            wanted.sum().backward()
            for _ in range(2):  # the second time it is prepared
                value, gradient = function.value_and_grad(x, y, **given)
                assert value.shape == wanted.shape and gradient.shape == shape
                np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=1e-13)
                np.testing.assert_allclose(gradient, tx.grad.numpy(), rtol=1e-13)
        with pytest.raises(IndexError, match=r"target(\[0\])? is 5, but input has"):
            function(x, y + 5)


COMMON = {
    "weights": {"sample_weight": np.arange(ROWS) / 4},
    "one weight": {"sample_weight": 0.5},
    "negative sum": {"sample_weight": np.arange(ROWS) - 6.0},
    "normalizer": {"normalizer": 40, "sample_weight": np.arange(ROWS) / 4},
    "upstream": {"grad_output": -3.0},
}


@pytest.mark.parametrize("common", COMMON)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.thin(5)
def test_reference(case, common, reduction, rng):
    function, x, y, options = case
    common = dict(COMMON[common])
    up = common.pop("grad_output", None)
    if up is not None and reduction == "none":
        up = rng.normal(size=ROWS)
    options = {**options, **common, "reduction": reduction}
    oracle = getattr(reference, function.__name__)
    expected = oracle(x, y, **options)
    slope = reference.gradient(oracle, {"input": x, "target": y, **options}, "input", up)
    value, gradient = function.value_and_grad(x, y, grad_output=up, **options)
    np.testing.assert_allclose(value, expected, **TOLERANCE[np.float64])
    np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-7)  # the differences are good to that


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.thin(7)
def test_halves(case, reduction, bfloat16):
    function, x, y, options = case
    oracle = getattr(reference, function.__name__)
    for dtype, eps in ((np.dtype(np.float16), 2.0**-10), (bfloat16, 2.0**-7)):
        a, b, *_ = floats_as(dtype, x, y)
        given = options_as(options, dtype)
        value, gradient = function.value_and_grad(a, b, reduction=reduction, **given)
        assert value.dtype == gradient.dtype == dtype
        # float32 inside: what is lost is the rounding of terms, and of results.
        np.testing.assert_allclose(
            value.astype(np.float64), oracle(a, b, reduction=reduction, **given), rtol=eps
        )
        exact = function.grad(
            *floats_as(np.float64, *(v.astype(np.float64) if v.dtype == dtype else v for v in (a, b))),
            reduction=reduction,
            **{n: v.astype(np.float64) if isinstance(v, np.ndarray) else v for n, v in given.items()},
        )
        np.testing.assert_allclose(gradient.astype(np.float64), exact, rtol=eps, atol=eps / 100)


LAYOUTS = {
    "fortran": np.asfortranarray,
    "sliced": lambda a: np.repeat(np.repeat(a, 2, axis=0), 3, axis=1)[::2, ::3],
    "backward": lambda a: np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
    "swapped": lambda a: a.astype(a.dtype.newbyteorder()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case, layout):
    function, x, y, options = case
    changed = LAYOUTS[layout](x)
    targets = LAYOUTS[layout](y) if y.ndim == 2 else y[::-1].copy()[::-1]
    for a in (changed, targets):
        a.flags.writeable = False
    value, gradient = function.value_and_grad(x, y, **options)
    again, out = function.value_and_grad(changed, targets, **options)
    np.testing.assert_allclose(again, value, rtol=1e-15)  # the soft margin sums in memory's order
    np.testing.assert_array_equal(out, gradient)
    if layout != "swapped":
        mine = LAYOUTS[layout](x)
        assert function.grad(mine, targets, out=mine, **options) is mine
        np.testing.assert_array_equal(mine, gradient)


def test_broadcast_input(case):
    function, x, y, options = case
    same = np.broadcast_to(x[:1], x.shape)
    np.testing.assert_array_equal(function.grad(same, y, **options), function.grad(same.copy(), y, **options))


def test_out(case):
    function, x, y, options = case
    gradient = function.grad(x, y, **options)
    for weights in ({}, {"sample_weight": np.ones(ROWS)}):  # the quick way, and the other
        out = np.full_like(x, np.nan)
        assert function.grad(x, y, out=out, **options, **weights) is out
        np.testing.assert_array_equal(out, gradient)
        own = x.copy()
        function.grad(own, y, out=own, **options, **weights)
        np.testing.assert_array_equal(own, gradient)
    long = np.zeros((ROWS + 1, CLASSES))
    with pytest.raises(ValueError, match="overlaps input"):
        function.grad(long[:-1], y, out=long[1:], **options)
    with pytest.raises(ValueError, match="must have shape"):
        function.grad(x, y, out=long, **options)


def test_zero_weight_hides_anything(case):
    function, x, y, options = case
    weights = np.ones(ROWS)
    weights[[2, 5]] = 0
    x[2], x[5] = np.nan, np.inf
    value, gradient = function.value_and_grad(x, y, sample_weight=weights, **options)
    kept = weights != 0
    expected, slopes = function.value_and_grad(x[kept], y[kept], **options)
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    np.testing.assert_allclose(gradient[kept], slopes, rtol=1e-13)
    assert not gradient[~kept].any()
    value, gradient = function.value_and_grad(x, y, sample_weight=0.0, **options)
    assert np.isnan(value) and not gradient.any()


def test_zero_class_weight_hides_anything(rng):
    x, y = arrays(multi_margin_loss, rng)
    y[0], x[0] = 3, np.nan
    weight = np.ones(CLASSES)
    weight[3] = 0
    value, gradient = multi_margin_loss.value_and_grad(x, y, weight=weight)
    assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[y == 3].any()


@pytest.mark.parametrize("function", (multi_margin_loss, multilabel_margin_loss))
def test_nan_is_seen(function, rng):
    x, y = arrays(function, rng)
    if y.ndim == 2:
        y[:] = -1
        y[:, 0] = 1
    x[4, 0] = np.nan
    if y.ndim == 1:
        y[4] = 1
    values, gradient = function.value_and_grad(x, y, reduction="none")
    np.testing.assert_array_equal(np.isnan(values), np.arange(ROWS) == 4)
    np.testing.assert_array_equal(np.isnan(gradient).any(axis=1), np.arange(ROWS) == 4)


@pytest.mark.parametrize("p", (1, 2))
def test_no_gradient_at_the_clamp(p):
    x = np.array([[2.0, 1.0, 0.5]])
    np.testing.assert_array_equal(multi_margin_loss.grad(x, np.array([0]), p=p), np.zeros((1, 3)))
    np.testing.assert_array_equal(multilabel_margin_loss.grad(x, np.array([[0, -1, -1]])), np.zeros((1, 3)))


def test_lists_of_labels(torch):
    x = np.array([[0.1, 0.2, 0.4, 0.8]] * 5)
    y = np.array([[3, 0, -1, 1], [-1, 0, 1, 2], [0, 1, 2, 3], [2, 2, -1, -1], [1, -1, -1, -1]])
    tx = torch.tensor(x, requires_grad=True)
    theirs = torch.nn.functional.multilabel_margin_loss(tx, torch.tensor(y), reduction="none")
    theirs.sum().backward()
    value, gradient = multilabel_margin_loss.value_and_grad(x, y, reduction="none")
    np.testing.assert_allclose(value, theirs.detach().numpy(), rtol=1e-14)
    np.testing.assert_allclose(gradient, tx.grad.numpy(), rtol=1e-14)


@pytest.mark.thin(7)
def test_empty_batch(case):
    function, x, y, options = case
    x, y = x[:0], y[:0]
    assert np.isnan(function(x, y, **options))
    for reduction, wanted in (("sum", 0.0), ("none", np.empty(0))):
        value, gradient = function.value_and_grad(x, y, reduction=reduction, **options)
        np.testing.assert_array_equal(value, wanted)
        assert gradient.shape == x.shape
    assert function(x, y, normalizer=3, **options) == 0


@pytest.mark.parametrize("dtype", "bBhHiIlLqQ")
def test_integer_dtypes(dtype, rng):
    for function in (multi_margin_loss, multilabel_margin_loss):
        x, y = arrays(function, rng)
        y = y % CLASSES  # without the -1 that an unsigned number is not
        assert function(x, y.astype(dtype)) == function(x, y)
        big = y.astype(dtype)
        big[(3,) * big.ndim] = np.iinfo(dtype).max
        with pytest.raises(IndexError, match=rf"target\[3.*\] is {np.iinfo(dtype).max}, but input has 7"):
            function(x, big)


@pytest.mark.parametrize("bad", (CLASSES, -1, -2, 2**62, -(2**63)))
def test_bad_index_writes_nothing(bad, rng):
    x, y = arrays(multi_margin_loss, rng)
    y[3] = bad
    for weights in ({}, {"sample_weight": np.zeros(ROWS)}):
        before = x.copy()
        with pytest.raises(IndexError) as error:
            multi_margin_loss.grad(x, y, out=x, **weights)
        assert str(error.value) == f"multi_margin_loss: target[3] is {bad}, but input has 7 classes"
        np.testing.assert_array_equal(x, before)
    if bad != -1:
        lists = np.full((ROWS, CLASSES), -1)
        lists[3, 1] = bad
        with pytest.raises(IndexError) as error:
            multilabel_margin_loss.grad(x, lists, out=x)
        assert str(error.value) == f"multilabel_margin_loss: target[3, 1] is {bad}, but input has 7 classes"
        np.testing.assert_array_equal(x, before)
    with pytest.raises(IndexError, match="target is -5"):
        multi_margin_loss(x[0], np.int8(-5))


def test_errors(rng):
    x, y = arrays(multi_margin_loss, rng)
    lists = np.zeros((ROWS, CLASSES), int)
    for function, target, options, error, message in (
        (multi_margin_loss, y, {"p": 3}, ValueError, "multi_margin_loss: p must be one of 1, 2, got 3"),
        (multi_margin_loss, y, {"margin": np.nan}, ValueError, "margin must be a number"),
        (multi_margin_loss, y[:-1], {}, ValueError, "target must have shape"),
        (multi_margin_loss, y.astype(float), {}, TypeError, "target must hold integers, got float64"),
        (multi_margin_loss, y > 0, {}, TypeError, "target must hold integers, got bool"),
        (multi_margin_loss, y, {"weight": WEIGHT[1:]}, ValueError, "weight must have shape"),
        (multi_margin_loss, y, {"sample_weight": x}, ValueError, "sample_weight of shape"),
        (multi_margin_loss, y, {"reduction": "max"}, ValueError, "reduction must be one of"),
        (multi_margin_loss, y, {"normalizer": 0}, ValueError, "normalizer must be > 0"),
        (multilabel_margin_loss, y, {}, ValueError, "multilabel_margin_loss: target must have input's shape"),
        (multilabel_margin_loss, lists > 0, {}, TypeError, "target must hold integers"),
        (multilabel_soft_margin_loss, x[:-1], {}, ValueError, "multilabel_soft_margin_loss: target must"),
        (multilabel_soft_margin_loss, x, {"weight": x[:2]}, ValueError, "weight of shape"),
        (multilabel_soft_margin_loss, x, {"sample_weight": x}, ValueError, "sample_weight of shape"),
    ):
        with pytest.raises(error, match=message):
            function(x, target, **options)
    for function in (multi_margin_loss, multilabel_margin_loss):
        with pytest.raises(ValueError, match="input must have shape"):
            function(x[np.newaxis], (lists if function is multilabel_margin_loss else y)[np.newaxis])
        with pytest.raises(ValueError, match="at least one class"):
            function(x[:, :0], y if function is multi_margin_loss else lists[:, :0])
        with pytest.raises(TypeError, match="input must be float64"):
            function(lists, y if function is multi_margin_loss else lists)


def test_curvature(rng):
    for function, options in (
        (multi_margin_loss, {"p": 2, "weight": WEIGHT}),
        (multi_margin_loss, {"p": 2, "reduction": "none", "sample_weight": np.arange(ROWS) / 2}),
        (multilabel_soft_margin_loss, {"weight": WEIGHT, "reduction": "sum"}),
    ):
        x, y = arrays(function, rng)
        value, gradient, curvature = function.value_grad_hess(x, y, **options)
        expected, slopes = function.value_and_grad(x, y, **options)
        np.testing.assert_array_equal(value, expected)
        np.testing.assert_array_equal(gradient, slopes)
        step = 1e-6
        for c in range(CLASSES):
            d = np.zeros_like(x)
            d[:, c] = step
            there, back = function.grad(x + d, y, **options), function.grad(x - d, y, **options)
            slope = (there - back)[:, c] / (2 * step)
            np.testing.assert_allclose(curvature[:, c], slope, rtol=1e-6, atol=1e-8)
    x, y = arrays(multi_margin_loss, rng)
    with pytest.raises(ValueError, match="multi_margin_loss: value_grad_hess needs p=2"):
        multi_margin_loss.value_grad_hess(x, y)
    with pytest.raises(ValueError, match="multilabel_margin_loss: has no value_grad_hess"):
        multilabel_margin_loss.value_grad_hess(x, np.zeros(x.shape, int))


@pytest.mark.parametrize("shape", ((300, 130), (3, 20_000)))
def test_bits_are_those_of_any_number_of_threads(shape, rng):
    """Rows of many runs, and tiles of many rows, against the reference too."""
    for function in (multi_margin_loss, multilabel_margin_loss):
        x, y = arrays(function, rng, shape)
        if y.ndim == 2:
            y[:, 3:] = -1
        x = x.astype(np.float32)
        value, gradient = function.value_and_grad(x, y)
        exact = getattr(reference, function.__name__)(x, y)
        np.testing.assert_allclose(value, exact, rtol=1e-6)
        threads = numba.get_num_threads()
        numba.set_num_threads(1)
        try:
            again, slopes = function.value_and_grad(x, y)
        finally:
            numba.set_num_threads(threads)
        assert again == value
        np.testing.assert_array_equal(slopes, gradient)


def test_classes(rng):
    x, y = arrays(multi_margin_loss, rng)
    criterion = MultiMarginLoss(2, 0.5, WEIGHT, "sum")
    expected = multi_margin_loss(x, y, 2, 0.5, WEIGHT, "sum")
    assert criterion(x, y) == pickle.loads(pickle.dumps(criterion))(x, y) == expected
    assert list(MultiMarginLoss.fields) == ["p", "margin", "weight", "reduction"]
    assert list(MultiLabelMarginLoss.fields) == ["reduction"]
    assert list(MultiLabelSoftMarginLoss.fields) == ["weight", "reduction"]
    soft = MultiLabelSoftMarginLoss(WEIGHT)
    assert pickle.loads(pickle.dumps(soft))(x, abs(x)) == multilabel_soft_margin_loss(x, abs(x), WEIGHT)


def test_promotion(rng):
    x, y = arrays(multi_margin_loss, rng)
    x = x.astype(np.float32)
    value, gradient = multi_margin_loss.value_and_grad(x, y, weight=WEIGHT)
    assert value.dtype == np.float64 and gradient.dtype == np.float32
    assert multi_margin_loss(x, y, sample_weight=2).dtype == np.float32
    for weight in (2, 2.0):
        for _ in range(2):  # the second call is prepared
            assert multilabel_soft_margin_loss(x, x, sample_weight=weight).dtype == np.float32
            assert (
                multilabel_soft_margin_loss(x, x, sample_weight=2 * weight, reduction="sum").dtype
                == np.float32
            )


ADVERSARIAL = """
import numpy as np
from numbaloss.losses.multilabel import multi_margin_loss, multilabel_margin_loss

rng = np.random.default_rng(0)
for shape in ((1, 1), (5, 1), (3, 7)):
    x = rng.normal(size=shape)
    for label in range(-2, shape[1] + 2):
        y = np.zeros(shape[0], int)
        y[-1] = label
        lists = np.full(shape, -1)
        lists[-1, -1] = label
        for function, target, lowest in ((multi_margin_loss, y, 0), (multilabel_margin_loss, lists, -1)):
            for options in ({}, {"sample_weight": np.ones(shape[0])}):
                try:
                    value, gradient = function.value_and_grad(x, target, **options)
                    assert lowest <= label < shape[1] and np.isfinite(gradient).all()
                except IndexError as error:
                    assert not lowest <= label < shape[1], error
                    assert "classes" in str(error), error
    full = np.tile(np.arange(shape[1]), (shape[0], 1))
    assert multilabel_margin_loss(x, full) == 0
    for bad in (np.nan, np.inf, -np.inf):
        x[0, 0] = bad
        multi_margin_loss.value_grad_hess(x, np.zeros(shape[0], int), p=2)
        multilabel_margin_loss.value_and_grad(x, np.full(shape, -1))
        multilabel_margin_loss.value_and_grad(x, np.zeros(shape, int))
print("done")
"""


@pytest.mark.more
def test_nothing_is_indexed_out_of_bounds(python, tmp_path):
    environment = dict(NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert python(ADVERSARIAL, **environment) == ["done"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(7, 3), (2, 3, 16), (4, 37), (1, 1000), (5,), (0, 4), (3, 0)], ids=str)
def test_means_of_rows(shape, dtype):
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    rows = [array[index] for index in np.ndindex(shape[:-1])]
    exact = [math.fsum(row) / len(row) if len(row) else np.nan for row in rows]
    for laid in (array, np.asfortranarray(array), array.astype(array.dtype.newbyteorder())):
        means = mean_of_rows(laid)
        assert means.shape == shape[:-1]
        assert means.dtype.name == dtype
        np.testing.assert_allclose(np.ravel(means), exact, rtol=4 * np.finfo(dtype).eps, atol=1e-15)

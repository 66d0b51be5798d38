"""Arrays of any layout, and `out`: what may be written, and what never is."""

import itertools

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import numbaloss as nl
from numbaloss import testing
from numbaloss.kernels.cpu.elementwise import PARALLEL_FROM

loss = nl.huber_loss


def reversed_(a):
    return a[::-1, ::-1].copy()[::-1, ::-1]


def strided(a):
    wide = np.full((a.shape[0] * 3, a.shape[1] * 2), np.nan, a.dtype)
    wide[1::3, ::2] = a
    return wide[1::3, ::2]


def padded_rows(a):
    wide = np.full((a.shape[0], a.shape[1] + 5), np.nan, a.dtype)
    wide[:, :-5] = a
    return wide[:, :-5]


def inner_axis_moved(a):
    return (
        np.ascontiguousarray(a.reshape(a.shape[0], -1, 2).transpose(2, 0, 1))
        .transpose(1, 2, 0)
        .reshape(a.shape)
    )


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def subclass(a):
    class Tagged(np.ndarray):
        pass

    return a.copy().view(Tagged)


LAYOUTS = [np.asfortranarray, reversed_, strided, padded_rows, inner_axis_moved, read_only, subclass]
PARALLEL = (307, 2 * (PARALLEL_FROM // 512))  # more elements than a serial call takes
assert np.prod(PARALLEL) > PARALLEL_FROM


@pytest.mark.parametrize("shape", [(6, 8), PARALLEL], ids=["small", "parallel"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_layouts_give_what_contiguous_copies_give(shape, dtype, rng):
    """Bit for bit in value and gradient where the dtype is the arithmetic's, whatever the two layouts."""
    x, y = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    value, gradient = loss.value_and_grad(x, y)
    terms = loss(x, y, reduction="none")
    layouts = LAYOUTS if dtype == np.float64 else LAYOUTS[:3]
    for first, second in [
        *((f, np.copy) for f in layouts),
        *((np.copy, f) for f in layouts),
        *itertools.pairwise(layouts),
    ]:
        a, b = first(x), second(y)
        before = a.copy(), b.copy()
        got, found = loss.value_and_grad(a, b)
        # The staged and the direct drivers cut the same blocks of memory order, not of the same elements.
        np.testing.assert_allclose(got, value, rtol=float(np.finfo(dtype).eps) * 2)
        np.testing.assert_array_equal(found, gradient)
        np.testing.assert_array_equal(loss(a, b, reduction="none"), terms)
        assert found.dtype == dtype
        np.testing.assert_array_equal(a, before[0])
        np.testing.assert_array_equal(b, before[1])


@pytest.mark.parametrize("shape", [(6, 8), PARALLEL], ids=["small", "parallel"])
def test_zero_strides(shape, rng):
    row, column = rng.normal(size=shape[1]), rng.normal(size=(shape[0], 1))
    x, y = np.broadcast_to(row, shape), np.broadcast_to(column, shape)
    value, gradient = loss.value_and_grad(x, y)
    wanted, expected = loss.value_and_grad(x.copy(), y.copy())
    np.testing.assert_allclose(value, wanted, rtol=1e-14)
    np.testing.assert_array_equal(gradient, expected)
    gradient[...] = 0  # its elements are its own, unlike the input's
    assert 0 not in gradient.strides


@pytest.mark.parametrize("name", ["sample_weight", "grad_output"])
def test_layouts_of_weights_and_upstream(name, rng):
    x, y, w = rng.normal(size=(3, *PARALLEL))
    wanted = loss.grad(x, y, reduction="none", **{name: w})
    for layout in (np.asfortranarray, strided, read_only):
        np.testing.assert_array_equal(loss.grad(x, y, reduction="none", **{name: layout(w)}), wanted)


@pytest.mark.parametrize("axes", list(itertools.permutations(range(4))), ids=str)
def test_every_order_of_four_axes(axes, rng):
    x, y = rng.normal(size=(2, 3, 4, 2, 5))
    value, gradient = loss.value_and_grad(x.transpose(axes), y.transpose(axes))
    wanted, expected = loss.value_and_grad(x, y)
    np.testing.assert_allclose(value, wanted, rtol=1e-14)
    np.testing.assert_array_equal(gradient, expected.transpose(axes))
    crossed = loss.grad(np.ascontiguousarray(x.transpose(axes)), y.transpose(axes))
    np.testing.assert_array_equal(crossed, expected.transpose(axes))


def test_axes_of_length_one_and_no_axes(rng):
    x, y = rng.normal(size=(2, 12))
    wanted, expected = loss.value_and_grad(x, y)
    for shape in [(12, 1), (1, 12), (1, 3, 1, 4), (3, 1, 4, 1)]:
        value, gradient = loss.value_and_grad(x.reshape(shape), y.reshape(shape)[::1])
        assert value == wanted
        np.testing.assert_array_equal(gradient, expected.reshape(shape))
    value, gradient = loss.value_and_grad(x[0], y[0])
    assert np.ndim(value) == 0 and gradient.shape == ()
    np.testing.assert_allclose(gradient, expected[0] * 12, rtol=1e-15)
    value, gradient = loss.value_and_grad(np.array(x[0]), np.array(y[0]), reduction="none")
    assert isinstance(value, np.ndarray) and value.shape == ()


def test_a_gradient_is_a_plain_array_in_its_inputs_order(rng):
    x, y = rng.normal(size=(2, 6, 8))
    assert loss.grad(np.asfortranarray(x), np.asfortranarray(y)).flags.f_contiguous
    assert loss.grad(x, y).flags.c_contiguous
    assert type(loss.grad(subclass(x), y)) is np.ndarray


# ---- out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 8), PARALLEL], ids=["small", "parallel"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_out_of_any_layout(shape, dtype, rng):
    x, y = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    value, gradient = loss.value_and_grad(x, y)
    for layout in (np.copy, np.asfortranarray, reversed_, strided, padded_rows):
        out = layout(np.zeros(shape, dtype))
        owner = out.base if out.base is not None else out
        untouched = np.isnan(owner.astype(np.float32)).sum()
        again, result = loss.value_and_grad(x, y, out=out)
        assert result is out
        np.testing.assert_allclose(again, value, rtol=float(np.finfo(dtype).eps) * 2)
        np.testing.assert_array_equal(out, gradient)
        assert np.isnan(owner.astype(np.float32)).sum() == untouched, "written beside the view"


@pytest.mark.parametrize("shape", [(6, 8), PARALLEL], ids=["small", "parallel"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.thin(6)
def test_in_place(shape, dtype, rng):
    x, y = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    value, gradient = loss.value_and_grad(x, y)
    for layout in (np.copy, np.asfortranarray, reversed_, strided, padded_rows):
        for reduction in ("mean", "none"):
            a = layout(x)
            if np.shares_memory(a, x):
                a = a.copy()
            wanted = gradient if reduction == "mean" else loss.grad(x, y, reduction="none")
            again, result = loss.value_and_grad(a, y, out=a, reduction=reduction)
            assert result is a
            np.testing.assert_allclose(
                a.astype(float), wanted.astype(float), rtol=2 * float(np.finfo(dtype).eps)
            )
            if reduction == "mean":
                np.testing.assert_allclose(again, value, rtol=2 * float(np.finfo(dtype).eps))
            else:
                np.testing.assert_array_equal(again, loss(x, y, reduction="none"))


@pytest.mark.more
def test_in_place_of_both_inputs_and_of_one_of_them(rng):
    x1, x2 = rng.normal(size=(2, 40))
    y = rng.choice([-1.0, 1.0], 40)
    ranking = nl.margin_ranking_loss
    first, second = ranking.grad(x1, x2, y)
    a, b = x1.copy(), x2.copy()
    result = ranking.grad(a, b, y, out=(a, b))
    assert result[0] is a and result[1] is b
    np.testing.assert_array_equal(a, first)
    np.testing.assert_array_equal(b, second)
    a, buffer = x1.copy(), np.empty(40)
    ranking.grad(a, x2, y, out=(a, buffer))
    np.testing.assert_array_equal(a, first)
    np.testing.assert_array_equal(buffer, second)
    a = x1.copy()
    ranking.grad(a, x2, y, wrt="input1", out=a)
    np.testing.assert_array_equal(a, first)


def test_out_of_value_grad_hess(rng):
    x, y = rng.normal(size=(2, 40))
    value, gradient, curvature = loss.value_grad_hess(x, y)
    pair = np.empty(40), np.empty(40)
    again, *results = loss.value_grad_hess(x, y, out=pair)
    assert again == value
    assert results[0] is pair[0] and results[1] is pair[1]
    np.testing.assert_array_equal(pair, [gradient, curvature])
    a = x.copy()
    loss.value_grad_hess(a, y, out=(a, pair[1]))
    np.testing.assert_allclose(a, gradient, rtol=1e-15)
    with pytest.raises(ValueError, match="overlaps"):
        loss.value_grad_hess(x, y, out=(pair[0], x))


def test_the_same_array_as_two_operands(rng):
    x = rng.normal(size=40)
    value, gradient = nl.mse_loss.value_and_grad(x, x)
    assert value == 0 and not gradient.any()
    with pytest.raises(ValueError, match="out for input overlaps target"):
        nl.mse_loss.grad(x, x, out=x)


def window(x):
    wide = np.zeros(x.size + 1)
    return wide[:-1].reshape(x.shape), wide[1:].reshape(x.shape)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (lambda x, y: np.empty((4, 6)), ValueError, r"out for input must have shape \(6, 4\), got \(4, 6\)"),
        (lambda x, y: np.empty(24), ValueError, r"out for input must have shape \(6, 4\), got \(24,\)"),
        (lambda x, y: np.empty((6, 4), "i4"), TypeError, "float64 or a narrower float, got int32"),
        (lambda x, y: np.empty((6, 4), ">f8"), TypeError, "out for input must be"),
        (lambda x, y: read_only(np.empty((6, 4))), ValueError, "out for input is read-only"),
        (lambda x, y: y, ValueError, "out for input overlaps target"),
        (lambda x, y: x[::-1], ValueError, "out for input overlaps input"),
        (lambda x, y: y[::-1], ValueError, "out for input overlaps target"),
        (
            lambda x, y: as_strided(np.empty(9), (6, 4), (8, 8)),
            ValueError,
            "share memory",
        ),
        (lambda x, y: np.broadcast_to(np.empty(4), (6, 4)), ValueError, "out for input"),
        (lambda x, y: [[0.0] * 4] * 6, TypeError, "out for input must be a NumPy array, got list"),
        (lambda x, y: (np.empty((6, 4)), np.empty((6, 4))), TypeError, "out"),
    ],
    ids=[
        "shape", "flat", "dtype", "order", "read-only", "target", "reversed", "reversed target", "itself",
        "broadcast", "list", "two",
    ],
)  # fmt: skip
def test_out_is_refused(out, error, message, rng):
    x, y = rng.normal(size=(2, 6, 4))
    before = x.copy(), y.copy()
    for method in (loss.grad, loss.value_and_grad):
        for more in ({}, {"sample_weight": np.ones((6, 4))}):
            with pytest.raises(error, match=f"huber_loss: .*{message}"):
                method(x, y, out=out(x, y), **more)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])


def test_out_that_overlaps_its_input_in_part(rng):
    x, shifted = window(rng.normal(size=(6, 4)))
    with pytest.raises(ValueError, match="out for input overlaps input"):
        loss.grad(x, np.zeros_like(x), out=shifted)


@pytest.mark.parametrize("name", ["sample_weight", "weight", "grad_output"])
def test_out_may_not_be_another_argument(name, rng):
    x, y, w = rng.normal(size=(3, 40))
    with pytest.raises(ValueError, match=f"out for input overlaps {name}"):
        loss.grad(x, y, reduction="none", **{name: w}, out=w)


def test_two_outs_that_overlap(rng):
    x, y = rng.normal(size=(2, 40))
    out = np.empty(40)
    with pytest.raises(ValueError, match="overlap"):
        nl.margin_ranking_loss.grad(x, y, np.ones(40), out=(out, out))
    for bad in (out, (out,), [out, out, out]):
        with pytest.raises(TypeError, match="margin_ranking_loss: out must be a tuple of 2 arrays"):
            nl.margin_ranking_loss.grad(x, y, np.ones(40), out=bad)


@pytest.mark.more
def test_what_is_out_of_the_domain_leaves_the_input_as_it_was(rng):
    """The check comes before the first element is overwritten, on every path through the drivers."""
    for size, dtype in itertools.product((40, 2 * PARALLEL_FROM), (np.float64, np.float16)):
        x = testing.samples(nl.binary_cross_entropy, rng, (size,), dtype)["input"]
        x[-1] = 1.5
        before = x.copy()
        for more in ({}, {"sample_weight": np.ones(size, dtype)}, {"reduction": "none"}):
            with pytest.raises(
                ValueError, match=rf"input must be in \[0, 1\], got input\[{size - 1}\] = 1.5"
            ):
                nl.binary_cross_entropy.value_and_grad(x, np.zeros(size, dtype), out=x, **more)
            np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("make", [np.memmap, np.matrix, np.recarray])
def test_out_of_a_subclass_is_written_and_given_back(make, tmp_path):
    x, t = np.array([[1.0, 2.0], [3.0, 5.0]]), np.zeros((2, 2))
    if make is np.memmap:
        out = np.memmap(tmp_path / "out", np.float64, "w+", shape=(2, 2))
    else:
        out = np.zeros((2, 2)).view(make)
    for _ in range(2):
        value, gradient = nl.mse_loss.value_and_grad(x, t, out=out, reduction="sum")
        assert gradient is out and value == 39.0
        np.testing.assert_array_equal(np.asarray(out), 2 * x)
        out[...] = 0
    if make is np.memmap:  # in place, too
        out[...] = x
        (given,) = nl.mse_loss.grad(out, t, out=(out,), wrt=("input",), reduction="sum")
        assert given is out
        np.testing.assert_array_equal(np.asarray(out), 2 * x)


def test_an_upstream_gradient_of_a_subclass():
    x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    up = np.full((2, 3), 0.5).view(np.recarray)
    for input in (x, x.astype(np.float16)[:, ::-1]):
        by = nl.mse_loss.grad(input, 0 * input, reduction="none", grad_output=up)
        np.testing.assert_array_equal(by, input)


def test_an_out_of_which_a_part_is_not_given():
    x, t = np.array([1.0, 2.0]), np.zeros(2)
    out = np.empty(2)
    for _ in range(2):
        by_input, by_target = nl.mse_loss.grad(
            x, t, wrt=("input", "target"), out=(None, out), reduction="sum"
        )
        assert by_target is out
        np.testing.assert_array_equal(by_input, 2 * x)
        np.testing.assert_array_equal(by_target, -2 * x)


def test_a_masked_array_is_no_out():
    x = np.array([1.0, 2.0])
    for _ in range(2):
        with pytest.raises(TypeError, match="mse_loss: out for input is a masked array"):
            nl.mse_loss.grad(x, x, out=np.ma.masked_array(np.zeros(2)))

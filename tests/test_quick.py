"""Calls seen before: the same results as a first call's, for other arrays of the same kinds."""

import gc
import itertools
import weakref

import ml_dtypes
import numpy as np
import pytest
from sweeps import sweep

import numbaloss as nl
from numbaloss import reference, testing


def fresh(loss, mode, arguments):
    """The call, with nothing remembered of others."""
    loss._bindings.clear()
    result = (loss if mode == "value" else getattr(loss, mode))(**arguments)
    loss._bindings.clear()
    return result


def same(a, b):
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(a, b, equal_nan=True) and np.asarray(a).dtype == np.asarray(b).dtype


LAYOUTS = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "slice": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "reversed": lambda a: np.ascontiguousarray(a[::-1])[::-1],
}
OPTIONS = (
    {},
    {"reduction": "none"},
    {"reduction": "sum"},
    {"sample_weight": lambda rng, terms: rng.random(terms)},
    {"grad_output": 0.5},
    {"normalizer": 3.0},
)


NAMES = (
    "huber_loss",
    "gaussian_nll_loss",
    "cross_entropy",
    "nll_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thin(6)
def test_a_prepared_call_gives_the_same_bits(name, layout, rng):
    loss, change = nl.registry[name], LAYOUTS[layout]
    for options, mode in itertools.product(OPTIONS, ("value", "grad", "value_and_grad")):
        if mode == "value" and "grad_output" in options:
            continue
        calls = []
        for rows in (6, 6, 9):  # of another extent the third
            arrays = {n: change(np.asarray(a)) for n, a in testing.samples(loss, rng, (rows, 4)).items()}
            terms = np.shape(loss(**arrays, reduction="none"))
            made = {n: v(rng, terms) if callable(v) else v for n, v in options.items()}
            calls.append({**arrays, **made})
        wanted = [fresh(loss, mode, c) for c in calls]
        method = loss if mode == "value" else getattr(loss, mode)
        got = [method(**c) for c in calls]
        assert same(tuple(got), tuple(wanted)), (options, mode)


def test_an_array_given_twice_is_not_taken_for_two(rng):
    x, y = rng.normal(size=(2, 5))
    assert nl.mse_loss(x, x) == 0
    assert nl.mse_loss(x, y) == pytest.approx(((x - y) ** 2).mean(), rel=1e-12)
    assert nl.mse_loss(x, x) == 0


def test_which_argument_is_overwritten_is_part_of_a_call(rng):
    x1, x2 = rng.normal(size=(2, 40))
    y = rng.choice([-1.0, 1.0], 40)
    loss = nl.margin_ranking_loss
    first, second = loss.grad(x1, x2, y)
    for over in ((True, True), (True, False), (False, True), (False, False), (True, True)):
        a, b = x1.copy(), x2.copy()
        out = a if over[0] else np.empty(40), b if over[1] else np.empty(40)
        loss.grad(a, b, y, out=out)
        np.testing.assert_array_equal(out[0], first)
        np.testing.assert_array_equal(out[1], second)
        assert over[0] or (a == x1).all()
        assert over[1] or (b == x2).all()


def test_a_divisor_that_data_make_is_made_anew(rng):
    x, y = rng.random((2, 6, 5))
    for _ in range(3):
        w = rng.random((6, 5))
        got = nl.kl_div(x, y, reduction="batchmean", sample_weight=w)
        assert got == fresh(
            nl.kl_div, "value", dict(input=x, target=y, reduction="batchmean", sample_weight=w)
        )


def test_what_does_not_fit_a_prepared_call_is_refused(rng):
    x, y = rng.normal(size=(2, 6, 4))
    labels = rng.integers(0, 4, 6)
    for _ in range(2):
        nl.mse_loss(x, y)
        nl.cross_entropy(x, labels)
    with pytest.raises(ValueError, match="must have input's shape"):
        nl.mse_loss(x, y[:5].copy())
    with pytest.raises(ValueError, match="target must have shape"):
        nl.cross_entropy(x, labels[:5].copy())
    with pytest.raises(IndexError, match=r"target\[0\] is 4"):
        nl.cross_entropy(x, np.full(6, 4))
    with pytest.raises(ValueError, match="overlaps"):
        wide = np.empty(25)
        nl.mse_loss.grad(wide[:24].reshape(6, 4), y, out=wide[1:].reshape(6, 4))


def test_options_equal_in_value_and_not_in_type_are_checked(rng):
    x, y = rng.normal(size=(2, 6))
    nl.huber_loss(x, y, delta=1.0)
    nl.huber_loss(x, y, delta=1)
    with pytest.raises(TypeError, match="delta must be a number"):
        nl.huber_loss(x, y, delta=True)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_shapes_that_do_not_fit_are_refused_after_others(dtype, rng):
    """What was prepared for arrays of one shape broadcast those of others, unless all were float32."""
    for shape in ((6,), (2, 3)):
        x = rng.normal(size=shape).astype(dtype)
        nl.mse_loss(x, x)
    for shape, other in (((6,), (1,)), ((6,), ()), ((1, 6), (6,)), ((1,), (0,)), ((2, 3), (3,))):
        with pytest.raises(ValueError, match="must have input's shape"):
            nl.mse_loss(np.zeros(shape, dtype), np.zeros(other, dtype))
    scores, labels = np.zeros((6, 3), dtype), np.zeros(6, np.int64)
    for loss, given in ((nl.mse_loss, (scores[:, 0], scores[:, 1])), (nl.cross_entropy, (scores, labels))):
        loss.grad(*given, reduction="none", grad_output=np.ones(6, dtype))
        with pytest.raises(ValueError, match="must have the value's shape"):
            loss.grad(*given, reduction="none", grad_output=np.ones(1, dtype))


def test_each_call_broadcasts_its_own_variances(rng):
    """One variance a row is (N, 1) or (N): the latter was taken for one a column after the former."""
    x, y = rng.normal(size=(2, 3, 3))
    each = rng.uniform(0.5, 2, 3)
    for var in (each[:, None], each, each[None], np.array(2.0), each, each[:, None]):
        wide = np.broadcast_to(var[:, None] if var.shape == (3,) else var, (3, 3)).copy()
        assert nl.gaussian_nll_loss(x, y, var) == nl.gaussian_nll_loss(x, y, wide)


def test_a_batchmean_after_one_of_nothing(rng):
    """Extents are not in a signature: the empty batch's divisor served the others."""
    for shape in ((0, 3), (1, 3), (3, 0), (), (5,), (1, 3), (0, 3)):
        given = {"input": np.full(shape, -0.5), "target": np.full(shape, 0.5), "reduction": "batchmean"}
        for more in ({}, {"sample_weight": np.full(shape, 2.0)}):
            expected = reference.kl_div(**given, **more)
            np.testing.assert_allclose(nl.kl_div(**given, **more), expected, rtol=1e-14, err_msg=str(shape))


def test_numbers_that_are_arrays_are_not_remembered(rng):
    """The first call's number served all later ones: a loss scale that never changed."""
    x, y = rng.normal(size=(2, 6))
    plain = nl.huber_loss.grad(x, y, reduction="sum")
    for name in ("grad_output", "normalizer", "delta"):
        for number in (2.0, 0.5, 4.0):
            given = {name: np.array(number)}
            expected = nl.huber_loss.grad(x, y, **{name: number})
            assert np.array_equal(nl.huber_loss.grad(x, y, **given), expected)
    one = np.array(1.5)
    for number in (2.0, 0.5, 4.0):
        by = nl.huber_loss.grad(one, 0 * one, reduction="none", grad_output=np.array(number))
        assert by == number
        assert np.array_equal(nl.huber_loss.grad(x, y, reduction="sum", grad_output=number), number * plain)


def test_a_number_of_bfloat16_is_not_remembered():
    """NumPy knows it as no number: the first one multiplied all later gradients, whatever was given."""
    x = np.ones((1, 1), ml_dtypes.bfloat16)
    for up in (2.0, 0.5, 4.0):
        number = np.array(up, ml_dtypes.bfloat16)
        given = {"reduction": "none", "grad_output": number}
        assert nl.l1_loss.grad(x[0, 0], 0 * x[0, 0], **given) == up
        given["grad_output"] = number.reshape(1, 1)
        assert nl.l1_loss.grad(x, 0 * x, **given) == up
    with pytest.raises(ValueError, match="must have the value's shape"):
        nl.l1_loss.grad(x, 0 * x, reduction="none", grad_output=number.reshape(1))


@pytest.mark.parametrize(
    "name",
    sweep(sorted(nl.registry), "mse_loss", "nll_loss", "multilabel_soft_margin_loss", "linear_cross_entropy"),
)
@pytest.mark.parametrize(
    "more", sweep([{}, {"reduction": "none"}, {"sample_weight": True}, {"out": True}], {}), ids=str
)
@pytest.mark.thin(4)
def test_what_is_remembered_of_a_call_holds_no_array(name, more):
    """Thousands of signatures are remembered, as many as a loss scale has values."""
    loss = nl.registry[name]
    given = testing.samples(loss, np.random.default_rng(0))
    wrt = loss.Class._default_wrt()
    names = (wrt,) if isinstance(wrt, str) else wrt
    given = dict(zip(given, (np.array(a) for a in given.values()), strict=True))
    if "sample_weight" in more:
        more = {"sample_weight": np.ones(np.shape(loss(**given, reduction="none")))}
    outs = tuple(np.empty_like(given[n]) for n in names) if "out" in more else ()
    if outs:
        more = {"out": outs}
    value, gradients = loss.value_and_grad(**given, **more, wrt=names)
    arrays = [*given.values(), *gradients, *outs, *more.values(), value]
    left = [weakref.ref(a) for a in arrays if isinstance(a, np.ndarray)]
    del given, more, outs, value, gradients, arrays
    gc.collect()
    assert not any(a() is not None for a in left)


def test_class_weights_that_do_not_fit_a_batch_without_rows():
    x, y = np.zeros((4, 3)), np.array([0, 1, 2, 0])
    for _ in range(2):
        nl.cross_entropy(x, y, weight=np.ones(3))
    with pytest.raises(ValueError, match="weight must have shape"):
        nl.cross_entropy(x[:0], y[:0], weight=np.ones(0))

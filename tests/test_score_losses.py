"""Losses of class scores by definition, ours and a user's own: against the reference, and in limits."""

import itertools
import pickle

import numpy as np
import pytest
from numba.core.errors import TypingError
from sweeps import sweep

import numbaloss as nl
from numbaloss import reference, testing

LOSSES = {n: f for n, f in nl.registry.items() if issubclass(f.Class, nl.ScoreLoss)}
OF_ONE_CLASS = ["focal_cross_entropy", "poly1_cross_entropy", "generalized_cross_entropy"]
each_loss = pytest.mark.parametrize("name", LOSSES)


@nl.score_loss
def focal(log_prob, rest, class_weight, gamma=2.0):
    return -class_weight * rest**gamma * log_prob


class ZLoss(nl.ScoreLoss):
    scale: float = 1e-4

    def value(cross_entropy, logsumexp, scale):
        return cross_entropy + scale * logsumexp * logsumexp


def own_options(loss):
    """The samples of a loss's own options, all combinations of them."""
    fields = {n: f for n, f in loss.Class.fields.items() if n not in nl.ScoreLoss.fields}
    choices = [tuple(dict.fromkeys((f.default, *f.samples))) for f in fields.values()]
    return [dict(zip(fields, chosen, strict=True)) for chosen in itertools.product(*choices)]


@pytest.mark.parametrize("name", sweep(LOSSES, "poly1_cross_entropy"))
@pytest.mark.more
def test_check_loss(name):
    held = {"softcap": None, "lse_square_scale": 0.0} if name == "cross_entropy" else {}
    testing.check_loss(LOSSES[name], label_smoothing=0.1, **held)


@pytest.mark.parametrize("name", sweep(LOSSES, "focal_cross_entropy"))
@pytest.mark.parametrize("shape", [(7,), (12, 9), (4, 80), (2, 5, 3)], ids=str)
@pytest.mark.thin(4)
def test_values_and_gradients_are_those_of_the_reference(name, shape, rng):
    loss, oracle = LOSSES[name], getattr(reference, name)
    arrays = testing.samples(loss, rng, shape)
    if len(shape) > 1:
        arrays["target"].flat[1] = -100
    weight = rng.uniform(0, 2, shape[min(1, len(shape) - 1)])
    weight[0] = 0
    for own, smoothing, w in itertools.product(own_options(loss), (0.0, 0.2), (None, weight)):
        options = {**own, "label_smoothing": smoothing, "weight": w}
        for reduction in ("none", "mean", "sum"):
            got = loss(**arrays, **options, reduction=reduction)
            wanted = oracle(**arrays, **options, reduction=reduction)
            np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12, err_msg=str(options))
        value, gradient = loss.value_and_grad(**arrays, **options)
        np.testing.assert_allclose(value, oracle(**arrays, **options), rtol=1e-10)
        wanted = reference.gradient(oracle, {**arrays, **options}, "input")
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-7, err_msg=str(options))


@pytest.mark.parametrize("dtype", sweep([np.float32, np.float64], np.float32))
@pytest.mark.parametrize("shape", sweep(["rows", "columns", "turned"], "turned"))
@pytest.mark.more
def test_a_certain_class_has_no_gradient(shape, dtype):
    """Where the target class's probability is one, exactly, factors are zero and slopes infinite."""
    classes = 200 if shape == "rows" else 5
    x = np.zeros((3, classes), dtype)
    x[:, 0] = 1e4
    y = np.zeros(3, int)
    if shape == "columns":
        x, y = np.ascontiguousarray(x.T)[None], y[None]
    for loss in (nl.focal_cross_entropy, focal):
        for gamma in (0.0, 0.3, 1.0, 1.5, 2.0):
            for found in loss.value_grad_hess(x, y, gamma=gamma, reduction="none"):
                np.testing.assert_array_equal(found, 0, err_msg=f"{gamma}")
    for q in (0.3, 1.0):
        for found in nl.generalized_cross_entropy.value_grad_hess(x, y, q=q):
            np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("dtype", sweep([np.float32, np.float64], np.float32))
@pytest.mark.more
def test_an_impossible_class_has_the_gradient_of_cross_entropy(dtype):
    """Where its probability is zero, exactly: the loss is infinite, but for one that is bounded."""
    x, y = np.array([[0.0, -np.inf, 1.0]], dtype), np.array([1])
    value, wanted = nl.cross_entropy.value_and_grad(x, y)
    assert value == np.inf
    value, gradient = nl.poly1_cross_entropy.value_and_grad(x, y)
    assert value == np.inf
    np.testing.assert_array_equal(gradient, wanted)
    for loss in (nl.focal_cross_entropy, focal):  # their slope there is 0 times infinity by the jets: NaN
        assert loss(x, y) == np.inf
    value, gradient = nl.generalized_cross_entropy.value_and_grad(x, y, q=0.5)
    assert value == 2
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.more
def test_limits_of_the_options(rng):
    x, y = 3 * rng.normal(size=(9, 6)), rng.integers(0, 6, 9)
    value, gradient = nl.cross_entropy.value_and_grad(x, y)
    for near, options in (
        (nl.focal_cross_entropy, {"gamma": 0}),
        (nl.poly1_cross_entropy, {"epsilon": 0}),
        (nl.generalized_cross_entropy, {"q": 1e-9}),
    ):
        got, found = near.value_and_grad(x, y, **options)
        np.testing.assert_allclose(got, value, rtol=1e-7)
        np.testing.assert_allclose(found, gradient, rtol=1e-7, atol=1e-9)
    p = np.exp(nl.cross_entropy(x, y, reduction="none") * -1)
    np.testing.assert_allclose(nl.generalized_cross_entropy(x, y, q=1.0, reduction="none"), 1 - p)


@pytest.mark.parametrize("name", OF_ONE_CLASS)
@pytest.mark.thin(3)
def test_rows_of_weight_zero_and_ignored_rows_count_nothing(name, rng):
    loss = LOSSES[name]
    x, y = rng.normal(size=(6, 4)), np.array([0, 1, 2, 3, -100, 1])
    weight = np.array([1.0, 0.0, 2.0, 1.0])
    value, gradient = loss.value_and_grad(x, y, weight=weight)
    kept = [0, 2, 3]
    alone, found = loss.value_and_grad(x[kept], y[kept], weight=weight)
    np.testing.assert_allclose(value, alone)
    np.testing.assert_allclose(gradient[kept], found)
    assert (gradient[[1, 4, 5]] == 0).all()
    x[4] = np.nan  # not even read
    np.testing.assert_array_equal(loss.grad(x, y, weight=weight), gradient)


@pytest.mark.parametrize("name", OF_ONE_CLASS)
def test_probabilities_are_refused_where_one_class_is_asked_for(name, rng):
    x, q = rng.normal(size=(3, 4)), rng.dirichlet(np.ones(4), 3)
    with pytest.raises(TypeError, match=f"^{name}: target holds class probabilities, but the loss asks for"):
        LOSSES[name](x, q)


@pytest.mark.more
def test_losses_of_ones_own(rng):
    x, y = rng.normal(size=(8, 5)), rng.integers(0, 5, 8)
    weight = rng.uniform(0.5, 2, 5)
    for own, ours in ((focal, nl.focal_cross_entropy), (focal.Class(), nl.FocalCrossEntropyLoss())):
        value, gradient = own.value_and_grad(x, y)
        expected, by = ours.value_and_grad(x, y)
        np.testing.assert_allclose(value, expected)
        np.testing.assert_allclose(gradient, by, atol=1e-15)
    assert np.isclose(focal(x, y, weight=weight), nl.focal_cross_entropy(x, y, weight=weight))
    z_loss = ZLoss(scale=0.3, reduction="sum")
    for target in (y, rng.dirichlet(np.ones(5), 8)):
        wanted = nl.cross_entropy.value_and_grad(x, target, reduction="sum", lse_square_scale=0.3)
        value, gradient = z_loss.value_and_grad(x, target)
        np.testing.assert_allclose(value, wanted[0])
        np.testing.assert_allclose(gradient, wanted[1], atol=1e-14)
    assert pickle.loads(pickle.dumps(z_loss))(x, y) == z_loss(x, y)
    assert "scale=0.3" in repr(z_loss) and "ZLoss" in repr(z_loss)
    testing.check_loss(focal, label_smoothing=0.0, gamma=1.5)


UNIT = nl.arguments.between(0.5, 0.0, 1.0)


@nl.score_loss
def of_all_kinds(log_prob, class_weight, squared=False, scale=1.0, other=UNIT):
    v = -class_weight * log_prob * scale
    return v * v if squared else v + other


@pytest.mark.sweep
def test_inside_compiled_code(rng):
    """The library's bits, of a loss with flags and a domain of its own."""
    x, y = rng.normal(size=(9, 7)).astype("f4"), rng.integers(0, 7, 9)
    weight = rng.uniform(0.5, 2, 7).astype("f4")
    jit = of_all_kinds.jit
    for squared, smoothing, other in ((False, 0.0, 0.25), (True, 0.0, 0.5), (True, 0.1, 1.0)):
        options = {"weight": weight, "squared": squared, "other": other, "label_smoothing": smoothing}
        out = np.empty_like(x)
        value = jit(x, y, weight, -100, "mean", smoothing, squared, 1.5, other, out)
        wanted, by = of_all_kinds.value_and_grad(x, y, scale=1.5, **options)
        assert value == wanted
        np.testing.assert_array_equal(out, by)
    with pytest.raises(ValueError, match=r"^of_all_kinds: other must be in \[0, 1\]"):
        jit(x, y, weight, -100, "mean", 0.0, False, 1.5, 2.0, out)
    with pytest.raises(TypingError, match="target holds class probabilities, but the loss asks for log_prob"):
        jit(x, np.full_like(x, 1 / 7))


def test_errors_of_definitions():
    with pytest.raises(TypeError, match="must take statistics of a row .*; got scores"):
        nl.score_loss(lambda scores: scores)
    with pytest.raises(TypeError, match="must take statistics"):
        nl.score_loss(lambda cross_entropy, gamma: cross_entropy)
    with pytest.raises(TypeError, match="score_loss wants a function"):
        nl.score_loss(3)

    @nl.score_loss
    def wrong(cross_entropy):
        return cross_entropy.nothing

    with pytest.raises(TypeError, match="wrong"):
        wrong(np.zeros((2, 3)), np.zeros(2, int))

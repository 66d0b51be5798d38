"""Sums of losses: against float64 formulas written here, and against their parts."""

import copy
import os
import pickle
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import numbaloss as nl
from numbaloss import testing
from numbaloss.kernels.cpu import elementwise as kernels


@nl.elementwise_loss
def quartic(input, target, factor=0.5):
    """An option of a name that a sum might take for itself."""
    return factor * (input - target) ** 4


class Shifted(nl.HuberLoss):
    """Computes something else than its definition."""

    def _run(self, mode, args, kwargs):
        assert mode == "value"
        return super()._run(mode, args, kwargs) + 1


def data(dtype=np.float64, n=300):
    rng = np.random.default_rng(5)
    return rng.normal(0, 2, n).astype(dtype), rng.normal(0, 2, n).astype(dtype)


def classes(n=40, c=5):
    rng = np.random.default_rng(6)
    return rng.normal(0, 2, (n, c)), rng.integers(0, c, n)


def huber(r, delta):
    return np.where(abs(r) <= delta, r * r / 2, delta * (abs(r) - delta / 2))


ELEMENTS = 0.7 * nl.MSELoss() + 0.3 * nl.L1Loss() - 0.2 * nl.HuberLoss(delta=0.5) + quartic.Class(factor=0.01)


def formula(x, t):
    r = x - t
    terms = 0.7 * r * r + 0.3 * abs(r) - 0.2 * huber(r, 0.5) + 0.01 * r**4
    slopes = 1.4 * r + 0.3 * np.sign(r) - 0.2 * np.clip(r, -0.5, 0.5) + 0.04 * r**3
    curvature = 1.4 - 0.2 * (abs(r) <= 0.5) + 0.12 * r**2
    return terms, slopes, curvature


def test_value_gradient_and_curvature_of_elements():
    x, t = data()
    terms, slopes, curvature = formula(x, t)
    assert isinstance(ELEMENTS, nl.ElementwiseLoss) and isinstance(ELEMENTS, nl.SumLoss)
    np.testing.assert_allclose(ELEMENTS(x, t), terms.mean(), rtol=1e-13)
    value, gradient, hess = ELEMENTS.value_grad_hess(x, t)
    assert value == ELEMENTS(x, t) == ELEMENTS.value_and_grad(x, t)[0]
    np.testing.assert_allclose(gradient, slopes / x.size, rtol=1e-11, atol=1e-15)
    np.testing.assert_array_equal(gradient, ELEMENTS.grad(x, t))
    np.testing.assert_allclose(hess, curvature / x.size, rtol=1e-12)
    by_input, by_target = ELEMENTS.grad(x, t, wrt=("input", "target"), grad_output=-3.0)
    np.testing.assert_allclose(by_input, -3 * slopes / x.size, rtol=1e-11, atol=1e-15)
    np.testing.assert_array_equal(by_target, -by_input)
    np.testing.assert_allclose(ELEMENTS(x, t, reduction="none"), terms, rtol=1e-12, atol=1e-14)


def test_weights_normalizer_and_out():
    x, t = data()
    terms, slopes, _ = formula(x, t)
    w = np.random.default_rng(1).random(x.size)
    w[::7] = 0
    np.testing.assert_allclose(ELEMENTS(x, t, sample_weight=w), (w * terms).sum() / w.sum(), rtol=1e-13)
    np.testing.assert_allclose(ELEMENTS(x, t, normalizer=7.0), terms.sum() / 7, rtol=1e-13)
    buffer = x.copy()
    gradient = ELEMENTS.value_and_grad(buffer, t, out=buffer)[1]
    assert gradient is buffer
    np.testing.assert_allclose(buffer, slopes / x.size, rtol=1e-11, atol=1e-15)


def test_float32_stays_float32():
    x, t = data(np.float32)
    wanted, slopes, _ = formula(x.astype(float), t.astype(float))
    value, gradient = ELEMENTS.value_and_grad(x, t)
    assert value.dtype == gradient.dtype == np.float32
    np.testing.assert_allclose(value, wanted.mean(), rtol=1e-6)
    np.testing.assert_allclose(gradient, slopes / x.size, rtol=1e-4, atol=1e-8)


def test_other_factors_and_options_take_the_same_kernel(monkeypatch):
    x, t = data()
    (0.25 * nl.MSELoss() + nl.HuberLoss()).value_and_grad(x, t)

    def compiled(*given):
        raise AssertionError("compiled again")

    monkeypatch.setattr(kernels, "compile_block", compiled)
    for a, b, delta in ((0.5, 3.0, 0.7), (-1.0, 2.0, 2.5)):
        criterion = a * nl.MSELoss() + b * nl.HuberLoss(delta=delta)
        value, _ = criterion.value_and_grad(x, t)
        r = x - t
        np.testing.assert_allclose(value, (a * r * r + b * huber(r, delta)).mean(), rtol=1e-12)


def test_weight_of_parts_that_divide_alike_and_not():
    """The mean of `MSELoss` and `L1Loss` divides by the sum of `weight`, that of `HuberLoss` by the count."""
    x, t = data()
    w = np.random.default_rng(2).random(x.size) + 0.1
    r = x - t
    alike, unlike = 2 * nl.MSELoss() + nl.L1Loss(), 2 * nl.MSELoss() + nl.HuberLoss()
    np.testing.assert_allclose(alike(x, t, weight=w), (w * (2 * r * r + abs(r))).sum() / w.sum(), rtol=1e-13)
    wanted = 2 * (w * r * r).sum() / w.sum() + (w * huber(r, 1)).sum() / x.size
    value, gradient = unlike.value_and_grad(x, t, weight=w)
    np.testing.assert_allclose([value, unlike(x, t, weight=w)], wanted, rtol=1e-13)
    slopes = 4 * w * r / w.sum() + w * np.clip(r, -1, 1) / x.size
    np.testing.assert_allclose(gradient, slopes, rtol=1e-12, atol=1e-16)
    buffer = x.copy()
    np.testing.assert_array_equal(unlike.grad(buffer, t, weight=w, out=buffer), gradient)
    by_weight = unlike.grad(x, t, weight=w, wrt="weight")
    step = np.zeros_like(w)
    step[3] = 1e-6
    difference = (unlike(x, t, weight=w + step) - unlike(x, t, weight=w - step)) / 2e-6
    np.testing.assert_allclose(by_weight[3], difference, rtol=1e-6)


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.more
def test_class_scores_in_one_pass():
    x, y = classes()
    w = np.linspace(0.5, 2, 5)
    focal = nl.FocalCrossEntropyLoss(weight=w.copy(), gamma=1.5)
    criterion = 0.8 * nl.CrossEntropyLoss(weight=w) + 0.5 * focal
    assert isinstance(criterion, nl.ScoreLoss)
    p = softmax(x)[np.arange(40), y]
    terms = -np.log(p) * w[y] * (0.8 + 0.5 * (1 - p) ** 1.5)
    np.testing.assert_allclose(criterion(x, y, reduction="none"), terms, rtol=1e-12)
    np.testing.assert_allclose(criterion(x, y), terms.sum() / w[y].sum(), rtol=1e-12)
    parts = [(f, part.value_grad_hess(x, y)) for f, part in criterion.terms]
    for got, k in zip(criterion.value_grad_hess(x, y), range(3), strict=True):
        np.testing.assert_allclose(got, sum(f * found[k] for f, found in parts), rtol=1e-11, atol=1e-15)
    plain = 2 * nl.CrossEntropyLoss() - nl.CrossEntropyLoss()
    np.testing.assert_allclose(plain(x, y), nl.cross_entropy(x, y), rtol=1e-14)
    q = softmax(np.roll(x, 1, axis=1))
    wanted = -(q * np.log(softmax(x))).sum(axis=1).mean()
    np.testing.assert_allclose(plain(x, q), wanted, rtol=1e-13)
    np.testing.assert_allclose(plain.grad(x, q), (softmax(x) - q) / 40, rtol=1e-12, atol=1e-16)


@pytest.mark.more
def test_parts_of_several_kinds():
    """Each mean has its own divisor: the class weights of rows that count, or the number of rows."""
    x, y = classes()
    y[::5] = -100
    w = np.linspace(0.5, 2, 5)
    counts = y >= 0
    p = softmax(x)
    y_or_0 = np.maximum(y, 0)
    own = p[np.arange(40), y_or_0]
    nll = np.where(counts, -np.log(np.where(counts, own, 1)), 0)
    weighted = nl.CrossEntropyLoss(weight=w)
    smooth = nl.CrossEntropyLoss(label_smoothing=0.2)
    capped = nl.CrossEntropyLoss(softcap=5.0)
    criterion = weighted + 0.5 * smooth + 2 * capped + 0.25 * nl.FocalCrossEntropyLoss(weight=w, gamma=1.0)
    assert not isinstance(criterion, nl.ScoreLoss)
    smoothed = 0.8 * nll[counts] + 0.2 * -np.log(p[counts]).mean(axis=1)
    of_capped = softmax(5 * np.tanh(x / 5))[np.arange(40), y_or_0]
    divisor = w[y[counts]].sum()
    wanted = (w[y_or_0] * nll)[counts].sum() / divisor + 0.5 * smoothed.mean()
    wanted += 2 * -np.log(of_capped[counts]).mean()
    wanted += 0.25 * (w[y_or_0] * (1 - own) * nll)[counts].sum() / divisor
    np.testing.assert_allclose(criterion(x, y), wanted, rtol=1e-12)
    value, gradient, hess = criterion.value_grad_hess(x, y)
    assert value == criterion(x, y)
    np.testing.assert_array_equal(criterion.grad(x, y), gradient)
    left, right = testing.slopes(lambda z: criterion(z, y), x, list(range(1, 200, 11)))
    np.testing.assert_allclose(gradient.flat[1:200:11], (left + right) / 2, rtol=1e-5, atol=1e-8)
    bends = [f * part.value_grad_hess(x, y)[2] for f, part in criterion.terms]
    np.testing.assert_allclose(hess, sum(bends), rtol=1e-12, atol=1e-15)
    buffer = x.copy()
    assert criterion.value_and_grad(buffer, y, out=buffer)[1] is buffer
    np.testing.assert_array_equal(buffer, gradient)
    np.testing.assert_allclose(criterion.grad(x, y, grad_output=-2.0), -2 * gradient, rtol=1e-12)
    rows = criterion(x, y, reduction="none")
    up = np.random.default_rng(0).normal(size=40)
    one = sum(f * part.grad(x, y, reduction="none", grad_output=up) for f, part in criterion.terms)
    np.testing.assert_allclose(
        criterion.grad(x, y, reduction="none", grad_output=up), one, rtol=1e-12, atol=1e-15
    )
    assert rows.shape == (40,)


def test_reductions_may_differ():
    x, t = data()
    r = x - t
    criterion = nl.MSELoss(reduction="sum") + 3 * nl.L1Loss()
    np.testing.assert_allclose(criterion(x, t), (r * r).sum() + 3 * abs(r).mean(), rtol=1e-13)
    np.testing.assert_allclose(criterion.grad(x, t), 2 * r + 3 * np.sign(r) / x.size, rtol=1e-13)
    with pytest.raises(ValueError, match="differ: mean, sum"):
        criterion.reduction  # noqa: B018 - it raises
    criterion.reduction = "sum"
    np.testing.assert_allclose(criterion(x, t), (r * r + 3 * abs(r)).sum(), rtol=1e-13)
    with pytest.raises(ValueError, match="all have reduction='none' or none of them"):
        nl.MSELoss(reduction="none") + nl.L1Loss()


@pytest.mark.more
def test_gradients_that_parts_state_themselves():
    """BCE's slope at 0 and 1 is stated; a sum keeps it, and that of the others by differentiation."""
    p, q = np.array([0.0, 0.3, 1.0]), np.array([0.0, 0.5, 0.2])
    criterion = 0.5 * nl.BCELoss() + nl.MSELoss()
    wanted = 0.5 * nl.binary_cross_entropy.grad(p, q) + 2 * (p - q) / 3
    np.testing.assert_allclose(criterion.grad(p, q), wanted, rtol=1e-13)
    with pytest.raises(ValueError, match=r"input must be in \[0, 1\]"):
        criterion.grad(p - 0.1, q)
    twice = nl.BCELoss() + nl.BCELoss()
    np.testing.assert_allclose(twice.grad(p, q), 2 * nl.binary_cross_entropy.grad(p, q), rtol=1e-13)
    logits = nl.BCEWithLogitsLoss() + 0.1 * nl.MSELoss()
    x = np.array([-40.0, 0.5, 3.0])
    assert isinstance(logits, nl.ElementwiseLoss)
    value = (np.logaddexp(0, x) - q * x + 0.1 * (x - q) ** 2).mean()
    np.testing.assert_allclose(logits(x, q), value, rtol=1e-13)
    np.testing.assert_allclose(logits.grad(x, q, wrt="target"), (-x - 0.2 * (x - q)) / 3, rtol=1e-13)
    pos = np.array([2.0, 0.5, 3.0])
    both = nl.BCEWithLogitsLoss() - 0.5 * nl.BCEWithLogitsLoss()
    wanted = nl.binary_cross_entropy_with_logits(x, q, pos_weight=pos) / 2
    np.testing.assert_allclose(both(x, q, pos_weight=pos), wanted, rtol=1e-13)


def test_algebra():
    a, b = nl.MSELoss(), nl.HuberLoss(delta=2.0)
    x, t = data()
    assert repr(0.7 * a + b) == "0.7 * MSELoss(reduction='mean') + HuberLoss(reduction='mean', delta=2.0)"
    assert repr(-a - b / 2) == "-MSELoss(reduction='mean') - 0.5 * HuberLoss(reduction='mean', delta=2.0)"
    va, vb = a(x, t), b(x, t)
    for made, wanted in (
        (2 * a, 2 * va),
        (a * np.float32(2), 2 * va),
        (np.float64(2) * a, 2 * va),
        (np.array(2.0) * a, 2 * va),
        (a - b, va - vb),
        (2 * (a + b) - (b + a) / 4, 1.75 * (va + vb)),
        (sum([a, b, b]), va + 2 * vb),
        (-(a - 3 * b), 3 * vb - va),
    ):
        np.testing.assert_allclose(made(x, t), wanted, rtol=1e-12)
    assert sum([a]) is a
    for wrong in (lambda: a + 1, lambda: a * b, lambda: a / b, lambda: 1 - a, lambda: a + nl.mse_loss):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()
    for wrong in (lambda: "2" * a, lambda: np.ones(2) * a, lambda: True * a):
        with pytest.raises(TypeError, match="MSELoss: factor must be a number"):
            wrong()
    with pytest.raises(TypeError, match="MSELoss takes input, target, but CosineEmbeddingLoss takes input1"):
        a + nl.CosineEmbeddingLoss()
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
        (a + b)(x, t, gamma=1.0)


def test_options_of_parts():
    x, t = data()
    part = nl.HuberLoss(delta=2.0)
    criterion = nl.MSELoss() + part
    before = criterion(x, t)
    part.delta = 0.1
    assert criterion(x, t) == before  # it keeps them
    criterion.delta_2, criterion.factor1 = 0.5, 3.0
    assert repr(criterion) == "3.0 * MSELoss(reduction='mean') + HuberLoss(reduction='mean', delta=0.5)"
    r = x - t
    np.testing.assert_allclose(criterion(x, t), (3 * r * r + huber(r, 0.5)).mean(), rtol=1e-13)
    with pytest.raises(ValueError, match="delta_2 must be > 0"):
        criterion.delta_2 = -1.0


def test_a_subclass_that_computes_something_else_is_called():
    x, t = data()
    criterion = 2 * Shifted(delta=0.5) + nl.MSELoss() + nl.MSELoss()
    r = x - t
    np.testing.assert_allclose(criterion(x, t), (2 * huber(r, 0.5) + 2 * r * r).mean() + 2, rtol=1e-13)


def test_terms_of_different_shapes_are_refused():
    x, y = np.zeros((3, 4)), np.zeros((3, 4))
    criterion = nl.MSELoss(reduction="none") + nl.MultiLabelSoftMarginLoss(reduction="none")
    with pytest.raises(ValueError, match=re.escape("terms of one shape, got [(3,), (3, 4)]")):
        criterion(x, y)


@pytest.mark.parametrize(
    "criterion",
    [ELEMENTS, nl.MSELoss(reduction="sum") + nl.L1Loss(), 0.5 * nl.BCELoss() + 2 * nl.MSELoss()],
    ids=["elements", "reductions", "stated"],
)
def test_copies_and_pickles(criterion):
    x, t = data()
    x, t = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(-t))
    criterion = copy.copy(criterion)
    criterion.note = "mine"
    for other in (copy.copy(criterion), copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert repr(other) == repr(criterion) and other.note == "mine"
        assert other(x, t) == criterion(x, t)


def test_a_changed_part_is_seen():
    scope = {"nl": nl, "SCALE": 2.0}
    exec("@nl.elementwise_loss\ndef own(input, target):\n    return SCALE * (input - target)", scope)
    criterion = scope["own"].Class() + nl.L1Loss()
    x, t = np.array([3.0]), np.array([1.0])
    assert criterion(x, t) == 6
    scope["SCALE"] = 5.0
    assert criterion(x, t) == 12


def test_an_error_in_a_part_is_said():
    @nl.elementwise_loss
    def broken(input, target):
        return np.fft.fft(input - target)

    with pytest.raises(TypeError, match=r"broken_plus_l1_loss: cannot be compiled[^$]*return np.fft.fft"):
        (broken.Class() + nl.L1Loss())(*data())


def test_inside_compiled_code():
    from numba import njit

    definition = type(0.5 * nl.MSELoss() + nl.L1Loss()).function
    scalar, whole = definition.scalar, definition.jit

    @njit
    def run(x, t):
        return scalar(x[0], t[0], 0.5, 2.0), whole(x, t, factor1=0.5, factor2=2.0)

    x, t = data()
    r = x - t
    one, mean = run(x, t)
    terms = 0.5 * r * r + 2 * abs(r)
    np.testing.assert_allclose([one, mean], [terms[0], terms.mean()], rtol=1e-13)


@pytest.mark.more
def test_kernels_of_sums_are_kept_on_disk(tmp_path):
    """Another process finds them, whatever the factors."""
    script = """
        import sys
        import numpy as np, numbaloss as nl
        from numbaloss.kernels.cpu import disk
        x, t = np.arange(4.0), np.ones(4)
        print(float((float(sys.argv[1]) * nl.MSELoss() + nl.SmoothL1Loss()).value_and_grad(x, t)[0]))
    """

    def run(factor):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), factor],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert not done.returncode, done.stderr
        return float(done.stdout), {p.name for p in tmp_path.rglob("*mse_loss_plus*.nbc")}

    first, files = run("0.5")
    again, same = run("2.0")
    smooth = (0.5 + 0 + 0.5 + 1.5) / 4
    assert (first, again) == (0.5 * 1.5 + smooth, 2 * 1.5 + smooth)
    assert files and files == same


@pytest.mark.sweep
@pytest.mark.parametrize("criterion", [ELEMENTS, nl.CrossEntropyLoss() + nl.FocalCrossEntropyLoss()])
def test_passes_the_general_check(criterion):
    testing.check_loss(type(criterion))

"""What `value_grad_hess` gives in place of the second derivative, and its floor."""

import numpy as np
import pytest

import numbaloss as nl
from numbaloss.kernels.spec import CURVATURES

BCE = nl.binary_cross_entropy_with_logits
ROWS = {"rows": (5, 150), "turned": (40, 7), "columns": (6, 5, 8)}


@nl.elementwise_loss
def cubic(input, target):
    return abs(input - target) ** 3


class Fair(nl.ElementwiseLoss):
    """A loss of the user's own."""

    c: float = 1.5
    residual = True

    def value(input, target, c):
        r = abs(input - target) / c
        return c * c * (r - nl.math.log1p(r))

    def fisher_input(input, target, c):
        return 0 * input + 1 / c


@pytest.fixture
def pair(rng):
    x, t = rng.normal(0, 2, (2, 60))
    t[:5] = x[:5]
    return x, t


def curvature_of(loss, *arrays, **options):
    value, gradient, curvature = loss.value_grad_hess(*arrays, reduction="sum", **options)
    plain = loss.value_and_grad(
        *arrays, reduction="sum", **{k: v for k, v in options.items() if k not in NEW}
    )
    assert value == plain[0]
    np.testing.assert_array_equal(gradient, plain[1])
    return curvature


NEW = "curvature", "floor"


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.thin(2)
def test_majorizer_of_a_residual_is_slope_over_residual(pair, dtype):
    x, t = (a.astype(dtype) for a in pair)
    r = (x - t).astype(np.float64)
    got = curvature_of(nl.huber_loss, x, t, delta=0.7, curvature="majorizer")
    with np.errstate(divide="ignore"):
        wanted = np.minimum(1, 0.7 / abs(r))
    np.testing.assert_allclose(got, wanted, rtol=1e-6 if dtype == np.float32 else 1e-14)
    by_target = curvature_of(nl.huber_loss, x, t, delta=0.7, curvature="majorizer", wrt="target")
    np.testing.assert_array_equal(by_target, got)
    apart = r != 0  # where its definition has no kink
    np.testing.assert_allclose(
        curvature_of(Fair.function, x, t, curvature="majorizer")[apart],
        1 / (1 + abs(r[apart]) / 1.5),
        rtol=1e-4 if dtype == np.float32 else 1e-12,
    )


def test_majorizer_of_a_kink():
    x, t = np.array([1.0, 3.0]), np.array([1.0, 1.0])
    np.testing.assert_array_equal(curvature_of(nl.l1_loss, x, t, curvature="majorizer"), [0, 0.5])


def test_where_an_exponential_overflows():
    """Its curvature is infinite, and not infinity times the 0 that bends a straight line."""
    x = np.array([-800.0, 1.0, 800.0])
    np.testing.assert_allclose(
        curvature_of(nl.poisson_nll_loss, x, np.ones(3)), [0, np.e, np.inf], rtol=1e-14
    )


def test_majorizer_of_gaussians_is_the_precision(pair):
    x, t = pair
    var = np.linspace(0.3, 2, x.size)
    got = nl.gaussian_nll_loss.value_grad_hess(x, t, var, reduction="sum", curvature="majorizer")[2]
    np.testing.assert_allclose(got, 1 / var, rtol=1e-13)


def test_stated_majorizer_of_logits():
    x = np.array([0.0, 1e-9, -1.0, 3.0, 800.0, -np.inf])
    got = curvature_of(BCE, x, np.full(6, 0.3), pos_weight=np.full(6, 2.0), curvature="majorizer")
    with np.errstate(invalid="ignore"):
        wanted = 1.3 * np.where(x == 0, 0.25, np.tanh(x / 2) / (2 * x))
    np.testing.assert_allclose(got, wanted, rtol=1e-14)


@pytest.mark.more
def test_fisher_is_the_mean_over_the_model_s_targets():
    x = np.array([-3.0, 0.2, 1.5])
    p = 1 / (1 + np.exp(-x))
    each = [curvature_of(BCE, x, np.full(3, y), pos_weight=np.full(3, 1.7)) for y in (0.0, 1.0)]
    got = curvature_of(BCE, x, np.zeros(3), pos_weight=np.full(3, 1.7), curvature="fisher")
    np.testing.assert_allclose(got, (1 - p) * each[0] + p * each[1], rtol=1e-14)
    each = [curvature_of(nl.soft_margin_loss, x, np.full(3, y)) for y in (-1.0, 1.0)]
    got = curvature_of(nl.soft_margin_loss, x, np.ones(3), curvature="fisher")
    np.testing.assert_allclose(got, (1 - p) * each[0] + p * each[1], rtol=1e-14)
    each = [curvature_of(nl.binary_cross_entropy, p, np.full(3, y)) for y in (0.0, 1.0)]
    got = curvature_of(nl.binary_cross_entropy, p, np.ones(3), curvature="fisher")
    np.testing.assert_allclose(got, (1 - p) * each[0] + p * each[1], rtol=1e-12)


@pytest.mark.more
def test_fisher_of_counts_and_gaussians():
    x = np.array([0.5, 2.0, 7.0])
    mean = curvature_of(nl.poisson_nll_loss, x, x * (x + 1e-8), log_input=False)  # any with this mean
    got = curvature_of(nl.poisson_nll_loss, x, np.zeros(3), log_input=False, curvature="fisher")
    np.testing.assert_allclose(got, 1 / x, rtol=1e-7)
    assert mean.shape == got.shape
    got = curvature_of(nl.poisson_nll_loss, x, np.zeros(3), curvature="fisher")
    np.testing.assert_allclose(got, np.exp(x), rtol=1e-14)
    far = np.array([1.0, 5.0, -2.0])
    got = nl.gaussian_nll_loss.value_grad_hess(
        far, np.zeros(3), x, reduction="sum", curvature="fisher", wrt="var"
    )[2]
    np.testing.assert_allclose(got, 0.5 / x**2, rtol=1e-14)
    np.testing.assert_allclose(curvature_of(Fair.function, x, far, curvature="fisher"), 1 / 1.5)


@pytest.mark.more
def test_absolute_and_gradient(pair):
    x, t = pair
    exact = curvature_of(nl.poisson_nll_loss, x, t)
    assert (curvature_of(cubic, x, t) >= 0).all()
    np.testing.assert_array_equal(curvature_of(nl.poisson_nll_loss, x, t, curvature="absolute"), abs(exact))
    slope = nl.poisson_nll_loss.grad(x, t, reduction="sum")
    np.testing.assert_array_equal(curvature_of(nl.poisson_nll_loss, x, t, curvature="gradient"), abs(slope))


@pytest.mark.more
def test_floor_is_before_what_multiplies(pair, rng):
    x, t = pair
    w = rng.uniform(0, 2, x.size)
    w[::7] = 0
    x[7] = np.nan
    for curvature in ("exact", "majorizer"):
        bare = nl.huber_loss.value_grad_hess(x, t, reduction="none", curvature=curvature)[2]
        got = nl.huber_loss.value_grad_hess(
            x, t, reduction="none", curvature=curvature, floor=0.4, sample_weight=w, grad_output=-2.0
        )[2]
        with np.errstate(invalid="ignore"):
            wanted = np.where(w == 0, 0, -2 * w * np.where(bare < 0.4, 0.4, bare))
        np.testing.assert_allclose(got, wanted, rtol=1e-14)


def scores(shape, rng, probabilities):
    x, rows = rng.normal(0, 2, shape), (shape[0], *shape[2:])
    if probabilities:
        q = rng.uniform(size=shape)
        return x, q, q.sum(1, keepdims=True)
    y = rng.integers(0, shape[1], rows)
    return x, y, np.ones((shape[0], 1, *shape[2:]))


ALWAYS = ("rows", False), ("columns", True)  # the others compile as much again


@pytest.mark.parametrize(
    ("shape", "probabilities"),
    [
        pytest.param(shape, q, id=f"{name}-{q}", marks=[pytest.mark.sweep] * ((name, q) not in ALWAYS))
        for name, shape in ROWS.items()
        for q in (False, True)
    ],
)
@pytest.mark.more
def test_class_scores(shape, probabilities, rng):
    x, target, mass = scores(shape, rng, probabilities)
    rows = shape[:1] + shape[2:]
    w, up = rng.uniform(0, 2, rows), rng.choice([-2.0, 1.0], rows)
    w[1] = 0
    x[1] = np.nan
    common = dict(reduction="none", sample_weight=w, grad_output=up)
    factor = np.expand_dims(w * up, 1)
    p = np.exp(x - x.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gradient = nl.cross_entropy.grad(x, target, **common)
    wanted = {
        "exact": p * (1 - p) * mass,
        "fisher": p * (1 - p) * mass,
        "absolute": p * (1 - p) * mass,
        "gershgorin": 2 * p * (1 - p) * mass,
        "majorizer": 0.5 * mass + 0 * p,
        "gradient": np.divide(abs(gradient), abs(factor), where=factor != 0, out=np.zeros(x.shape)),
    }
    assert wanted.keys() == set(CURVATURES)
    for curvature, bare in wanted.items():
        for floor in (None, 0.15) if curvature in ("exact", "majorizer") else (None,):
            got = nl.cross_entropy.value_grad_hess(x, target, curvature=curvature, floor=floor, **common)
            np.testing.assert_array_equal(got[1], gradient)
            least = bare if floor is None else np.maximum(bare, floor)
            with np.errstate(invalid="ignore"):
                right = np.where(factor == 0, 0, factor * least)
            np.testing.assert_allclose(got[2], right, rtol=1e-10, atol=1e-14, err_msg=f"{curvature} {floor}")


@pytest.mark.more
def test_class_scores_in_float32_with_class_weights(rng):
    x, y = rng.normal(size=(30, 4)).astype(np.float32), rng.integers(0, 4, 30)
    weight = np.array([1, 0, 2, 0.5], np.float32)
    p = np.exp(x.astype(float)) / np.exp(x.astype(float)).sum(1, keepdims=True)
    got = curvature_of(nl.cross_entropy, x, y, weight=weight, curvature="gershgorin")
    np.testing.assert_allclose(got, 2 * p * (1 - p) * weight[y][:, None], rtol=2e-6)
    got = curvature_of(nl.focal_cross_entropy, x, y, curvature="absolute")
    np.testing.assert_array_equal(got, abs(curvature_of(nl.focal_cross_entropy, x, y)))


def test_soft_margins_by_elements(rng):
    x, y = rng.normal(size=(6, 4)), rng.integers(0, 2, (6, 4)).astype(float)
    got = curvature_of(nl.multilabel_soft_margin_loss, x, y, curvature="majorizer")
    np.testing.assert_allclose(got, np.tanh(x / 2) / (2 * x) / 4, rtol=1e-13)


REFUSED = [
    (cubic, "majorizer", "not of the residual alone, and the definition states none"),
    (nl.poisson_nll_loss, "majorizer", "not of the residual alone"),
    (nl.mse_loss, "gershgorin", "it is of class scores"),
    (nl.mse_loss, "fisher", "the definition states none"),
]


@pytest.mark.parametrize(("loss", "curvature", "said"), REFUSED, ids=lambda x: getattr(x, "__name__", None))
def test_elements_that_have_none(loss, curvature, said):
    with pytest.raises(
        ValueError, match=f"^{loss.__name__}: there is no curvature '{curvature}' by 'input': .*{said}"
    ):
        loss.value_grad_hess(np.ones(3), np.ones(3), curvature=curvature)


def test_class_scores_that_have_none():
    x, y = np.ones((2, 3)), np.zeros(2, int)
    for loss, options in ((nl.focal_cross_entropy, {}), (nl.cross_entropy, {"softcap": 3.0})):
        with pytest.raises(
            ValueError, match="there is no curvature 'gershgorin': it is known of losses that are"
        ):
            loss.value_grad_hess(x, y, curvature="gershgorin", **options)
    with pytest.raises(ValueError, match="cross_entropy: there is no curvature 'fisher' with class weights"):
        nl.cross_entropy.value_grad_hess(x, y, curvature="fisher", weight=np.ones(3))
    with pytest.raises(ValueError, match="cosine_embedding_loss: "):
        nl.cosine_embedding_loss.value_grad_hess(x, x, np.ones(2), floor=1.0)
    with pytest.raises(ValueError, match="nll_loss: curvature must be 'exact', without a floor"):
        nl.nll_loss.value_grad_hess(x, y, curvature="absolute")


def test_bad_options():
    x = np.ones(3)
    with pytest.raises(ValueError, match="^mse_loss: curvature must be one of 'exact', 'majorizer'"):
        nl.mse_loss.value_grad_hess(x, x, curvature="hessian")
    with pytest.raises(ValueError, match="^mse_loss: floor must be >= 0, got -1.0"):
        nl.mse_loss.value_grad_hess(x, x, floor=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'floor' .it is for the curvature"):
        nl.mse_loss.value_and_grad(x, x, floor=1.0)


def test_other_numbers_in_later_calls(pair):
    x, t = pair
    for floor in (0.1, 0.6, 0.3, 0.1):
        got = curvature_of(nl.huber_loss, x, t, floor=floor)
        np.testing.assert_array_equal(got, np.maximum(curvature_of(nl.huber_loss, x, t), floor))


def test_narrower_outputs_and_wide_arrays(rng):
    x, t = rng.normal(size=(2, 300, 300))
    rooms = np.empty(x.shape, np.float32, order="F"), np.empty(x.shape, np.float32, order="F")
    nl.huber_loss.value_grad_hess(x, t, reduction="sum", curvature="majorizer", floor=0.5, out=rooms)
    wanted = np.maximum(np.minimum(1, 1 / abs(x - t)), 0.5)
    np.testing.assert_allclose(rooms[1], wanted, rtol=1e-6)


def test_sums(pair):
    x, t = pair
    both = 0.5 * nl.MSELoss(reduction="sum") + 2 * nl.HuberLoss(reduction="sum")
    r = abs(x - t)
    with np.errstate(divide="ignore"):
        wanted = 1 + 2 * np.minimum(1, 1 / r)
    np.testing.assert_allclose(both.value_grad_hess(x, t, curvature="majorizer")[2], wanted, rtol=1e-13)
    got = both.value_grad_hess(x, t, curvature="majorizer", floor=2.0)[2]
    np.testing.assert_allclose(got, np.maximum(wanted, 2), rtol=1e-13)
    with pytest.raises(ValueError, match="where no factor is negative"):
        (-both).value_grad_hess(x, t, curvature="majorizer")
    apart = nl.MSELoss(reduction="sum") + nl.HuberLoss()
    with pytest.raises(ValueError, match="not computed in one pass"):
        apart.value_grad_hess(x, t, floor=1.0)


def test_a_power_above_the_square_has_no_majorizer(pair):
    x, t = pair
    options = dict(reduction="sum", curvature="majorizer")
    assert np.isfinite(nl.general_robust_loss.value_grad_hess(x, t, alpha=2.0, **options)[2]).all()
    with pytest.raises(ValueError, match="general_robust_loss: there is no curvature 'majorizer' with alpha"):
        nl.general_robust_loss.value_grad_hess(x, t, alpha=2.5, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cross_entropy", {}),
        ("cross_entropy", {"softcap": 5.0}),
        ("cross_entropy", {"lse_square_scale": 0.1}),
        ("focal_cross_entropy", {}),
    ],
    ids=str,
)
@pytest.mark.thin(3)
def test_without_the_value(rng, name, options):
    """As boosters ask for derivatives: the same bits, of few classes by a kernel that has no value."""
    loss = nl.registry[name]
    for classes in (2, 5, 300):
        x, y = rng.normal(0, 4, (103, classes)).astype("f4"), rng.integers(0, classes, 103)
        y[::7] = loss.Class().ignore_index
        wanted = loss.value_grad_hess(x, y, reduction="sum", **options)
        found = loss._run("grad_hess", (x, y), {"reduction": "sum", **options})
        for a, b in zip(found[1:], wanted[1:], strict=True):
            np.testing.assert_array_equal(a, b)

"""PyTorch as a second oracle: signatures, values, every gradient it has, and its conventions at ties."""

import inspect
import itertools

import numpy as np
import pytest
from sweeps import apart

import numbaloss as nl
from numbaloss import testing

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # of kl_div

DEPRECATED = ("size_average", "reduce")

# What PyTorch does not differentiate.
REFUSED = {
    "binary_cross_entropy": ("weight",),
    "binary_cross_entropy_with_logits": ("weight", "pos_weight"),
    "soft_margin_loss": ("target",),
    "hinge_embedding_loss": ("target",),
}


@pytest.fixture
def loss(loss):
    if apart(loss):
        pytest.skip("PyTorch has no such loss")
    return loss


def torch_function(torch, loss):
    return getattr(torch.nn.functional, loss.__name__)


def test_function_signature(loss, torch):
    """PyTorch's names, order and defaults, without what it deprecates, before our own."""
    theirs = inspect.signature(torch_function(torch, loss)).parameters
    theirs = {n: p.default for n, p in theirs.items() if n not in DEPRECATED}
    ours = inspect.signature(loss).parameters
    positional = {n: p.default for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(theirs.items())
    keywords = [n for n, p in ours.items() if p.kind is p.KEYWORD_ONLY]
    assert keywords == ["sample_weight", "normalizer", "comm"]


def test_class_constructor(loss, torch):
    """The constructor takes PyTorch's options, and by position where PyTorch does."""
    theirs = inspect.signature(getattr(torch.nn, loss.Class.__name__)).parameters
    theirs = {n: p for n, p in theirs.items() if n not in DEPRECATED}
    ours = {n: f for n, f in loss.Class.fields.items() if not f.call_only}
    assert set(ours) == set(theirs)
    assert {n: f.default for n, f in ours.items()} == {n: p.default for n, p in theirs.items()}
    options = {n: f.samples[-1] for n, f in ours.items() if f.samples}
    assert repr(loss.Class(**options)) == repr(loss.Class(**{n: options[n] for n in reversed(options)}))


def gradients(torch, loss, arrays, options, reduction):
    """PyTorch's value, and its gradient by every argument that it differentiates."""
    refused = REFUSED.get(loss.__name__, ())
    tensors = {n: torch.tensor(a, requires_grad=n not in refused) for n, a in arrays.items()}
    value = torch_function(torch, loss)(**tensors, **options, reduction=reduction)
    value.sum().backward()
    return value.detach().numpy(), {n: t.grad.numpy() for n, t in tensors.items() if t.grad is not None}


def weights(loss, arrays, rng):
    """No weight, and one of the input's shape: PyTorch lets others broadcast in some of the losses only."""
    if "weight" not in loss.Class.fields:
        return [{}]
    x = next(iter(arrays.values()))
    return [{}, {"weight": rng.uniform(0.5, 2, x.shape).astype(x.dtype)}]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_values_and_gradients(loss, dtype, torch, rng):
    """By every argument that PyTorch differentiates: target, var and weight too."""
    arrays = testing.samples(loss, rng, dtype=dtype)
    # Both sides round; a few terms cancel numbers of up to about 10.
    roundings = 256 * float(np.finfo(dtype).eps)
    for options, weight in itertools.product(testing.combinations(loss), weights(loss, arrays, rng)):
        case = testing.Case(loss, options, arrays | weight)
        value, wanted = gradients(torch, loss, case.arrays, options, "none")
        names = tuple(wanted)
        assert {n for n in case.arrays if n not in REFUSED.get(loss.__name__, ())} == set(names)
        terms, found = loss.value_and_grad(**case.arrays, **options, reduction="none", wrt=names)
        case.agree("value", terms, value, roundings * (np.abs(value) + 1))
        for name, g in zip(names, found, strict=True):
            # PyTorch has NaN (0 * inf) in the gradients by targets of zero, where we have a finite number.
            theirs = np.where(np.isnan(wanted[name]) & (arrays["target"] == 0), g, wanted[name])
            assert np.isfinite(g).all() or np.isinf(theirs).any()
            case.agree(f"gradient by {name}", g, theirs, roundings * (np.abs(theirs) + 1))


def test_means_and_sums(loss, torch, rng):
    arrays = testing.samples(loss, rng)
    reductions = [r for r in loss.Class.fields["reduction"].samples if r != "none"]
    default = loss.Class._default_wrt()
    wrt = (default,) if isinstance(default, str) else default
    for weight, reduction in itertools.product(weights(loss, arrays, rng), reductions):
        case = testing.Case(loss, {}, arrays | weight)
        value, wanted = gradients(torch, loss, case.arrays, {}, reduction)
        got, found = loss.value_and_grad(**case.arrays, reduction=reduction, wrt=wrt)
        case.agree(reduction, got, value, 1e-13 * np.abs(case.terms()).sum())
        for name, g in zip(wrt, found, strict=True):
            case.agree(
                f"gradient by {name} of {reduction}", g, wanted[name], 1e-11 * np.abs(wanted[name]) + 1e-14
            )


TIES = [
    ("l1_loss", {"input": [1.0, -2.0, 0.0], "target": [1.0, -2.0, 0.0]}, {}),
    ("smooth_l1_loss", {"input": [0.5, -0.5, 0.0], "target": [0.0, 0.0, 0.0]}, {"beta": 0.5}),
    ("smooth_l1_loss", {"input": [0.5, -0.5, 0.0], "target": [0.5, -0.5, 0.0]}, {"beta": 0.0}),
    ("huber_loss", {"input": [0.5, -0.5, 0.0], "target": [0.0, 0.0, 0.0]}, {"delta": 0.5}),
    ("hinge_embedding_loss", {"input": [1.0, 1.0, 0.0], "target": [-1.0, 1.0, -1.0]}, {}),
    ("hinge_embedding_loss", {"input": [1.0, 0.5, 2.0], "target": [0.0, 2.0, -3.0]}, {}),
    (
        "margin_ranking_loss",
        {"input1": [0.0, 1.0, 0.5], "input2": [0.0, 0.5, 1.0], "target": [1.0, 1.0, -1.0]},
        {"margin": 0.5},
    ),
    ("margin_ranking_loss", {"input1": [2.0, 1.0], "input2": [2.0, 1.0], "target": [1.0, -1.0]}, {}),
    ("binary_cross_entropy", {"input": [0.0, 1.0, 0.0, 1.0], "target": [0.0, 1.0, 1.0, 0.0]}, {}),
    ("gaussian_nll_loss", {"input": [1.0, 2.0], "target": [0.0, 0.0], "var": [0.0, 0.5]}, {"eps": 0.5}),
    ("gaussian_nll_loss", {"input": [1.0, 2.0], "target": [0.0, 0.0], "var": [0.1, 0.3]}, {"eps": 0.5}),
    ("poisson_nll_loss", {"input": [0.3, 0.3], "target": [0.0, 1.0]}, {"full": True}),
    ("kl_div", {"input": [-1.0, -2.0], "target": [0.0, 1.0]}, {}),
]


@pytest.mark.parametrize(("name", "arrays", "options"), TIES, ids=[t[0] for t in TIES])
def test_ties_go_as_in_pytorch(name, arrays, options, torch):
    """By the arguments that a model produces: at a kink, on the clamp, at the bounds of the domain.

    PyTorch's bound on the denominator of binary_cross_entropy's gradient is 1e-12 in float32: 4e-9 off.
    """
    loss = getattr(nl, name)
    arrays = {n: np.array(a) for n, a in arrays.items()}
    value, wanted = gradients(torch, loss, arrays, options, "none")
    for wrt in [n for n in ("input", "input1", "input2", "var") if n in arrays]:
        got, gradient = loss.value_and_grad(**arrays, **options, reduction="none", wrt=wrt)
        np.testing.assert_allclose(got, value, rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(gradient, wanted[wrt], rtol=5e-9, atol=1e-15, err_msg=wrt)


def test_var_of_fewer_axes(torch, rng):
    x, y = rng.normal(size=(2, 3, 4))
    for shape in [(3, 1), (3,), (3, 4)]:
        var = rng.uniform(0.5, 2, shape)
        value, wanted = gradients(
            torch, nl.gaussian_nll_loss, {"input": x, "target": y, "var": var}, {}, "mean"
        )
        got, gradient = nl.gaussian_nll_loss.value_and_grad(x, y, var, wrt="var")
        np.testing.assert_allclose(got, value, rtol=1e-14)
        np.testing.assert_allclose(gradient, wanted["var"], rtol=1e-12)


@pytest.mark.parametrize("shape", [(), (3, 1), (1, 4)], ids=str)
def test_gaussian_target_that_broadcasts(torch, rng, shape):
    target = np.asarray(rng.normal(size=shape))
    arrays = {"input": rng.normal(size=(3, 4)), "target": target, "var": rng.uniform(0.5, 2, 3)}
    for reduction in ("mean", "none"):
        value, wanted = gradients(torch, nl.gaussian_nll_loss, arrays, {}, reduction)
        got, found = nl.gaussian_nll_loss.value_and_grad(**arrays, reduction=reduction, wrt=tuple(arrays))
        np.testing.assert_allclose(got, value, rtol=1e-14)
        for (name, a), gradient in zip(arrays.items(), found, strict=True):
            assert gradient.shape == a.shape
            np.testing.assert_allclose(gradient, wanted[name], rtol=1e-12, err_msg=name)


def test_where_we_differ_on_purpose(torch):
    """Finite where PyTorch overflows, 0 where it has 0 * inf, an error where it warns and broadcasts."""
    F = torch.nn.functional
    x, y = np.array([1000.0]), np.array([-1.0])
    assert torch.isinf(F.soft_margin_loss(torch.tensor(x), torch.tensor(y)))
    assert nl.soft_margin_loss.value_and_grad(x, y) == (1000.0, np.array([1.0]))
    log_p, log_q = np.array([-np.inf, -1.0]), np.array([-np.inf, -np.inf])
    assert torch.isnan(F.kl_div(torch.tensor(log_p), torch.tensor(log_q), log_target=True))
    np.testing.assert_array_equal(nl.kl_div(log_p, log_q, log_target=True, reduction="none"), [0.0, 0.0])
    with pytest.raises(ValueError, match="shape"):
        nl.mse_loss(np.zeros((3, 1)), np.zeros(3))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_logits_of_any_size(dtype, torch):
    """PyTorch's own form loses the smallest terms, so its agreement is absolute there."""
    x = np.array([-1e4, -100, -20, 0, 20, 100, 1e4], dtype)
    eps = np.finfo(dtype).eps
    for target in (0.0, 0.25, 1.0):
        y = np.full_like(x, target)
        value, gradient = nl.binary_cross_entropy_with_logits.value_and_grad(x, y, reduction="none")
        terms, wanted = gradients(
            torch, nl.binary_cross_entropy_with_logits, {"input": x, "target": y}, {}, "none"
        )
        np.testing.assert_allclose(value, terms, rtol=2 * eps, atol=4 * eps)
        np.testing.assert_allclose(gradient, wanted["input"], rtol=2 * eps, atol=2 * eps)

"""Elementwise losses: values and gradients against the float64 reference, dtypes, reductions, weights."""

import inspect
import itertools
import pickle

import numpy as np
import pytest
from sweeps import sweep

import numbaloss as nl
from numbaloss import reference, testing
from numbaloss.families.elementwise import ElementwiseLoss
from numbaloss.kernels.spec import Memo
from numbaloss.loss import registry

CHECKED = [f for f in registry.values() if issubclass(f.Class, ElementwiseLoss)]
NAMES = [f.__name__ for f in CHECKED]
HAVE_WEIGHT = [
    n for n, f in registry.items() if "weight" in f.Class.fields and issubclass(f.Class, ElementwiseLoss)
]


def oracle(case, **more):
    return getattr(reference, case.loss.__name__)(**{**case.arrays, **case.options, **more})


def cases(loss, rng, dtype=np.float64):
    arrays = testing.samples(loss, rng, dtype=dtype)
    for options in testing.combinations(loss):
        yield testing.Case(loss, options, arrays)


@pytest.mark.parametrize(
    "loss", sweep(CHECKED, nl.mse_loss, nl.binary_cross_entropy), ids=lambda f: f.__name__
)
@pytest.mark.thin(2)
def test_check_loss(loss):
    testing.check_loss(loss)


@pytest.mark.thin(4)
def test_values_match_the_reference(loss, rng):
    for case in cases(loss, rng):
        wanted = oracle(case, reduction="none")
        # A term may be a small difference of numbers as large as the largest term: both sides round those.
        largest = np.max(np.abs(wanted), initial=0, where=np.isfinite(wanted))
        case.agree("value", case.terms(), wanted, testing.close(wanted) + 4 * np.spacing(largest))
        for reduction in loss.Class.fields["reduction"].samples[1:]:
            got, expected = case.value(reduction=reduction), oracle(case, reduction=reduction)
            case.agree(reduction, got, expected, 1e-13 * np.abs(wanted).sum())


@pytest.mark.thin(4)
def test_gradients_match_the_references_differences(loss, rng):
    for case in cases(loss, rng):
        for name in case.floating:
            at = case.moved_off_bounds(name, rng)
            at = at.with_arrays(**{n: a[:3, :5] for n, a in at.arrays.items()})
            got = at.term_gradients()[1][name]
            arguments = {**at.arrays, **at.options, "reduction": "none"}
            wanted = reference.gradient(getattr(reference, loss.__name__), arguments, name)
            if name == "var":  # the gradient passes the clamp, as in PyTorch
                free = at.arrays["var"] > at.options["eps"]
                got, wanted = np.where(free, got, 0), np.where(free, wanted, 0)
            at.agree(f"gradient by {name}", got, wanted, 1e-5 * np.abs(wanted) + 1e-6)


@pytest.mark.parametrize("dtype", sweep([np.float32, np.float16, "bfloat16"], np.float32, "bfloat16"))
@pytest.mark.thin(8)
def test_narrow_values_are_within_their_rounding_of_the_reference(loss, rng, dtype, request):
    if dtype == "bfloat16":
        dtype = request.getfixturevalue("bfloat16")
    narrow = testing.Case(loss, {}, testing.samples(loss, rng, dtype=dtype))
    wide = narrow.cast(np.float64)
    got, wanted = narrow.term_gradients()[0], oracle(wide, reduction="none")
    assert got.dtype == dtype
    # The arithmetic is float32, whose errors the largest intermediates decide: inputs and factors are below
    # 32 here. Then comes one rounding to the dtype.
    bound = 32 * 4 * 2.0**-23 + (32 * 2.0**-23 + float(testing.finfo(dtype).eps)) * np.abs(wanted)
    with np.errstate(over="ignore"):
        wide.agree(f"value in {dtype}", got, wanted.astype(dtype), bound)


def test_a_mean_of_many_narrow_terms_is_summed_in_float64():
    x = np.full(3_000_001, 0.1, np.float32)
    assert nl.mse_loss(x, np.zeros_like(x)) == pytest.approx(float(np.float32(0.1)) ** 2, rel=2e-7)
    half = x.astype(np.float16)
    assert nl.mse_loss(half, np.zeros_like(half)) == np.float16(float(np.float16(0.1)) ** 2)


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        ("float32", "float64", "float64"),
        ("float64", "float32", "float64"),
        ("float16", "float32", "float32"),
        ("float32", "int64", "float32"),
        ("float32", "uint8", "float32"),
        ("float16", "int8", "float16"),
        ("float64", "bool", "float64"),
    ],
)
def test_mixed_dtypes_promote_as_in_numpy(first, second, result, rng):
    x, y = rng.normal(size=20).astype(first), rng.integers(0, 2, 20).astype(second)
    value, gradient = nl.mse_loss.value_and_grad(x, y, reduction="none")
    assert (value.dtype, gradient.dtype) == (result, first)
    tolerance = 2 * float(np.finfo(result).eps)
    wanted = (x.astype(np.float64) - y) ** 2
    np.testing.assert_allclose(value.astype(np.float64), wanted, rtol=tolerance, atol=tolerance)
    assert nl.mse_loss(x, y).dtype == result


def test_the_two_halves_meet_in_float32(bfloat16):
    x, y = np.ones(4, np.float16), np.zeros(4, bfloat16)
    value, gradients = nl.mse_loss.value_and_grad(x, y, wrt=("input", "target"))
    assert value.dtype == np.float32
    assert [g.dtype for g in gradients] == [x.dtype, y.dtype]


def test_python_numbers_and_lists_are_arrays_that_promote_nothing():
    assert nl.l1_loss(np.array([1.0, 3.0], np.float32), [0, 1]) == 1.5
    assert nl.l1_loss(np.float32(2), 0.5).dtype == np.float32
    x, var = np.ones(3, np.float32), 2.0
    assert nl.gaussian_nll_loss(x, x, var).dtype == np.float32
    assert nl.l1_loss([1.0, 2.0], [0.0, 0.0]).dtype == np.float64


def test_big_endian_and_unaligned_inputs(rng):
    x, y = rng.normal(size=(2, 33))
    packed = np.zeros(33, np.dtype([("pad", "u1"), ("x", "f8")]))
    packed["x"] = x
    wanted = nl.huber_loss.value_and_grad(x, y)
    for other in (x.astype(">f8"), packed["x"]):
        value, gradient = nl.huber_loss.value_and_grad(other, y)
        np.testing.assert_allclose(value, wanted[0], rtol=1e-15)
        np.testing.assert_allclose(gradient, wanted[1], rtol=1e-15)


# ---- reductions and weights ------------------------------------------------------------------------

SMALLER = [(), (1,), (5,), (4, 1), (1, 5), (3, 1, 1), (3, 4, 5), (1, 1, 5)]


@pytest.mark.parametrize("shape", SMALLER, ids=str)
@pytest.mark.parametrize("name", ["mse_loss", "huber_loss"])
def test_weights_broadcast(name, shape, rng):
    loss, oracle = getattr(nl, name), getattr(reference, name)
    x, y = rng.normal(size=(2, 3, 4, 5))
    w, v = rng.uniform(0.5, 2, (2, *shape))
    for weights in ({"sample_weight": w}, {"weight": v}, {"sample_weight": w, "weight": v}):
        for reduction in ("none", "mean", "sum"):
            got = loss(x, y, reduction=reduction, **weights)
            np.testing.assert_allclose(got, oracle(x, y, reduction=reduction, **weights), rtol=1e-12)
        got = loss.grad(x, y, **weights)
        wanted = reference.gradient(oracle, {"input": x, "target": y, **weights}, "input")
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", HAVE_WEIGHT)
@pytest.mark.parametrize("shape", [(), (5,), (4, 1), (4, 5)], ids=str)
def test_gradient_by_weight(name, shape, rng):
    loss, oracle = getattr(nl, name), getattr(reference, name)
    arrays = testing.samples(loss, rng, (4, 5))
    w, s = rng.uniform(0.5, 2, shape), rng.uniform(0.5, 2, (4, 1))
    for options in ({}, {"sample_weight": s}, {"normalizer": 3.0}, {"reduction": "sum"}):
        arguments = {**arrays, "weight": w, **options}
        got = loss.grad(**arguments, wrt="weight")
        assert got.shape == shape
        wanted = reference.gradient(oracle, arguments, "weight")
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-8)


def test_a_gradient_by_a_wide_weight_is_as_exact(rng):
    """Its terms were computed in the other arrays' float32."""
    x, y = rng.normal(size=(2, 3, 4)).astype(np.float32)
    w = rng.uniform(0.2, 2, (3, 4))
    got = nl.mse_loss.grad(x, y, weight=w, wrt="weight")
    wanted = nl.mse_loss.grad(x.astype(float), y.astype(float), weight=w, wrt="weight")
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=1e-15)
    x, y, w = rng.uniform(0.2, 2, (3, 1)).astype(np.float16)
    assert nl.mse_loss.grad(x, y, weight=w, wrt="weight") == 0  # the mean is the term, whatever the weight


def test_gradient_by_weight_together_with_others(rng):
    x, y, w = rng.normal(size=(3, 4, 5))
    alone = nl.huber_loss.grad(x, y, weight=w, wrt="weight")
    value, (first, second) = nl.huber_loss.value_and_grad(x, y, weight=w, wrt=("weight", "input"))
    assert value == nl.huber_loss(x, y, weight=w)
    np.testing.assert_array_equal(first, alone)
    np.testing.assert_array_equal(second, nl.huber_loss.grad(x, y, weight=w))
    out = np.empty_like(w)
    assert nl.huber_loss.grad(x, y, weight=w, wrt="weight", out=out) is out
    np.testing.assert_array_equal(out, alone)


def test_a_broadcast_operands_gradient_is_summed(rng):
    x, y = rng.normal(size=(2, 3, 4, 5))
    target = rng.random((3, 4, 5))
    for name, third, base in [
        ("gaussian_nll_loss", "var", {"input": x, "target": y}),
        ("binary_cross_entropy_with_logits", "pos_weight", {"input": x, "target": target}),
    ]:
        loss, oracle = getattr(nl, name), getattr(reference, name)
        shapes = [(3, 4, 1), (3, 4), (), (3, 4, 5)] if third == "var" else [(5,), (1,), (4, 1), (), (3, 1, 1)]
        for shape, reduction in itertools.product(shapes, ("none", "mean")):
            arguments = {**base, third: rng.uniform(0.5, 2, shape), "reduction": reduction}
            value, gradient = loss.value_and_grad(**arguments, wrt=third)
            np.testing.assert_allclose(value, oracle(**arguments), rtol=1e-12)
            assert gradient.shape == shape
            wanted = reference.gradient(oracle, arguments, third)
            np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=1e-8)


def test_no_pos_weight_is_a_pos_weight_of_one(rng):
    x, y = rng.normal(size=(2, 3, 40))
    loss = nl.binary_cross_entropy_with_logits
    for got, wanted in zip(
        loss.value_and_grad(x, y, wrt=("input", "target"), reduction="none"),
        loss.value_and_grad(x, y, wrt=("input", "target"), reduction="none", pos_weight=np.ones(())),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-14)


@pytest.mark.parametrize("shape", [(), (6,), (6, 5), (2, 3, 4)], ids=str)
def test_batchmean_divides_by_rows(shape, rng):
    arrays = testing.samples(nl.kl_div, rng, shape)
    for more in ({}, {"normalizer": 4.0}, {"sample_weight": rng.uniform(0.5, 2, shape)}):
        arguments = {**arrays, "reduction": "batchmean", **more}
        value, gradient = nl.kl_div.value_and_grad(**arguments)
        np.testing.assert_allclose(value, reference.kl_div(**arguments), rtol=1e-12)
        wanted = reference.gradient(reference.kl_div, arguments, "input")
        np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=1e-9)


def test_weights_of_zero_hide_nan_and_infinity(rng):
    """Reduced and not, in every operand; with no weight at all the mean is NaN and the gradient zero."""
    x, y = rng.normal(size=(2, 40))
    w = np.where(np.arange(40) % 3 == 0, 0.0, 1.5)
    clean = nl.mse_loss.value_and_grad(x, y, sample_weight=w, wrt=("input", "target"))
    for bad in (np.nan, np.inf, -np.inf):
        spoiled = np.where(w == 0, bad, x), np.where(w == 0, -bad, y)
        value, gradients = nl.mse_loss.value_and_grad(*spoiled, sample_weight=w, wrt=("input", "target"))
        assert value == clean[0]
        np.testing.assert_array_equal(gradients, clean[1])
        terms, gradient = nl.mse_loss.value_and_grad(*spoiled, sample_weight=w, reduction="none")
        assert not terms[w == 0].any() and not gradient[w == 0].any()
    value, gradient = nl.mse_loss.value_and_grad(x, y, sample_weight=np.zeros(40), reduction="sum")
    assert value == 0 and not gradient.any()
    assert np.isnan(nl.mse_loss(x, y, sample_weight=np.zeros(40)))


@pytest.mark.thin(4)
def test_nan_spreads_to_its_own_term_alone(case):
    first = next(iter(case.arrays))
    if case.loss.Class.operands[first].domain is not None:
        pytest.skip("NaN is out of the domain")
    spoiled = case.arrays[first].copy()
    spoiled[0, 0] = np.nan
    wanted, _ = case.term_gradients()
    for got in (
        case.with_arrays(**{first: spoiled}).terms(),
        case.with_arrays(**{first: spoiled}).term_gradients()[0],
    ):
        nan = np.isnan(got)
        assert nan.flat[0] or case.loss.__name__ == "kl_div"  # whose target may be zero
        assert not nan.flat[1:].any()
        np.testing.assert_allclose(got.flat[1:], wanted.flat[1:], rtol=1e-12)


def test_grad_output(rng):
    x, y, up = rng.normal(size=(3, 30))
    gradient = nl.huber_loss.grad(x, y)
    for factor in (2.0**16, -1, np.float32(0.5), np.array(3.0)):
        scaled = nl.huber_loss.grad(x, y, grad_output=factor)
        np.testing.assert_allclose(scaled, gradient * float(factor), rtol=1e-15)
    terms = nl.huber_loss.grad(x, y, reduction="none")
    np.testing.assert_allclose(
        nl.huber_loss.grad(x, y, reduction="none", grad_output=up), terms * up, rtol=1e-15
    )
    # A loss scale keeps half-precision gradients from vanishing; it does not touch the value.
    tiny = np.full(4, 1e-4, np.float16)
    value, scaled = nl.mse_loss.value_and_grad(tiny, np.zeros_like(tiny), grad_output=1024.0)
    assert value == nl.mse_loss(tiny, np.zeros_like(tiny))
    np.testing.assert_allclose(scaled.astype(float), tiny.astype(float) * 512, rtol=1e-3)


def test_accumulated_micro_batches_are_the_whole_batch(rng):
    x, y = rng.normal(size=(2, 30, 4))
    value, gradient = nl.huber_loss.value_and_grad(x, y)
    parts = [
        nl.huber_loss.value_and_grad(x[k : k + 10], y[k : k + 10], normalizer=x.size) for k in (0, 10, 20)
    ]
    np.testing.assert_allclose(sum(v for v, _ in parts), value, rtol=1e-14)
    np.testing.assert_allclose(np.concatenate([g for _, g in parts]), gradient, rtol=1e-14)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
@pytest.mark.thin(6)
def test_empty(loss, shape, rng):
    arrays = testing.samples(loss, rng, shape)
    assert loss(**arrays, reduction="sum") == 0
    assert loss(**arrays, reduction="none").shape == shape
    value, gradient = loss.value_and_grad(**arrays)
    assert np.isnan(value)
    for g in gradient if isinstance(gradient, tuple) else (gradient,):
        assert g.shape == shape


# ---- forms and names -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", sweep(NAMES, "kl_div", "margin_ranking_loss"), indirect=True)
@pytest.mark.thin(2)
def test_wrt_gives_an_array_for_a_name_and_a_tuple_for_a_tuple(case):
    names = case.floating
    _, wanted = case.term_gradients()
    single = case.loss.grad(**case.arrays, reduction="none", wrt=names[-1])
    assert isinstance(single, np.ndarray)
    np.testing.assert_allclose(single, wanted[names[-1]], rtol=1e-13)
    one = case.loss.grad(**case.arrays, reduction="none", wrt=(names[-1],))
    assert isinstance(one, tuple) and len(one) == 1
    reversed_ = case.loss.value_and_grad(**case.arrays, reduction="none", wrt=names[::-1])[1]
    for name, gradient in zip(names[::-1], reversed_, strict=True):
        np.testing.assert_allclose(gradient, wanted[name], rtol=1e-13)


def test_default_wrt():
    x = np.ones(3)
    assert nl.huber_loss.grad(x, x).shape == (3,)
    first, second = nl.margin_ranking_loss.grad(x, 2 * x, x)
    np.testing.assert_array_equal(first, -second)
    assert nl.gaussian_nll_loss.grad(x, x, x).shape == (3,)


@pytest.mark.thin(4)
def test_class_equals_function(loss, rng):
    for case in cases(loss, rng):
        required = [case.arrays[n] for n in case.arrays if n not in loss.Class.fields]
        extra = {n: case.arrays[n] for n in case.arrays if n in loss.Class.fields}
        criterion = loss.Class(**case.options, **extra)
        for method in ("__call__", "value_and_grad", "grad"):
            got = getattr(criterion, method)(*required)
            wanted = getattr(case.loss, method)(*required, **case.options, **extra)
            for a, b in zip(np.atleast_1d(*_flat(got)), np.atleast_1d(*_flat(wanted)), strict=True):
                np.testing.assert_array_equal(a, b)


def _flat(result):
    """A result's arrays, whatever its nesting."""
    return [a for r in result for a in _flat(r)] if isinstance(result, tuple) else [result]


def test_pickle(loss, rng):
    arrays = testing.samples(loss, rng, (5,))
    assert pickle.loads(pickle.dumps(loss)) is loss
    criterion = loss.Class(reduction="sum")
    again = pickle.loads(pickle.dumps(criterion))
    assert repr(again) == repr(criterion)
    required = [arrays[n] for n in arrays if n not in loss.Class.fields]
    assert again(*required) == criterion(*required)


def test_repr_states_the_options(loss):
    assert "reduction='sum'" in repr(loss.Class(reduction="sum"))
    assert loss.Class.__name__ in repr(loss.Class())
    assert loss.__name__ in repr(loss)


def test_signatures_are_documented(loss):
    parameters = inspect.signature(loss).parameters
    assert list(parameters)[-3:] == ["sample_weight", "normalizer", "comm"]
    text = loss.__doc__
    for name in parameters:
        assert name in text, f"{name} is not in the docstring"
    for section in ("Parameters", "Raises", "References", "Examples", ".. math::"):
        assert section in text


# ---- the sample maker ------------------------------------------------------------------------------


def test_samples_vary_and_stay_in_their_domains(loss, rng):
    one, other = (testing.samples(loss, rng, (50, 50)) for _ in range(2))
    for name, operand in loss.Class.operands.items():
        a, b = one[name], other[name]
        assert a.shape == (50, 50) and a.dtype == np.float64
        assert not np.array_equal(a, b)
        assert len(np.unique(a)) >= 2
        assert (a >= operand.low).all() and (a <= operand.high).all()
    assert testing.samples(loss, rng, (), np.float32)[name].dtype == np.float32


def test_samples_reach_the_bounds(rng):
    def drawn(loss, name):
        return testing.samples(loss, rng, (500,))[name]

    assert {0.0, 1.0} <= set(drawn(nl.binary_cross_entropy, "target"))
    assert {0.0, 1.0} <= set(drawn(nl.kl_div, "target"))
    assert 0.0 in drawn(nl.gaussian_nll_loss, "var")
    assert {0.0, 1.0, 2.0} <= set(drawn(nl.poisson_nll_loss, "target"))
    assert {-1.0, 1.0} == set(drawn(nl.hinge_embedding_loss, "target"))
    assert drawn(nl.l1_loss, "input").min() < 0 < drawn(nl.l1_loss, "input").max()


@pytest.mark.parametrize(
    ("function", "branch"),
    [
        (nl.smooth_l1_loss, lambda input, target, beta: abs(input - target) < beta),
        (nl.huber_loss, lambda input, target, delta: abs(input - target) <= delta),
        (nl.hinge_embedding_loss, lambda input, target, margin: (target == -1) & (input < margin)),
        (nl.margin_ranking_loss, lambda input1, input2, target, margin: target * (input1 - input2) < margin),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_samples_reach_both_branches(function, branch, rng):
    arrays = testing.samples(function, rng)
    for options in testing.combinations(function):
        share = np.mean(branch(**arrays, **options))
        degenerate = options.get("beta") == 0
        assert degenerate or 0.02 < share < 0.98, options


def test_option_samples_are_accepted_and_reach_the_default(loss):
    for name, option in loss.Class.fields.items():
        if not option.array:
            assert option.default in option.samples
            assert len(set(option.samples)) >= 2
            for value in option.samples:
                assert option.check("loss", name, value) == value


# ---- check_loss finds what is wrong ----------------------------------------------------------------


class WrongSlope(nl.ElementwiseLoss):
    def value(input, target):
        d = input - target
        return d * d

    def slope_input(input, target):
        return 2.001 * (input - target)


class WrongGradientOfTarget(nl.ElementwiseLoss):
    def value(input, target):
        d = input - target
        return d * d

    def slope_target(input, target):
        return input - target


class NowhereSmooth(nl.ElementwiseLoss):
    def value(input, target):
        return nl.math.sin(1e9 * (input - target))


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (WrongSlope, r"wrong_slope\(\): gradient by input at \(\d+, \d+\): got .*, wanted .*, with {'input'"),
        (WrongGradientOfTarget, "gradient by target"),
        (NowhereSmooth, "kinks"),
    ],
)
@pytest.mark.thin(3)
def test_check_loss_finds(definition, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_loss(definition)


def test_what_was_worked_out_is_forgotten_when_it_becomes_too_much(monkeypatch):
    monkeypatch.setattr(Memo, "MOST", 8)
    x = np.ones(3)
    calls = [
        (nl.huber_loss, (x, 99 * x), "delta"),
        (nl.multi_margin_loss, (np.ones((1, 3)), np.zeros(1, int)), "margin"),
        (nl.triplet_margin_loss, (np.ones((1, 3)),) * 3, "margin"),
    ]
    for loss, arrays, option in calls:
        values = [loss(*arrays, **{option: 1 + k}) for k in range(30)]
        assert len(set(values)) > 1  # an option's value counts
        (binding,) = (b for key, b in loss._bindings.items() if key == ("value", len(arrays), option))
        assert len(binding.prepared) <= 8
    assert len(nl.huber_loss.Class._made.settled) <= 8


def test_combinations_are_of_every_loss():
    for loss in registry.values():
        first = next(testing.combinations(loss))
        assert first == {n: loss.Class.fields[n].default for n in first}


@pytest.mark.parametrize("dtype", sweep(["float32", "float64"], "float32"))
@pytest.mark.more
def test_no_digits_are_lost_in_between(dtype):
    """Hand-worked: derivatives and values of which an ordinary step is infinite, or cancels."""
    info = np.finfo(dtype)
    x, one = np.zeros(1, dtype), np.ones(1, dtype)
    slope = nl.kl_div.grad(x, x + info.smallest_subnormal, wrt="target")
    assert slope == pytest.approx(np.log(float(info.smallest_subnormal)) + 1, rel=1e-6)
    small = x + info.dtype.type(1e-10)
    assert nl.binary_cross_entropy_with_logits.grad(small, x, wrt="target") == -small
    of_two = nl.binary_cross_entropy_with_logits.grad(small, x, pos_weight=2 * one, wrt="target")
    assert of_two == pytest.approx(np.log(2), rel=1e-6)
    assert nl.multilabel_soft_margin_loss.grad(small, x, wrt="target") == -small
    large = x + info.max / 4
    assert nl.gaussian_nll_loss(large, x, large) == pytest.approx(float(large[0]) / 2)
    assert nl.gaussian_nll_loss.grad(large, x, large) == one
    far = np.full((1, 2), info.max / 4, dtype)
    assert nl.triplet_margin_loss(far, -far, -far, p=np.inf) == 1
    far /= 4
    assert nl.triplet_margin_with_distance_loss(far, -far, -far, distance_function="manhattan") == 1

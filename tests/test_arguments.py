"""The kinds of options and operands by themselves: checks, samples, bad examples."""

import decimal
import enum
import fractions
import math

import numpy as np
import pytest

import numbaloss as nl
from numbaloss import arguments

KINDS = {
    "positive": arguments.positive(1.0),
    "non_negative": arguments.non_negative(1.0),
    "real": arguments.real(1.0),
    "between": arguments.between(0.5, 0.0, 1.0),
    "flag": arguments.flag(True),
    "choice": arguments.choice(1, (1, 2)),
    "reduction": arguments.reduction("batchmean"),
}
OPERANDS = {
    "scores": arguments.scores(),
    "like_scores": arguments.like_scores(),
    "probabilities": arguments.probabilities(),
    "predicted probabilities": arguments.probabilities(model=True),
    "soft_labels": arguments.soft_labels(),
    "signs": arguments.signs(),
    "counts": arguments.counts(),
    "rates": arguments.rates(),
    "variances": arguments.variances(),
    "positive_weights": arguments.positive_weights(),
    "log_probabilities": arguments.log_probabilities(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_samples_pass_and_bad_examples_do_not(kind):
    option = KINDS[kind]
    assert option.check("loss", "name", option.default) == option.default
    for value in option.samples:
        assert option.check("loss", "name", value) == value
    assert option.bad
    for value, error, message in option.bad:
        with pytest.raises(error, match="^loss: name must be") as caught:
            option.check("loss", "name", value)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [2, 2.0, np.float32(2), np.int8(2), np.array(2.0), fractions.Fraction(2)],
    ids=lambda v: type(v).__name__,
)
def test_numbers_of_any_kind(value):
    checked = arguments.positive(1.0).check("loss", "name", value)
    assert checked == 2 and type(checked) is float


@pytest.mark.parametrize(
    "value",
    [True, np.True_, "2", None, 2j, [2.0], np.ones(1), decimal.Decimal(2)],
    ids=lambda v: type(v).__name__,
)
def test_not_numbers(value):
    with pytest.raises(TypeError, match="^loss: name must be a number, got"):
        arguments.positive(1.0).check("loss", "name", value)


def test_bounds_belong_to_their_intervals():
    between = arguments.between(0.5, 0.0, 1.0)
    assert [between.check("loss", "p", p) for p in (0, 1)] == [0.0, 1.0]
    for p in (np.nextafter(0, -1), np.nextafter(1, 2), math.inf, math.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            between.check("loss", "p", p)
    assert arguments.positive(1.0).check("loss", "x", 5e-324) == 5e-324
    assert arguments.non_negative(1.0).check("loss", "x", -0.0) == 0.0


def test_flags():
    check = arguments.flag(True).check
    for value in (True, 1, np.True_):
        assert check("loss", "full", value) is True
    for value in (2, 1.0, "True", None, [True]):
        with pytest.raises(TypeError, match="^loss: full must be True or False"):
            check("loss", "full", value)


class Reduction(enum.StrEnum):
    SUM = "sum"


Plain = enum.Enum("Plain", {"SUM": "sum"}, type=str)  # whose str() is "Plain.SUM"


@pytest.mark.parametrize("value", ["sum", np.str_("sum"), Reduction.SUM, Plain.SUM])
@pytest.mark.thin(4)
def test_strings_of_any_kind(value):
    """Whatever was called before: an equal string finds no other's answer."""
    x = np.array([1.0, 2.0])
    for reduction in (value, "sum", value):
        assert type(KINDS["reduction"].check("loss", "reduction", reduction)) is str
        assert nl.mse_loss(x, 0 * x, reduction=reduction) == 5.0
        assert nl.MSELoss(reduction=reduction).value_and_grad(x, 0 * x, wrt=np.str_("input"))[0] == 5.0
    vectors = np.eye(3)
    given = vectors, vectors[::-1], -vectors
    named = nl.triplet_margin_with_distance_loss(*given, distance_function=np.str_("cosine"))
    assert named == nl.triplet_margin_with_distance_loss(*given, distance_function="cosine")


def test_no_flag_is_a_number_whatever_was_called_before():
    x = np.array([1.0, 2.0])
    scores, labels = np.eye(2), np.array([0, 1])
    assert nl.huber_loss(x, x, delta=1.0) == 0 and nl.multi_margin_loss(scores, labels, p=1) == 0
    for value in (True, np.True_):
        with pytest.raises(TypeError, match="huber_loss: delta must be a number"):
            nl.huber_loss(x, x, delta=value)
        with pytest.raises(ValueError, match="multi_margin_loss: p must be one of 1, 2"):
            nl.multi_margin_loss(scores, labels, p=value)


def test_numbers_beyond_float64():
    x, huge = np.array([1.0, 2.0]), 10**400
    for said in ({"normalizer": huge}, {"grad_output": -huge}):
        with pytest.raises(
            ValueError, match=f"mse_loss: {next(iter(said))} must be a number that float64 holds"
        ):
            nl.mse_loss.value_and_grad(x, x, **said)
    with pytest.raises(ValueError, match="huber_loss: delta must be a number that float64 holds"):
        nl.huber_loss(x, x, delta=huge)
    with pytest.raises(TypeError, match="mse_loss: sample_weight must be float64.*got object"):
        nl.mse_loss(x, x, sample_weight=huge)
    with pytest.raises(ValueError, match="mse_loss: weight is no array of numbers: .*inhomogeneous"):
        nl.mse_loss(x, x, weight=[[1.0], 2.0])


@pytest.mark.parametrize(
    ("dtype", "x", "more"),
    [
        (np.float16, 1e4, {}),
        (
            np.float16,
            200.0,
            {"sample_weight": np.array([1.0, 60_000.0, 60_000.0], np.float16), "reduction": "sum"},
        ),
        (np.float32, 1e19, {"weight": np.array([1e30, 1.0, 1.0], np.float32), "wrt": ("input", "weight")}),
        (
            np.float32,
            1.0,
            {"grad_output": 1e300, "weight": np.ones(3, np.float32), "wrt": ("input", "weight")},
        ),
    ],
)
def test_results_beyond_a_dtype_are_infinite_and_nothing_warns(dtype, x, more):
    x = np.array([x, x, 2], dtype)
    for _ in range(2):  # the call that is worked out, and one like it
        value, gradients = nl.mse_loss.value_and_grad(x, 0 * x, **more)
        assert np.isinf(value) or all(np.isinf(g).any() for g in gradients)
        assert type(value) is dtype


def test_choices():
    check = arguments.choice(1, (1, 2)).check
    assert type(check("loss", "p", 2.0)) is int
    for value in (3, "1", None, [1], np.ones(2)):
        with pytest.raises(ValueError, match="^loss: p must be one of 1, 2, got"):
            check("loss", "p", value)
    with pytest.raises(ValueError, match="'none', 'mean', 'sum', got 'batchmean'"):
        arguments.reduction().check("loss", "reduction", "batchmean")


@pytest.mark.parametrize("kind", OPERANDS)
def test_operands_draw_varied_float64_samples_of_their_domain(kind, rng):
    operand = OPERANDS[kind]
    for shape in ((), (0,), (3, 400)):
        drawn = np.asarray(operand.draw(rng, shape))
        assert drawn.shape == shape and drawn.dtype == np.float64
        assert np.isfinite(drawn).all()
        assert (drawn >= operand.low).all() and (drawn <= operand.high).all()
    assert len(np.unique(drawn)) >= 2
    again = np.random.default_rng(1), np.random.default_rng(1)
    np.testing.assert_array_equal(*(operand.draw(r, (5,)) for r in again))


def test_domains():
    assert arguments.scores().domain is None
    assert arguments.probabilities().domain == (0.0, 1.0, False)
    assert arguments.variances().domain == (0.0, math.inf, True)


@pytest.mark.parametrize(
    "interval, inside, outside, text",
    [
        (arguments.Interval(), (-math.inf, 0.0, math.inf), (math.nan,), "a number"),
        (arguments.Interval(0.0), (0.0, math.inf), (-5e-324,), ">= 0"),
        (arguments.Interval(0.0, open_low=True), (5e-324,), (0.0,), "> 0"),
        (arguments.Interval(0.0, 1.0, open_high=True), (0.0,), (1.0,), "in [0, 1)"),
        (arguments.Interval(0.0, 1.0, open_low=True), (1.0,), (0.0,), "in (0, 1]"),
    ],
)
def test_intervals(interval, inside, outside, text):
    assert all(x in interval for x in inside)
    assert not any(x in interval for x in (*outside, *interval.bad))
    assert str(interval) == text

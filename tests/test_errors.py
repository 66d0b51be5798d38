"""Bad input: a message that names the loss, the argument, what it got and what it wanted."""

import math
import re
from importlib.util import find_spec

import numpy as np
import pytest

import numbaloss as nl
from numbaloss import testing
from numbaloss.loss import registry

BAD_OPTIONS = [
    (function, name, *bad)
    for function in registry.values()
    if issubclass(function.Class, nl.ElementwiseLoss)
    for name, option in function.Class.fields.items()
    for bad in option.bad
]


@pytest.mark.parametrize(
    ("function", "name", "value", "error", "message"),
    BAD_OPTIONS,
    ids=[f"{f.__name__}-{n}-{v}" for f, n, v, *_ in BAD_OPTIONS],
)
def test_declared_bad_options(function, name, value, error, message, rng):
    """By the function in each of its modes, and by the class when it is made."""
    arrays = testing.samples(function, rng, (5,))
    got = re.escape(str(value))
    for call in (function, function.grad, function.value_and_grad):
        with pytest.raises(
            error, match=f"^{function.__name__}: {name} must be .*{re.escape(message)}.*{got}"
        ):
            call(**arrays, **{name: value})
    with pytest.raises(
        error, match=f"^{function.Class.__name__}: {name} must be .*{re.escape(message)}.*{got}"
    ):
        function.Class(**{name: value})


def test_every_option_declares_what_is_bad(loss):
    for name, option in loss.Class.fields.items():
        assert option.array or option.bad, name


def test_shapes_must_match(loss, rng):
    arrays = testing.samples(loss, rng, (6, 4))
    first, *others = [n for n in arrays if n in loss.Class._required]
    for name in others:
        if loss.Class.operands[name].broadcast:
            continue
        for shape in [(6, 1), (1, 4), (4,), (4, 6), (24,), (), (6, 4, 1), (0, 4)]:
            wanted = (
                rf"^{loss.__name__}: {name} must have {first}'s shape \(6, 4\), got {re.escape(str(shape))}"
            )
            for call in (loss, loss.grad, loss.value_and_grad):
                with pytest.raises(ValueError, match=wanted):
                    call(**{**arrays, name: np.ones(shape)})


@pytest.mark.parametrize("shape", [(3,), (6,), (4, 1), (6, 4, 1), (1, 6, 4), (0,)], ids=str)
def test_weights_must_broadcast(shape):
    x, y = np.ones((2, 6, 4))
    for name in ("sample_weight", "weight"):
        with pytest.raises(ValueError, match=rf"^mse_loss: {name} of shape {re.escape(str(shape))}"):
            nl.mse_loss(x, y, **{name: np.ones(shape)})
    with pytest.raises(ValueError, match="^binary_cross_entropy_with_logits: pos_weight of shape"):
        nl.binary_cross_entropy_with_logits(x, y, pos_weight=np.ones(shape))


@pytest.mark.parametrize("shape", [(4,), (1, 1), (3,), (6, 4, 1)], ids=str)
def test_var_must_fit(shape):
    x, y = np.ones((2, 6, 4))
    with pytest.raises(ValueError, match="^gaussian_nll_loss: var of shape"):
        nl.gaussian_nll_loss(x, y, np.ones(shape))


@pytest.mark.parametrize("shape", [(4,), (3,), (6,), (6, 4, 1), (2, 1)], ids=str)
def test_gaussian_target_must_fit(shape):
    x, var = np.ones((2, 6, 4))
    with pytest.raises(ValueError, match="^gaussian_nll_loss: target of shape"):
        nl.gaussian_nll_loss(x, np.ones(shape), var)


DOMAINS = [
    (nl.binary_cross_entropy, "input", [-0.1, 1.1, math.inf, math.nan], "in [0, 1]"),
    (nl.binary_cross_entropy, "target", [-1e-9, 2.0, -math.inf, math.nan], "in [0, 1]"),
    (nl.gaussian_nll_loss, "var", [-1e-9, -math.inf], ">= 0"),
]


@pytest.mark.parametrize(
    ("function", "name", "values", "wanted"), DOMAINS, ids=[f"{d[0].__name__}-{d[1]}" for d in DOMAINS]
)
@pytest.mark.thin(3)
def test_out_of_domain(function, name, values, wanted, rng):
    for shape, index in [((), ""), ((9,), "[7]"), ((5, 4), "[3, 1]")]:
        for value in values:
            arrays = testing.samples(function, rng, shape)
            spoiled = np.array(arrays[name])
            spoiled[tuple(map(int, re.findall(r"\d+", index)))] = value
            match = re.escape(f"{function.__name__}: {name} must be {wanted}, got {name}{index} = {value:g}")
            for call in (function, function.grad, function.value_and_grad):
                for more in ({}, {"reduction": "none"}):
                    with pytest.raises(ValueError, match=f"^{match}$"):
                        call(**{**arrays, name: spoiled}, **more)


@pytest.mark.more
def test_out_of_domain_leaves_the_input_as_it_was(rng):
    for function in (nl.binary_cross_entropy, nl.gaussian_nll_loss):
        arrays = testing.samples(function, rng, (40,))
        name = "target" if function is nl.binary_cross_entropy else "var"
        arrays[name][30] = -1.0
        before = arrays["input"].copy()
        for more in ({}, {"reduction": "none"}, {"sample_weight": np.ones(40)}):
            with pytest.raises(ValueError, match=name):
                function.value_and_grad(**arrays, out=arrays["input"], **more)
            np.testing.assert_array_equal(arrays["input"], before)


def test_a_weight_of_zero_hides_what_is_out_of_the_domain():
    x = np.array([0.5, np.nan, 7.0])
    w = np.array([2.0, 0.0, 0.0])
    assert nl.binary_cross_entropy(x, x, sample_weight=w) == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match=r"input\[2\] = 7"):
        nl.binary_cross_entropy(x, np.zeros(3), sample_weight=np.array([1.0, 0.0, 1e-300]))


@pytest.mark.parametrize(
    ("wrt", "error", "message"),
    [
        ("inputs", ValueError, r"huber_loss: wrt must be among 'input', 'target'.*, got 'inputs'"),
        (("input", "beta"), ValueError, "huber_loss: wrt must be among .*, got 'beta'"),
        (("input", "input"), ValueError, "huber_loss: wrt names an argument twice"),
        ((), TypeError, "huber_loss: wrt must be a name or a tuple of names, got "),
        (3, TypeError, "huber_loss: wrt must be a name or a tuple of names, got 3"),
        (("input", 0), TypeError, "huber_loss: wrt must be a name or a tuple of names"),
        ("weight", ValueError, "huber_loss: wrt names 'weight', which is not given"),
        ("sample_weight", ValueError, "huber_loss: wrt must be among"),
    ],
)
def test_bad_wrt(wrt, error, message):
    x = np.ones(3)
    for call in (nl.huber_loss.grad, nl.huber_loss.value_and_grad, nl.HuberLoss().grad):
        with pytest.raises(error, match=message):
            call(x, x, wrt=wrt)


def test_the_curvature_takes_one_name():
    x = np.ones(3)
    with pytest.raises(ValueError, match="huber_loss: value_grad_hess takes one name in wrt"):
        nl.huber_loss.value_grad_hess(x, x, wrt=("input", "target"))
    with pytest.raises(ValueError, match="margin_ranking_loss: value_grad_hess takes one name in wrt"):
        nl.margin_ranking_loss.value_grad_hess(x, x, x)


@pytest.mark.parametrize("value", [0, 0.0, -1, math.nan], ids=str)
def test_bad_normalizer(value):
    with pytest.raises(ValueError, match=f"^mse_loss: normalizer must be > 0, got {float(value)}"):
        nl.mse_loss(np.ones(3), np.ones(3), normalizer=value)


@pytest.mark.parametrize("value", ["3", [3.0], np.ones(3), True], ids=str)
def test_normalizer_must_be_a_number(value):
    with pytest.raises(TypeError, match="^mse_loss: normalizer must be a number, got "):
        nl.mse_loss(np.ones(3), np.ones(3), normalizer=value)


@pytest.mark.parametrize(
    ("value", "reduction", "error", "message"),
    [
        (np.ones(3), "mean", ValueError, "grad_output must be a number with reduction='mean', got an array"),
        (np.ones(4), "none", ValueError, r"grad_output must have the value's shape \(3,\), got \(4,\)"),
        (
            np.ones((3, 1)),
            "none",
            ValueError,
            r"grad_output must have the value's shape \(3,\), got \(3, 1\)",
        ),
        (
            np.ones(3, int),
            "none",
            TypeError,
            "grad_output must be float64, float32, float16 or bfloat16, got int64",
        ),
        ("1", "mean", TypeError, "grad_output must be a number, got '1'"),
        (1j, "mean", TypeError, "grad_output must be a number, got 1j"),
    ],
)
def test_bad_grad_output(value, reduction, error, message):
    with pytest.raises(error, match=f"^mse_loss: {message}"):
        nl.mse_loss.grad(np.ones(3), np.ones(3), reduction=reduction, grad_output=value)


@pytest.mark.parametrize("dtype", ["int64", "complex128", "bool", "U3", "O", "datetime64[s]", "longdouble"])
def test_dtype_of_what_is_differentiated(dtype):
    x = np.zeros(3, dtype)
    message = "^mse_loss: input must be float64, float32, float16 or bfloat16, got "
    for call in (nl.mse_loss, nl.mse_loss.grad):
        with pytest.raises(TypeError, match=message):
            call(x, np.zeros(3))
    with pytest.raises(TypeError, match=message.replace("input", "target")):
        nl.mse_loss.grad(np.zeros(3), x, wrt="target")


@pytest.mark.parametrize("dtype", ["complex128", "U3", "O", "datetime64[s]"])
def test_dtype_of_other_arrays(dtype):
    x, bad = np.zeros(3), np.zeros(3, dtype)
    for name in ("target", "weight", "sample_weight"):
        arguments = {"input": x, "target": x, name: bad}
        with pytest.raises(TypeError, match=f"^mse_loss: {name} must be float64, float32, .*got "):
            nl.mse_loss(**arguments)


def test_arrays_of_other_libraries(torch):
    x = np.zeros(3)
    with pytest.raises(TypeError, match=r"mse_loss: target \(torch.Tensor\) .*; pass tensor.detach\(\)"):
        nl.mse_loss(x, torch.zeros(3, requires_grad=True))
    with pytest.raises(TypeError, match="mse_loss: target is a masked array"):
        nl.mse_loss(x, np.ma.masked_array(x, [True, False, False]))
    with pytest.raises(TypeError, match="mse_loss: target must be a NumPy or CuPy array, got dict"):
        nl.mse_loss(x, {})
    for name in ("input", "target"):
        with pytest.raises(TypeError, match=f"mse_loss: {name} must be an array, got None"):
            nl.mse_loss(**{"input": x, "target": x, name: None})


class OnDevice:
    __cuda_array_interface__ = {"shape": (3,), "typestr": "<f8", "data": (0, False), "version": 3}


def test_arrays_on_different_devices():
    error, message = TypeError, "mse_loss: .*(device|CUDA)"
    if find_spec("numba_cuda") is None:
        error, message = ImportError, "needs numba-cuda: pip install"
    for arguments in ((np.zeros(3), OnDevice()), (OnDevice(), np.zeros(3))):
        with pytest.raises(error, match=message):
            nl.mse_loss(*arguments)


# ---- calls that Python itself would refuse ---------------------------------------------------------


def test_calls_of_the_function():
    x = np.ones(3)
    for call in (nl.huber_loss, nl.huber_loss.grad):
        with pytest.raises(TypeError, match=r"huber_loss\(\) got an unexpected keyword argument 'beta'"):
            call(x, x, beta=1.0)
        with pytest.raises(TypeError, match=r"huber_loss\(\) missing required argument: target"):
            call(x)
        with pytest.raises(TypeError, match=r"huber_loss\(\) missing required arguments: input, target"):
            call()
        with pytest.raises(TypeError, match=r"huber_loss\(\) got multiple values for argument 'target'"):
            call(x, x, target=x)
        with pytest.raises(
            TypeError, match=r"huber_loss\(\) takes at most 5 positional arguments but 6 were given"
        ):
            call(x, x, "mean", 1.0, None, 3)
    for name in ("wrt", "out", "grad_output"):
        with pytest.raises(
            TypeError, match=rf"huber_loss\(\) got an unexpected keyword argument '{name}'.*gradient"
        ):
            nl.huber_loss(x, x, **{name: None})


def test_calls_of_the_class():
    x = np.ones(3)
    with pytest.raises(TypeError, match=r"HuberLoss\(\) got an unexpected keyword argument 'beta'"):
        nl.HuberLoss(beta=1.0)
    with pytest.raises(TypeError, match=r"HuberLoss\(\) got an unexpected keyword argument 'weight'"):
        nl.HuberLoss(weight=x)  # PyTorch's class has none; its function does
    with pytest.raises(TypeError, match=r"HuberLoss\(\) takes 2 options, got 3 positional arguments"):
        nl.HuberLoss("mean", 1.0, 2.0)
    with pytest.raises(TypeError, match=r"HuberLoss\(\) got multiple values for argument 'reduction'"):
        nl.HuberLoss("mean", reduction="sum")
    with pytest.raises(TypeError, match="GaussianNLLLoss"):
        nl.GaussianNLLLoss(True)
    criterion = nl.HuberLoss()
    with pytest.raises(TypeError, match="HuberLoss: takes 2 arrays by position but 3 were given"):
        criterion(x, x, 1.0)
    with pytest.raises(TypeError, match="missing required argument: target"):
        criterion(x)
    with pytest.raises(AttributeError, match="'HuberLoss' object has no attribute 'beta'"):
        _ = criterion.beta


def test_an_error_leaves_the_loss_usable():
    """A call that failed, and its way of calling, are not remembered as anything else."""
    x = np.ones(3)
    for _ in range(2):
        with pytest.raises(ValueError, match="delta"):
            nl.huber_loss(x, x, delta=-1.0)
        assert nl.huber_loss(x, x, delta=1.0) == 0
        with pytest.raises(ValueError, match="shape"):
            nl.huber_loss(x, np.ones(4), delta=1.0)
        with pytest.raises(ValueError, match="'mean'"):
            nl.huber_loss(x, x, reduction=["mean"])

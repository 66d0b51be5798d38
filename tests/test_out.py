"""`out` of another dtype and layout than its argument's, and `accumulate`, of every family."""

import numpy as np
import pytest

import numbaloss as nl
from numbaloss import testing

# One loss of each family, and each that is computed in its own way.
LOSSES = {
    "mse_loss": {},
    "gaussian_nll_loss": {"wrt": ("input", "var")},
    "cross_entropy": {},
    "nll_loss": {},
    "multi_margin_loss": {},
    "multilabel_margin_loss": {},
    "multilabel_soft_margin_loss": {"reduction": "none"},
    "cosine_embedding_loss": {},
    "triplet_margin_loss": {"wrt": ("negative", "anchor")},
    "ctc_loss": {},
    "linear_cross_entropy": {"wrt": ("linear_weight", "input")},
}
LAYOUTS = {
    "C": lambda shape, dtype: np.full(shape, 7, dtype),
    "Fortran": lambda shape, dtype: np.full(shape, 7, dtype, order="F"),
    "strided": lambda shape, dtype: np.full((*shape, 2), 7, dtype)[::-1, ..., 1],
}


def drawn(name, rng):
    if name == "ctc_loss":
        scores = rng.normal(size=(6, 3, 5))
        log_probs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        return {
            "log_probs": log_probs,
            "targets": rng.integers(1, 5, (3, 2)),
            "input_lengths": np.array([6, 5, 6]),
            "target_lengths": np.array([2, 1, 2]),
        }
    return testing.samples(getattr(nl, name), rng, (7, 5))


def rooms_of(gradients, layout, dtype):
    return tuple(LAYOUTS[layout](g.shape, dtype) for g in gradients)


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.thin(6)
def test_a_narrower_out_has_the_rounded_gradient(name, layout, rng, bfloat16):
    loss, arrays, options = getattr(nl, name), drawn(name, rng), LOSSES[name]
    value, gradients = loss.value_and_grad(**arrays, **options)
    single, gradients = not isinstance(gradients, tuple), as_tuple(gradients)
    for dtype in (np.float32, np.float16, bfloat16):
        for _ in range(2):  # the call that is worked out, and the prepared one
            rooms = rooms_of(gradients, layout, dtype)
            out = rooms[0] if single else rooms
            again, given = loss.value_and_grad(**arrays, **options, out=out)
            np.testing.assert_array_equal(again, value)
            assert all(a is b for a, b in zip(as_tuple(given), rooms, strict=True))
            for room, gradient in zip(rooms, gradients, strict=True):
                with np.errstate(over="ignore"):
                    wanted = gradient.astype(np.float32).astype(dtype)
                np.testing.assert_array_equal(room.astype(np.float64), wanted.astype(np.float64))


@pytest.mark.parametrize("name", ["huber_loss", "cross_entropy", "nll_loss", "multi_margin_loss"])
def test_a_narrower_curvature_beside_the_gradient(name, rng):
    loss, arrays = getattr(nl, name), drawn(name, rng)
    if name == "multi_margin_loss":
        arrays["p"] = 2
    value, gradient, curvature = loss.value_grad_hess(**arrays, reduction="sum")
    rooms = np.zeros(gradient.shape, np.float16), np.zeros(gradient.shape, np.float32, order="F")
    again, *_ = loss.value_grad_hess(**arrays, reduction="sum", out=rooms)
    assert again == value
    np.testing.assert_array_equal(rooms[0], gradient.astype(np.float16))
    np.testing.assert_array_equal(rooms[1], curvature.astype(np.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.thin(6)
def test_accumulate_adds(name, layout, rng):
    loss, arrays, options = getattr(nl, name), drawn(name, rng), LOSSES[name]
    value, gradients = loss.value_and_grad(**arrays, **options)
    single, gradients = not isinstance(gradients, tuple), as_tuple(gradients)
    for dtype in (np.float64, np.float32, np.float16):
        rooms = rooms_of(gradients, layout, dtype)
        out = rooms[0] if single else rooms
        for _ in range(2):
            assert np.array_equal(
                loss.value_and_grad(**arrays, **options, out=out, accumulate=True)[0], value
            )
        for room, gradient in zip(rooms, gradients, strict=True):
            with np.errstate(over="ignore"):
                wanted = ((7 + gradient).astype(dtype) + gradient).astype(dtype)
            np.testing.assert_array_equal(room, wanted)


def test_accumulate_is_prepared(rng):
    """Later calls of a signature go straight to the kernel; what does not fit is refused as at first."""
    x, y, kept = rng.normal(size=(3, 8, 5))
    for rows in (8, 3, 8):
        a, b, room = x[:rows].copy(), y[:rows].copy(), kept[:rows].copy()
        value, found = nl.mse_loss.value_and_grad(a, b, out=room, accumulate=True)
        assert found is room and value == nl.mse_loss(a, b)
        np.testing.assert_array_equal(room, kept[:rows] + nl.mse_loss.grad(a, b))
    with pytest.raises(ValueError, match="out for input must have shape"):
        nl.mse_loss.value_and_grad(x.copy(), y.copy(), out=kept[:3].copy(), accumulate=True)
    memory = np.zeros(80)
    a, b = memory[:40].reshape(8, 5), memory[20:60].reshape(8, 5)
    with pytest.raises(ValueError, match="out for input overlaps"):
        nl.mse_loss.value_and_grad(a, y.copy(), out=b, accumulate=True)
    wanted = x + nl.mse_loss.grad(x, y)
    nl.mse_loss.value_and_grad(x, y, out=x, accumulate=True)  # of the argument itself
    np.testing.assert_array_equal(x, wanted)


def test_accumulate_over_micro_batches(rng):
    x, y = rng.normal(size=(30, 4)), rng.integers(0, 4, 30)
    w, whole = rng.normal(size=(4, 4)), nl.linear_cross_entropy.grad
    sum_of = np.zeros_like(w)
    for k in range(0, 30, 10):
        part = slice(k, k + 10)
        nl.linear_cross_entropy.grad(
            x[part], w, y[part], wrt="linear_weight", normalizer=30, out=sum_of, accumulate=True
        )
    np.testing.assert_allclose(sum_of, whole(x, w, y, wrt="linear_weight"), rtol=1e-12)


def test_accumulate_over_the_argument_itself(rng):
    x, y = rng.normal(size=20), rng.normal(size=20)
    wanted = x + nl.mse_loss.grad(x, y, grad_output=-0.5)
    nl.mse_loss.grad(x, y, grad_output=-0.5, out=x, accumulate=True)
    np.testing.assert_array_equal(x, wanted)


def test_accumulate_of_a_curvature(rng):
    x, y = rng.normal(size=(2, 9))
    rooms = np.ones(9), np.ones(9)
    _, gradient, curvature = nl.mse_loss.value_grad_hess(x, y)
    nl.mse_loss.value_grad_hess(x, y, out=rooms, accumulate=True)
    np.testing.assert_array_equal(rooms, (1 + gradient, 1 + curvature))


def test_a_call_that_raises_adds_nothing():
    room = np.ones(2)
    with pytest.raises(ValueError, match="input must be in"):
        nl.binary_cross_entropy.grad(np.array([0.5, 2.0]), np.ones(2), out=room, accumulate=True)
    assert (room == 1).all()


@pytest.mark.parametrize(
    ("dtype", "room", "said"),
    [
        (np.float32, np.float64, "float32 or a narrower float, got float64"),
        (np.float64, np.int32, "float64 or a narrower float, got int32"),
        (np.float16, np.float32, "float16 or a narrower float, got float32"),
        (np.float64, ">f4", "float64 or a narrower float, got"),
    ],
)
def test_dtypes_that_are_refused(dtype, room, said):
    x = np.ones(3, dtype)
    with pytest.raises(TypeError, match=f"^mse_loss: out for input must be {said}"):
        nl.mse_loss.grad(x, x.copy(), out=np.empty(3, room))


def test_bfloat16_is_not_narrower_than_float16(bfloat16):
    x = np.ones(3, np.float16)
    with pytest.raises(TypeError, match="must be float16 or a narrower float, got bfloat16"):
        nl.mse_loss.grad(x, x.copy(), out=np.empty(3, bfloat16))


@pytest.mark.parametrize("name", ["mse_loss", "cross_entropy"])
def test_accumulate_without_out_is_refused(name, rng):
    loss, arrays = getattr(nl, name), drawn(name, rng)
    with pytest.raises(TypeError, match=f"^{name}: accumulate adds to out, which is not given"):
        loss.grad(**arrays, accumulate=True)
    with pytest.raises(TypeError, match=f"^{name}: accumulate must be True or False"):
        loss.grad(**arrays, accumulate="yes")

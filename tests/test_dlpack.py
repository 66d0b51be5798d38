"""Arrays of other libraries, by DLPack: taken where they lie, results in their library."""

import sys
import types

import numpy as np
import pytest

import numbaloss as nl


class Lent:
    """An array of a library that knows no more than DLPack."""

    def __init__(self, array, device=1, error=None):
        self.array, self.device, self.error = array, device, error

    def __dlpack__(self, **options):
        if self.error:
            raise self.error
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return (self.device, 0)

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=Lent.taken)

    @staticmethod
    def taken(array):
        return Lent(np.from_dlpack(array))


@pytest.fixture
def pair(rng):
    return rng.normal(size=(2, 5, 4)).astype(np.float32)


def test_results_are_of_the_first_array_s_library(pair):
    x, t = pair
    wanted = nl.huber_loss.value_grad_hess(x, t)
    for _ in range(2):
        found = nl.huber_loss.value_grad_hess(Lent(x), t)
        assert all(type(a) is Lent for a in found)
        for a, b in zip(found, wanted, strict=True):
            assert a.array.dtype == np.float32
            np.testing.assert_array_equal(a.array, b)
    assert type(nl.huber_loss(x, Lent(t))) is Lent
    value, (by_input, by_target) = nl.mse_loss.value_and_grad(Lent(x), Lent(t), wrt=("input", "target"))
    np.testing.assert_array_equal(by_input.array, -by_target.array)
    assert value.array.shape == ()


def test_memory_is_shared(pair, monkeypatch):
    x, t = pair
    seen = []
    evaluate = sys.modules["numbaloss.call"].Evaluation.__init__
    monkeypatch.setattr(
        "numbaloss.call.Evaluation.__init__",
        lambda self, cls, mode, call, backend: (
            seen.append(call["input"]) or evaluate(self, cls, mode, call, backend)
        ),
    )
    nl.smooth_l1_loss(Lent(x), t, beta=0.123)
    assert np.shares_memory(seen[0], x)


def test_out_in_place_and_beside(pair):
    x, t = pair
    wanted, room = nl.huber_loss.grad(x, t), Lent(np.zeros((5, 4), np.float32))
    assert nl.huber_loss.grad(Lent(x), Lent(t), out=room) is room
    np.testing.assert_array_equal(room.array, wanted)
    given = Lent(x.copy())
    assert nl.huber_loss.value_and_grad(given, Lent(t), out=given)[1] is given
    np.testing.assert_array_equal(given.array, wanted)
    pair_of = Lent(np.zeros((5, 4), np.float32)), np.zeros((5, 4), np.float32)
    found = nl.huber_loss.value_grad_hess(Lent(x), t, out=pair_of)
    assert found[1] is pair_of[0]
    np.testing.assert_array_equal(pair_of[0].array, wanted)
    assert pair_of[1].any()


@pytest.mark.more
def test_other_families_and_criteria(pair, rng):
    x, y = pair[0], rng.integers(0, 4, 5)
    criterion = nl.CrossEntropyLoss(weight=Lent(np.arange(1, 5, dtype=np.float32)))
    value, gradient = criterion.value_and_grad(Lent(x), Lent(y))
    wanted = nl.cross_entropy.value_and_grad(x, y, weight=np.arange(1, 5, dtype=np.float32))
    np.testing.assert_array_equal(value.array, wanted[0])
    np.testing.assert_array_equal(gradient.array, wanted[1])
    soft = (x > 0).astype(np.float32)
    for reduction in ("mean", "none"):
        found = nl.multilabel_soft_margin_loss(Lent(x), Lent(soft), reduction=reduction)
        np.testing.assert_array_equal(
            found.array, nl.multilabel_soft_margin_loss(x, soft, reduction=reduction)
        )


def test_what_is_refused(pair, monkeypatch):
    x, t = pair
    monkeypatch.setitem(sys.modules, "cupy", None)  # not installed
    with pytest.raises(
        TypeError, match=r"^mse_loss: input \(test_dlpack.Lent\) lies on a CUDA device .*CuPy is"
    ):
        nl.mse_loss(Lent(x, device=2), t)
    with pytest.raises(TypeError, match="lies on a device that is neither the CPU nor one of CUDA"):
        nl.mse_loss(Lent(x, device=10), t)
    with pytest.raises(TypeError, match="^mse_loss: target .* is not given by DLPack: tensors that require"):
        nl.mse_loss(x, Lent(t, error=BufferError("tensors that require gradients")))
    read_only = x.copy()
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="^mse_loss: out for input is read-only"):
        nl.mse_loss.grad(x, t, out=Lent(read_only))


def test_tensors(torch, pair):
    x, t = map(torch.from_numpy, pair)
    value, gradient = nl.huber_loss.value_and_grad(x, t)
    assert isinstance(value, torch.Tensor) and value.shape == () and value.dtype == torch.float32
    leaf = x.clone().requires_grad_()
    theirs = torch.nn.functional.huber_loss(leaf, t)
    theirs.backward()
    torch.testing.assert_close(value, theirs.detach())
    torch.testing.assert_close(gradient, leaf.grad)
    assert nl.huber_loss.grad(x, t, out=x) is x
    torch.testing.assert_close(x, gradient)
    with pytest.raises(TypeError, match=r"mse_loss: input \(torch.Tensor\) .*require grad.*numbaloss.torch"):
        nl.mse_loss(leaf, t)
    with pytest.raises(TypeError, match="mse_loss: input"):
        nl.mse_loss(x.bfloat16(), t)

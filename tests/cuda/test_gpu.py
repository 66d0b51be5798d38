"""Calls on a real GPU, with the arrays of whichever libraries are installed, against the CPU's results."""

import importlib.util

import numpy as np
import pytest

import numbaloss as nl
from numbaloss import testing
from numbaloss.kernels.cuda import driver
from numbaloss.loss import registry

try:
    driver.driver()
except Exception as error:
    pytest.skip(f"no GPU: {error}", allow_module_level=True)

SHAPE = (37, 24)


class Numba:
    def __init__(self):
        from numba import cuda

        self.put, self.synchronize = cuda.to_device, cuda.synchronize

    def get(self, x):
        return x.copy_to_host()


class CuPy:
    def __init__(self):
        import cupy

        self.put = cupy.asarray

    def get(self, x):
        return x.get()


class Torch:
    def __init__(self):
        import torch

        self.put = lambda a: torch.from_numpy(np.array(a)).cuda()

    def get(self, x):
        return x.cpu().numpy()


LIBRARIES = {"numba": Numba, "cupy": CuPy, "torch": Torch}


@pytest.fixture(params=LIBRARIES)
def library(request):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"no {request.param}")
    try:
        return LIBRARIES[request.param]()
    except Exception as error:
        pytest.skip(f"{request.param}: {error}")


def close(got, wanted, dtype):
    """Apart by two orders of summation and two implementations of the functions; sums may cancel."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    size = np.where(np.isfinite(wanted), np.abs(wanted), 0)
    limits = testing.finfo(dtype)
    bound = 256 * float(limits.eps) * (size + np.median(size)) + float(limits.smallest_subnormal)
    with np.errstate(invalid="ignore"):
        same = (np.abs(got - wanted) <= bound) | (got == wanted) | (np.isnan(got) & np.isnan(wanted))
    assert same.all(), (got[~same][:5], wanted[~same][:5])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("name", registry)
def test_value_and_gradients(library, name, dtype):
    if name == "linear_cross_entropy":
        pytest.importorskip("cupy")  # for its products, whichever library's the arrays are
    loss = registry[name]
    arrays = testing.samples(loss, np.random.default_rng(1), SHAPE, dtype)
    wrt = tuple(n for n in loss.Class._required if arrays[n].dtype.kind == "f")[:2]
    wrt = wrt if name != "cosine_embedding_loss" else ("input1", "input2")
    wrt = tuple(n for n in wrt if n in loss.Class._differentiable())
    for reduction in ("mean", "none"):
        with np.errstate(over="ignore"):
            wanted, slopes = loss.value_and_grad(**arrays, reduction=reduction, wrt=wrt)
        on_device = {n: library.put(a) for n, a in arrays.items()}
        value, gradients = loss.value_and_grad(**on_device, reduction=reduction, wrt=wrt)
        close(library.get(value), wanted, dtype)
        for n, g, slope in zip(wrt, gradients, slopes, strict=True):
            assert type(g) is type(on_device[n])
            close(library.get(g), slope, dtype)


@pytest.mark.parametrize("name", ["mse_loss", "cross_entropy"])
@pytest.mark.parametrize("shape", [(5, 3), (300, 1000), (64, 50_000), (3, 200_000)], ids=str)
def test_quick_calls_of_many_sizes(library, name, shape):
    loss = registry[name]
    rng = np.random.default_rng(2)
    x = rng.normal(size=shape).astype("f4")
    y = x[::-1].copy() if name == "mse_loss" else rng.integers(0, shape[1], shape[0])
    wanted, slope = loss.value_and_grad(x, y)
    given = [library.put(a) for a in (x, y)]
    first = [loss.value_and_grad(*given) for _ in range(2)]
    for value, gradient in first:
        close(library.get(value), wanted, "float32")
        close(library.get(gradient), slope, "float32")
    # The same bits every time.
    assert library.get(first[0][0]) == library.get(first[1][0])
    loss.grad(*given, out=given[0])
    close(library.get(given[0]), slope, "float32")


@pytest.mark.filterwarnings("ignore:.*Grid size")  # Numba's own transposition of its arrays
def test_layouts_and_weights(library):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 20, 30)).astype("f4")
    w = rng.integers(0, 3, 30)
    wanted, slope = nl.huber_loss.value_and_grad(x.T, y.T, sample_weight=w[:, None])
    given = library.put(x).T, library.put(y).T
    weights = library.put(w.reshape(30, 1))
    value, gradient = nl.huber_loss.value_and_grad(*given, sample_weight=weights)
    close(library.get(value), wanted, "float32")
    close(library.get(gradient), slope, "float32")


def test_faults_are_raised_by_synchronize(library):
    x, y = np.zeros((4, 5), "f4"), np.array([1, 9, 2, 3])
    value = nl.cross_entropy(library.put(x), library.put(y))
    assert np.isnan(library.get(value))
    with pytest.raises(IndexError, match=r"cross_entropy: target\[1\] is 9, but input has 5 classes"):
        nl.synchronize()
    nl.synchronize()


def test_linear_cross_entropy_in_chunks(library):
    pytest.importorskip("cupy")
    rng = np.random.default_rng(4)
    x, w = rng.normal(size=(300, 64)).astype("f4"), rng.normal(size=(1000, 64)).astype("f4")
    y = rng.integers(0, 1000, 300)
    x[7], y[7] = np.nan, -100  # what does not count goes nowhere
    options = nl.LinearCrossEntropyOptions(batch_chunk_size=64)
    wanted, slopes = nl.linear_cross_entropy.value_and_grad(x, w, y)
    results = []
    for _ in range(2):
        given = [library.put(a) for a in (x, w, y)]
        value, gradients = nl.linear_cross_entropy.value_and_grad(
            *given, options=options, out=tuple(given[:2])
        )
        assert all(g is a for g, a in zip(gradients, given, strict=False))
        results.append([library.get(a) for a in (value, *gradients)])
    for a, b, exact in zip(*results, (wanted, *slopes), strict=True):
        np.testing.assert_array_equal(a, b)  # the same bits every time
        close(a, exact, "float32")


def test_a_stream_of_the_callers():
    cupy = pytest.importorskip("cupy")
    x = cupy.ones(1_000_000, "f4")
    with cupy.cuda.Stream(non_blocking=True):
        doubled = x * 2
        value, gradient = nl.mse_loss.value_and_grad(doubled, x)
        total = gradient.sum()
        assert float(value) == 1 and abs(float(total) - 2) < 1e-3


@pytest.mark.parametrize(
    "name", ["mse_loss", "gaussian_nll_loss", "cross_entropy", "triplet_margin_loss", "ctc_loss"]
)
def test_tensors_with_autograd(name):
    """numbaloss.torch on a device gives what it gives on the CPU, and stays on the device."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    from numbaloss import torch as nt

    loss, function = registry[name], getattr(nt, name)
    shape = (20, 3, 8) if name == "ctc_loss" else SHAPE
    arrays = testing.samples(loss, np.random.default_rng(1), shape, "float32")
    default = loss.Class._default_wrt()
    wrt = (default,) if isinstance(default, str) else default
    for reduction in ("mean", "none"):
        results = []
        for device in ("cpu", "cuda"):
            call = {n: torch.tensor(a, device=device, requires_grad=n in wrt) for n, a in arrays.items()}
            value = function(**call, reduction=reduction)
            assert value.device.type == device
            (3 * value.sum()).backward()
            results.append([value.detach().cpu(), *(call[n].grad.cpu() for n in wrt)])
        for wanted, got in zip(*results, strict=True):
            close(got, wanted, "float32")

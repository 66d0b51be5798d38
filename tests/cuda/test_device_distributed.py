"""Calls of several ranks on a device whose PTX is executed: as on the CPU."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ptx.device import CuPyArray, host, put
from sweeps import some

import numbaloss as nl

pytestmark = pytest.mark.usefixtures("gpu")


class Beside:
    """A communicator of two ranks of which the other one's numbers are known."""

    rank, size = 0, 2

    def __init__(self, *others):
        self.others = list(others)

    def all_reduce(self, buffer, op="sum", stream=None):
        assert type(buffer) is np.ndarray  # of the host
        buffer[3:] += self.others.pop(0)
        buffer[1:3] *= 2  # it says the same of its options

    def all_gather(self, buffer, out, stream=None):
        raise AssertionError


CALLS = [
    (nl.mse_loss, {}, np.float32, ()),
    (nl.huber_loss, {}, np.float16, ("sample_weight",)),
    (nl.mse_loss, {}, np.float64, ("weight",)),
    (nl.cross_entropy, {"ignore_index": 1}, np.float32, ("class_weight", "sample_weight")),
    (nl.cross_entropy, {"label_smoothing": 0.1}, np.float16, ()),
    (nl.nll_loss, {}, np.float32, ("class_weight",)),
    (nl.multi_margin_loss, {}, np.float32, ("sample_weight",)),
    (nl.cosine_embedding_loss, {}, np.float32, ()),
]


NAMES = [call[0].__name__ for call in CALLS]


def arrays_of(loss, dtype, more, rng):
    arrays = nl.testing.samples(loss, rng, (9, 4), dtype)
    terms = loss(**arrays, reduction="none").shape
    given = {
        "sample_weight": ("sample_weight", rng.choice([0, 0.5, 2], terms)),
        "weight": ("weight", rng.uniform(0.5, 2, (9, 4))),
        "class_weight": ("weight", rng.uniform(0.5, 2, 4)),
    }
    return arrays | {n: a.astype(dtype) for n, a in (given[k] for k in more)}


@pytest.mark.parametrize(("loss", "options", "dtype", "more"), some(CALLS), ids=NAMES)
@pytest.mark.thin(2)
def test_two_ranks(loss, options, dtype, more, rng):
    arrays = arrays_of(loss, dtype, more, rng)
    others = {"count": 5.25, "value": 3.5}
    on_host = loss.value_and_grad(
        **arrays, **options, comm=Beside([others["count"], 0], [0, others["value"]])
    )
    given = {n: put(CuPyArray, a) for n, a in arrays.items()}
    comm = Beside([others["count"], 0], [0, others["value"]])
    value, gradient = loss.value_and_grad(**given, **options, comm=comm)
    nl.synchronize()
    assert type(value) is CuPyArray and value.dtype == on_host[0].dtype and not comm.others
    tolerance = {"rtol": 2e-3 if dtype == np.float16 else 2e-5, "atol": 1e-6}
    np.testing.assert_allclose(host(value), on_host[0], **tolerance)
    pairs = (
        zip(gradient, on_host[1], strict=True) if isinstance(gradient, tuple) else [(gradient, on_host[1])]
    )
    for got, want in pairs:
        np.testing.assert_allclose(host(got), want, **tolerance)


@pytest.mark.parametrize(("loss", "options", "dtype", "more"), some(CALLS), ids=NAMES)
@pytest.mark.thin(2)
def test_count(loss, options, dtype, more, rng):
    arrays = arrays_of(loss, dtype, more, rng)
    counting = {
        n: a for n, a in arrays.items() if n in (*loss.Class._counted_by(), "weight", "sample_weight")
    }
    given = {n: put(CuPyArray, a) for n, a in counting.items()}
    count = loss.count(**given, **options)
    assert type(count) is float
    np.testing.assert_allclose(count, loss.count(**counting, **options), rtol=1e-7)
    part = nl.distributed.partial(loss, **{n: put(CuPyArray, a) for n, a in arrays.items()}, **options)
    on_host = nl.distributed.partial(loss, **arrays, **options)
    np.testing.assert_allclose([part.sum, part.count], [on_host.sum, on_host.count], rtol=1e-5)


SHARDS = [
    (nl.cross_entropy, {}, np.float32),
    (nl.cross_entropy, {"label_smoothing": 0.1, "weight": 1, "sample_weight": 1}, np.float32),
    (nl.cross_entropy, {"softcap": 3.0, "lse_square_scale": 0.01}, np.float64),
    (nl.focal_cross_entropy, {"label_smoothing": 0.1}, np.float16),
]


@pytest.mark.parametrize(("loss", "options", "dtype"), SHARDS, ids=["plain", "weights", "cap", "focal half"])
@pytest.mark.parametrize("inner", [(), (3,)])
@pytest.mark.thin(8)
def test_classes_of_two_ranks(loss, options, dtype, inner, rng):
    """One rank's classes on the device, with the other's numbers, that were found on the CPU."""
    x = rng.normal(0, 2, (5, 600, *inner)).astype(dtype)
    x[0, 3] = x[1, :350] = -np.inf
    y = rng.integers(0, 600, (5, *inner))
    y[3] = -100
    y[1] = 450
    given = {"weight": rng.uniform(0.2, 2, 600), "sample_weight": rng.choice([0.5, 2], y.shape)}
    given = {n: given[n].astype(dtype) if n in given else v for n, v in options.items()}
    said = {}

    class Keeping:
        """Keeps what ranks tell each other, on the CPU."""

        def __init__(self, comm):
            self.comm, self.rank, self.size = comm, comm.rank, comm.size

        def all_reduce(self, buffer, op="sum", stream=None):
            self.comm.all_reduce(buffer, op, stream)

        def all_gather(self, buffer, out, stream=None):
            self.comm.all_gather(buffer, out, stream)
            said[self.rank] = out.copy()

    class Again(Keeping):
        """The first rank, with what the second one said."""

        def all_reduce(self, buffer, op="sum", stream=None):
            buffer[1:3] *= 2

        def all_gather(self, buffer, out, stream=None):
            np.testing.assert_allclose(buffer, said[0][0], rtol=1e-5 if dtype != np.float64 else 1e-13)
            out[:] = buffer, said[0][1]

    cuts = (0, 350, 600)

    def of_rank(comm):
        some = slice(cuts[comm.rank], cuts[comm.rank + 1])
        return loss.value_and_grad(x[:, some], y, classes=(some.start, 600), comm=Keeping(comm), **given)

    with ThreadPoolExecutor(2) as threads:
        on_host = list(threads.map(of_rank, nl.distributed.threads(2)))
    there = {n: put(CuPyArray, a) if isinstance(a, np.ndarray) else a for n, a in given.items()}
    comm = nl.distributed.threads(2)[0]
    shard = put(CuPyArray, np.ascontiguousarray(x[:, :350]))
    value, gradient = loss.value_and_grad(
        shard, put(CuPyArray, y), classes=(0, 600), comm=Again(comm), out=shard, **there
    )
    assert gradient is shard and value.dtype == dtype
    tolerance = {"rtol": 3e-3, "atol": 1e-5} if dtype == np.float16 else {"rtol": 2e-5, "atol": 1e-7}
    np.testing.assert_allclose(host(value), on_host[0][0], **tolerance)
    np.testing.assert_allclose(host(gradient), on_host[0][1], **tolerance)


@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "apart"])
def test_arrays_on_two_devices_raise_on_all_ranks(mixed, rng):
    """Arrays of one rank here and there; or those of one rank here, and those of another there."""
    x, y = rng.normal(size=(2, 8)).astype(np.float32)

    def of_rank(comm):
        given = x, y
        if comm.rank:
            given = put(CuPyArray, x), y if mixed else put(CuPyArray, y)
        try:
            return nl.mse_loss.value_and_grad(*given, comm=comm)
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as threads:
        here, there = threads.map(of_rank, nl.distributed.threads(2, timeout=60))
    if mixed:
        assert isinstance(there, TypeError) and "must be on one device" in str(there)
        assert isinstance(here, RuntimeError) and "1 of 2 ranks failed" in str(here)
    else:
        assert all(isinstance(e, ValueError) and "dtypes or devices" in str(e) for e in (here, there))

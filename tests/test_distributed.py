"""Losses of rows that are shared out among ranks: what all of them get is what one of all rows gets."""

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from sweeps import sweep

import numbaloss as nl
from numbaloss import testing
from numbaloss.loss import registry

ROWS = 12
CUTS = {
    1: (0, 12),
    2: (0, 5, 12),
    3: (0, 4, 4, 12),
    8: (0, 1, 3, 3, 4, 8, 8, 9, 12),
}  # of some ranks without rows


# Losses that are counted, or computed, each in its own way.
KINDS = "mse_loss", "cross_entropy", "linear_cross_entropy", "ctc_loss", "multilabel_soft_margin_loss"


def on_ranks(n, function):
    """Call a function on each of n ranks; return what they give, or the errors that they raise."""

    def tried(comm):
        try:
            return function(comm)
        except Exception as error:
            return error

    with ThreadPoolExecutor(n) as threads:
        return list(threads.map(tried, nl.distributed.threads(n, timeout=30)))


class Counting:
    """A communicator that counts what goes through it."""

    def __init__(self, comm):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.reduced, self.gathered = [], []

    def all_reduce(self, buffer, op="sum", stream=None):
        self.reduced.append(buffer.nbytes)
        self.comm.all_reduce(buffer, op, stream)

    def all_gather(self, buffer, out, stream=None):
        self.gathered.append(buffer.nbytes)
        self.comm.all_gather(buffer, out, stream)


def drawn(name, dtype, rng):
    """A call's arrays, with rows along the first axis (CTC's frames: the second), and options that weigh."""
    loss = registry[name]
    shape = (6, ROWS, 4) if name == "ctc_loss" else (ROWS, 4)
    arrays, options = testing.samples(loss, rng, shape, dtype), {}
    if name == "linear_cross_entropy":
        arrays["linear_weight"] = arrays["linear_weight"][:4]
        arrays["target"] = rng.integers(0, 4, ROWS)
    fields = loss.Class.fields
    if "ignore_index" in fields:
        options["ignore_index"] = 1
    if "label_smoothing" in fields:
        options["label_smoothing"] = 0.1
    if "weight" in fields:
        classes = arrays["input"].shape[-1] if name != "linear_cross_entropy" else 4
        options["weight"] = rng.uniform(0.2, 2, classes).astype(dtype)
    terms = loss(**arrays, **options, reduction="none")
    weights = rng.uniform(0, 2, terms.shape).astype(dtype)
    weights.flat[::5] = 0
    return loss, arrays, {**options, "sample_weight": weights}


def part_of(name, arrays, options, rows):
    def cut(n, a):
        if n in ("linear_weight", "weight"):
            return a
        return a[:, rows] if n == "log_probs" else a[rows]

    own = {n: cut(n, a) for n, a in arrays.items()}
    return own, {n: cut(n, a) if isinstance(a, np.ndarray) else a for n, a in options.items()}


def joined(name, wrt, parts):
    if wrt in ("linear_weight", "weight"):
        return sum(parts)
    return np.concatenate(parts, axis=1 if wrt == "log_probs" else 0)


@pytest.mark.parametrize("name", sweep(registry, *KINDS, "triplet_margin_loss", "multi_margin_loss"))
@pytest.mark.thin(7)
def test_count_is_what_the_mean_divides_by(name, rng):
    loss, arrays, options = drawn(name, np.float64, rng)
    for given in (options, {n: v for n, v in options.items() if n != "sample_weight"}):
        reductions = [r for r in loss.Class.fields["reduction"].domain if r not in ("none", "sum")]
        for reduction in reductions:
            total, mean = (loss(**arrays, **given, reduction=r) for r in ("sum", reduction))
            if name == "ctc_loss":  # its mean divides by the labels first
                total = (loss(**arrays, **given, reduction="none") / arrays["target_lengths"].clip(1)).sum()
            counting = {n: a for n, a in arrays.items() if n in loss.Class._counted_by()}
            count = loss.count(**counting, **given, reduction=reduction)
            assert type(count) is float
            np.testing.assert_allclose(count, total / mean, rtol=1e-12)
            assert loss.count(**arrays, **given, reduction=reduction) == count
        part = nl.distributed.partial(loss, **arrays, **given, reduction=reductions[0])
        np.testing.assert_allclose(part.mean, loss(**arrays, **given, reduction=reductions[0]), rtol=1e-13)


def spacing(x):
    """The distance to the next number of a dtype; of ml_dtypes' too."""
    with np.errstate(invalid="ignore", divide="ignore"):
        exponent = np.floor(np.log2(np.abs(x).astype(np.float64)))
    info = ml_dtypes.finfo(x.dtype)
    return np.maximum(np.exp2(exponent) * float(info.eps), float(info.smallest_subnormal))


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: d.__name__
)
@pytest.mark.parametrize("name", sweep(registry, *KINDS, "huber_loss"))
@pytest.mark.thin(8)
def test_ranks_get_what_one_gets(name, dtype, rng):
    """Value and gradients of 1 to 8 ranks, some without rows, with weights, ignored rows, smoothing."""
    loss, arrays, options = drawn(name, dtype, rng)
    if name == "ctc_loss":
        log_probs = arrays["log_probs"].astype(np.float64)
        arrays["log_probs"] = (log_probs - np.log(np.exp(log_probs).sum(-1, keepdims=True))).astype(dtype)
    wrt = loss.Class._default_wrt()
    names = (wrt,) if isinstance(wrt, str) else wrt
    # Sums of terms and of weights in another order differ by roundings of float64, which show where the
    # result has as many digits. Matrix products of other shapes are added up in another order, and so are
    # gradients that ranks add up.
    ulps = 8 if dtype is np.float64 else 1
    for reduction in ("mean", "sum", "none"):
        whole, slopes = loss.value_and_grad(**arrays, **options, reduction=reduction, wrt=names)
        for n, cuts in CUTS.items():

            def of_rank(comm, cuts=cuts, reduction=reduction):
                rows = slice(cuts[comm.rank], cuts[comm.rank + 1])
                own, given = part_of(name, arrays, options, rows)
                return loss.value_and_grad(**own, **given, reduction=reduction, wrt=names, comm=comm)

            found = on_ranks(n, of_rank)
            values = [value for value, _ in found]
            if reduction == "none":
                found_terms = np.concatenate(values).astype(np.float64)
                of_products = 1e-13 if name == "linear_cross_entropy" and dtype is np.float64 else 0
                np.testing.assert_allclose(found_terms, whole.astype(np.float64), rtol=of_products)
            else:
                assert {v.tobytes() for v in values} == {values[0].tobytes()}
                assert values[0].dtype == whole.dtype
                assert abs(float(values[0]) - float(whole)) <= ulps * spacing(whole)
            for k, argument in enumerate(names):
                got = joined(name, argument, [gradients[k] for _, gradients in found])
                with np.errstate(invalid="ignore"):  # halves overflow
                    size = np.abs(slopes[k])
                    allowed = ulps * spacing(size)
                    if name == "linear_cross_entropy":
                        allowed = 32 * spacing(size.max())
                    close = np.abs(got.astype(np.float64) - slopes[k]) <= allowed
                close |= (got == slopes[k]) | np.isnan(got) & np.isnan(slopes[k])
                assert close.all(), (n, reduction, argument)


@pytest.fixture
def batch(rng):
    return rng.normal(0, 2, (ROWS, 5)), rng.integers(0, 5, ROWS)


def test_ranks_meet_once_or_twice(batch):
    x, y = batch

    def of_rank(comm):
        counting, met = Counting(comm), []
        rows = slice(0, 7) if comm.rank else slice(7, 12)
        for call in (
            lambda **more: nl.cross_entropy(x[rows], y[rows], **more),
            lambda **more: nl.cross_entropy.grad(x[rows], y[rows], **more),
            lambda **more: nl.cross_entropy.value_and_grad(x[rows], y[rows], **more),
            lambda **more: nl.cross_entropy.value_and_grad(x[rows], y[rows], reduction="sum", **more),
            lambda **more: nl.cross_entropy.value_and_grad(x[rows], y[rows], normalizer=12.0, **more),
        ):
            call(comm=counting)
            met.append((len(counting.reduced), sum(counting.reduced), len(counting.gathered)))
            counting.reduced.clear()
        return met

    assert on_ranks(2, of_rank) == [[(1, 40, 0), (1, 40, 0), (2, 80, 0), (1, 40, 0), (1, 40, 0)]] * 2


@pytest.mark.more
def test_other_ways_to_call(batch):
    """Criteria, curvature, in place, added up, a sum of losses, the gradient by weights that divide."""
    x, y = batch
    t = np.linspace(-1, 1, x.size).reshape(x.shape)
    weight = np.linspace(0.1, 2, x.size).reshape(x.shape)
    mixed = 0.7 * nl.MSELoss() + 0.3 * nl.L1Loss()
    apart = nl.MSELoss() + nl.QuantileLoss(quantiles=np.full(5, 0.3))

    def of(rows, **more):
        a, b = x[rows], t[rows]
        buffer, kept = a.copy(), np.ones_like(a)
        _, in_place = nl.mse_loss.value_and_grad(buffer, b, out=buffer, **more)
        assert in_place is buffer
        nl.mse_loss.grad(a, b, out=kept, accumulate=True, **more)
        return (
            nl.CrossEntropyLoss(label_smoothing=0.1)(a, y[rows], **more),
            nl.huber_loss.value_grad_hess(a, b, curvature="majorizer", floor=0.1, **more),
            in_place,
            kept - 1,
            mixed.value_and_grad(a, b, **more),
            apart.value_and_grad(a, b, **more),
            nl.mse_loss.value_and_grad(a, b, weight=weight[rows], wrt="weight", **more),
            nl.mse_loss.value_and_grad(a, b, normalizer=2.5, **more),
            nl.mse_loss.value_and_grad(a, b, normalizer=2.5, reduction="sum", **more),
            nl.mse_loss(a, b, normalizer=2.5, reduction="sum", **more),
        )

    def flat(results, of_rows):
        for r in results:
            yield from flat(r, of_rows) if isinstance(r, tuple) else [r]

    whole = list(flat(of(slice(None)), None))
    cuts = (0, 5, 12)
    found = on_ranks(2, lambda comm: of(slice(cuts[comm.rank], cuts[comm.rank + 1]), comm=comm))
    for one, *parts in zip(whole, *(list(flat(f, None)) for f in found), strict=True):
        got = np.concatenate(parts) if np.ndim(one) else parts[0]
        np.testing.assert_allclose(got, one, rtol=4e-15, atol=1e-17)


def test_rows_without_axes_infinite_weights_and_halves():
    """A number is one row; sums of weights warn of nothing; a mean is rounded after it was used."""
    one, two = np.float64(0.2), np.array([0.4, -0.1])
    whole = nl.kl_div.value_and_grad(two, np.array([one, one]), reduction="batchmean")
    found = on_ranks(
        2,
        lambda comm: nl.kl_div.value_and_grad(
            two[comm.rank].reshape(()), one, reduction="batchmean", comm=comm
        ),
    )
    np.testing.assert_allclose([found[0][0], found[1][0]], whole[0], rtol=1e-15)
    np.testing.assert_allclose([found[0][1], found[1][1]], whole[1], rtol=1e-15)
    weights = np.array([-np.inf, np.inf])
    assert all(np.isnan(on_ranks(2, lambda comm: nl.mse_loss(two, two, sample_weight=weights, comm=comm))))
    x, w = np.array([[1.37]], np.float16), np.array([[0.7]], np.float16)

    def of(comm):
        return nl.l1_loss.grad(x, np.zeros_like(x), weight=w, wrt="weight", comm=comm)

    x_of_both = np.concatenate([x, x])
    wanted = nl.l1_loss.grad(x_of_both, 0 * x_of_both, weight=np.concatenate([w, w]), wrt="weight")
    np.testing.assert_array_equal(np.concatenate(on_ranks(2, of)), wanted)


def test_probabilities_and_their_weights(rng):
    """Gradients by probabilities are of the own rows, those by class weights have to be added up."""
    x, q, weight = rng.normal(size=(ROWS, 4)), rng.random((ROWS, 4)), rng.uniform(0.2, 2, 4)
    wrt = ("input", "target", "weight")
    value, slopes = nl.cross_entropy.value_and_grad(x, q, weight, wrt=wrt)
    cuts = (0, 5, ROWS)

    def of_rank(comm):
        rows = slice(cuts[comm.rank], cuts[comm.rank + 1])
        return nl.cross_entropy.value_and_grad(x[rows], q[rows], weight, wrt=wrt, comm=comm)

    found = on_ranks(2, of_rank)
    np.testing.assert_allclose([v for v, _ in found], value, rtol=1e-14)
    for k in (0, 1):
        np.testing.assert_allclose(np.concatenate([g[k] for _, g in found]), slopes[k], rtol=1e-13)
    np.testing.assert_allclose(found[0][1][2] + found[1][1][2], slopes[2], rtol=1e-13)


def test_arrays_of_other_libraries(batch):
    class Foreign:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **kwargs):
            return self.array.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

        def __array_namespace__(self):
            return self

        @staticmethod
        def from_dlpack(array):
            return Foreign(array)

    x, y = batch
    want = nl.cross_entropy.value_and_grad(x, y)
    assert nl.cross_entropy.count(Foreign(y)) == ROWS

    def of_rows(comm):
        rows = slice(0, 5) if comm.rank else slice(5, 12)
        return nl.cross_entropy.value_and_grad(Foreign(x[rows].copy()), Foreign(y[rows]), comm=comm)

    def of_classes(comm):
        some = slice(0, 2) if comm.rank else slice(2, 5)
        shard = Foreign(x[:, some].copy())
        return nl.cross_entropy.value_and_grad(
            shard, Foreign(y), classes=(some.start, 5), comm=comm, out=shard
        )

    for of_rank, axis in ((of_rows, 0), (of_classes, 1)):
        found = on_ranks(2, of_rank)
        for value, gradient in found:
            assert type(value) is type(gradient) is Foreign
            np.testing.assert_allclose(value.array, want[0], rtol=1e-14)
        got = np.concatenate([g.array for _, g in reversed(found)], axis=axis)
        np.testing.assert_allclose(got, want[1], rtol=1e-13, atol=1e-17)


@pytest.mark.parametrize("wrong", ["label", "shape", "option", "normalizer", "different", "dtype"])
@pytest.mark.parametrize("mode", ["value_and_grad", "__call__"])
def test_what_is_wrong_on_one_rank_raises_on_all(batch, wrong, mode):
    x, y = batch

    def of_rank(comm):
        labels, scores, options = y.copy(), x, {}
        if comm.rank == 1:
            if wrong == "label":
                labels[3] = 17
            elif wrong == "shape":
                labels = labels[:-1]
            elif wrong == "option":
                options["label_smoothing"] = 2.0
            elif wrong == "normalizer":
                options["normalizer"] = np.ones((7, 1))
            elif wrong == "different":
                options["label_smoothing"] = 0.5
            else:
                scores = x.astype(np.float32)
        return getattr(nl.cross_entropy, mode)(scores, labels, comm=comm, **options)

    own = {"label": IndexError, "shape": ValueError, "option": ValueError, "normalizer": TypeError}
    found = on_ranks(3, of_rank)
    if wrong in own:
        assert isinstance(found[1], own[wrong])
        assert all(
            isinstance(f, RuntimeError) and "1 of 3 ranks failed" in str(f) for f in (found[0], found[2])
        )
    else:
        assert all(isinstance(f, ValueError) and "different options" in str(f) for f in found)


def test_a_rank_that_does_not_come():
    comm, _ = nl.distributed.threads(2, timeout=0.2)
    with pytest.raises(RuntimeError, match="rank 0 waited for others"):
        nl.mse_loss(np.ones(3), np.zeros(3), comm=comm)


def test_what_is_no_communicator():
    for wrong in (3, "mpi", object()):
        with pytest.raises(TypeError, match="comm must be a communicator of mpi4py"):
            nl.mse_loss(np.ones(3), np.zeros(3), comm=wrong)
    with pytest.raises(ValueError, match="n must be a whole number"):
        nl.distributed.threads(0)


def test_parts_add_up_in_any_grouping(rng):
    x = rng.normal(size=64).astype(np.float32) * 10.0 ** rng.integers(-6, 6, 64)
    parts = [nl.distributed.partial(nl.l1_loss, x[k : k + 1], np.zeros(1, x.dtype)) for k in range(64)]
    one_by_one = sum(parts)
    in_pairs = parts
    while len(in_pairs) > 1:
        in_pairs = [a + b for a, b in zip(in_pairs[::2], in_pairs[1::2], strict=True)]
    assert one_by_one.mean == in_pairs[0].mean
    assert one_by_one.count == 64
    np.testing.assert_allclose(one_by_one.mean, np.abs(x).mean(), rtol=1e-15)
    assert np.isnan(nl.distributed.partial(nl.l1_loss, x[:0], x[:0]).mean)
    with pytest.raises(TypeError):
        parts[0] + 1.0

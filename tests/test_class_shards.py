"""Rows of class scores whose classes are shared out among ranks: as if one rank had all of them."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from sweeps import sweep
from test_distributed import Counting, on_ranks, spacing

import numbaloss as nl
import numbaloss.class_shards
from numbaloss.kernels import powers

ROWS = 6
CUTS = {1: (0, 1), 2: (0, 0.3, 1), 3: (0, 0.1, 0.2, 1), 8: (0, 0.05, 0.2, 0.3, 0.55, 0.6, 0.8, 0.95, 1)}


@nl.score_loss
def peaked(log_prob, rest, class_weight, logsumexp, gamma=1.5):
    return -class_weight * rest**gamma * log_prob + 0.01 * logsumexp * logsumexp


LOSSES = {
    "plain": (nl.cross_entropy, {}),
    "smoothing": (nl.cross_entropy, {"label_smoothing": 0.1}),
    "weights": (nl.cross_entropy, {"weight": 1, "label_smoothing": 0.2, "sample_weight": 1}),
    "z-loss": (nl.cross_entropy, {"lse_square_scale": 0.01}),
    "softcap": (nl.cross_entropy, {"softcap": 4.0, "label_smoothing": 0.1, "lse_square_scale": 1e-3}),
    "focal": (nl.focal_cross_entropy, {"gamma": 1.3, "weight": 1}),
    "poly1": (nl.poly1_cross_entropy, {"label_smoothing": 0.1}),
    "generalized": (nl.generalized_cross_entropy, {"weight": 1}),
    "own": (peaked, {"weight": 1, "sample_weight": 1}),
}


def drawn(name, classes, dtype, rng, inner=()):
    loss, options = LOSSES[name]
    x = rng.normal(0, 3, (ROWS, classes, *inner)).astype(dtype)
    y = rng.integers(0, classes, (ROWS, *inner))
    y[2] = -100
    given = {
        "weight": lambda: rng.uniform(0.2, 2, classes).astype(dtype),
        "sample_weight": lambda: rng.choice([0, 0.5, 2], y.shape).astype(dtype),
    }
    return loss, x, y, {n: given[n]() if n in given else v for n, v in options.items()}


def parts(classes, n):
    cuts = [round(classes * c) for c in CUTS[n]]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def shared(loss, x, y, n, mode="value_and_grad", **options):
    """Call a loss on n ranks; return each one's result."""
    axis, pieces = (1 if x.ndim > 1 else 0), parts(x.shape[1 if x.ndim > 1 else 0], n)

    def of_rank(comm):
        some = pieces[comm.rank]
        own = x[(slice(None),) * axis + (some,)]
        return getattr(loss, mode)(own, y, classes=(some.start, x.shape[axis]), comm=comm, **options)

    return on_ranks(n, of_rank)


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: d.__name__
)
@pytest.mark.parametrize("classes", [23, 3000])
@pytest.mark.parametrize("name", sweep(LOSSES, "plain", "weights", "softcap", "own"))
@pytest.mark.thin(24)
def test_ranks_get_what_one_gets(name, classes, dtype, rng):
    """To one unit in the last place of each value and slope; in float64 as close to exact numbers."""
    loss, x, y, options = drawn(name, classes, dtype, rng)
    wide = {n: v.astype(np.float64) if isinstance(v, np.ndarray) else v for n, v in options.items()}
    for reduction in ("mean", "sum", "none"):
        value, slopes = loss.value_and_grad(x, y, reduction=reduction, **options)
        exact = loss.value_and_grad(x.astype(np.float64), y, reduction=reduction, **wide)
        for n in CUTS:
            found = shared(loss, x, y, n, reduction=reduction, **options)
            for v, _ in found:
                assert v.dtype == value.dtype and np.shape(v) == np.shape(value)
                np.testing.assert_array_equal(v, found[0][0])
            got = np.concatenate([g for _, g in found], axis=1)
            assert got.dtype == dtype
            if dtype is not np.float64:
                for ours, whole in ((found[0][0], value), (got, slopes)):
                    apart = abs(ours.astype(np.float64) - whole.astype(np.float64))
                    assert (apart <= spacing(whole)).all(), (n, reduction)
                continue
            for ours, whole, true in ((found[0][0], value, exact[0]), (got, slopes, exact[1])):
                allowed = abs(whole.astype(np.float64) - true) + 2 * np.spacing(abs(whole)).astype(np.float64)
                # What is left of two numbers that cancel has their roundings; nothing here is exact, and
                # log p of -10 has a rounding of eight.
                allowed = allowed + 16 * np.finfo(dtype).eps * np.max(abs(true), initial=0)
                assert (abs(ours.astype(np.float64) - true) <= allowed).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_few_classes_and_large_scores(dtype, rng):
    """Sums of few numbers lie half way between two others; scores beyond 2048 have another reference."""
    for classes, size in ((2, 1), (3, 5), (10, 30), (10, 300), (10, 700), (10, 3000), (10, 1e30)):
        x = (rng.normal(0, size, (2000, classes))).astype(dtype)
        if size > 2048:
            x[::2] = x[::2, :1] + rng.normal(0, 8, (1000, classes))
        y = rng.integers(0, classes, 2000)
        value, slopes = nl.cross_entropy.value_and_grad(x, y, reduction="none")
        found = shared(nl.cross_entropy, x, y, 3, reduction="none")
        got = np.concatenate([g for _, g in found], axis=1)
        # Beyond 2048 exponentials are relative to the largest score, which a rank need not have: a distance
        # of 700 has roundings of 512 in float64. Exponentials that are subnormal beside the largest are 0,
        # but not beside a rank's own.
        roundings = 1 if dtype is np.float32 and abs(x).max() <= 2048 else 8 if dtype is np.float32 else 512
        for ours, whole in ((found[0][0], value), (got, slopes)):
            allowed = roundings * spacing(whole) + classes * np.finfo(dtype).tiny
            assert (abs(ours.astype(np.float64) - whole) <= allowed).all(), size


@pytest.mark.parametrize(
    ("m", "top"), [(-3.0, 2.5), (0.1, 0.1), (900.0, 901.0), (2040.0, 2060.0), (1e5, 1e5 + 9)]
)
def test_sums_of_ranks_come_to_one_scale(m, top):
    """As kernels of CUDA devices have them, which are relative to a rank's largest score, and of CPUs."""
    x = m - np.array([0.0, 0.3, 4.0])
    (base, k), (then_base, then_k) = powers.scale_of(np.array(m)), powers.scale_of(np.array(top))
    relative = np.exp(x - m).sum()
    np.testing.assert_allclose(
        relative * powers.from_largest(np.array(m)), np.exp(x - base - k * np.log(2)).sum(), rtol=1e-12
    )
    np.testing.assert_allclose(
        relative * powers.from_largest(np.array(m)) * powers.between(np.array(m), np.array(top)),
        np.exp(x - then_base - then_k * np.log(2)).sum(),
        rtol=1e-12,
    )


@pytest.mark.parametrize("shape", [(7,), (3, 7, 4)])
def test_shapes_and_layouts(shape, rng):
    x = rng.normal(size=shape)
    y = rng.integers(0, 7, shape[:1] + shape[2:] if len(shape) > 1 else ())
    want = nl.cross_entropy.value_and_grad(x, y, label_smoothing=0.1)
    for n in (1, 3):
        found = shared(nl.cross_entropy, x, y, n, label_smoothing=0.1)
        got = np.concatenate([g for _, g in found], axis=1 if len(shape) > 1 else 0)
        np.testing.assert_allclose(found[0][0], want[0], rtol=1e-14)
        np.testing.assert_allclose(got, want[1], rtol=1e-13, atol=1e-17)


def test_ways_to_call(rng):
    """The value or the gradient alone, in place, added, into other layouts, criteria, grad_output."""
    loss, x, y, _ = drawn("plain", 9, np.float64, rng)
    value, slopes = loss.value_and_grad(x, y, grad_output=-2.0, normalizer=7.0)
    terms, by_rows = loss.value_and_grad(x, y, reduction="none", grad_output=np.arange(6.0))
    criterion = nl.CrossEntropyLoss(reduction="sum")

    def of_rank(comm):
        some = parts(9, 3)[comm.rank]
        own = x[:, some].copy()
        more = {"classes": (some.start, 9), "comm": comm, "normalizer": 7.0, "grad_output": -2.0}
        wanted = slopes[:, some]
        np.testing.assert_allclose(loss.grad(own, y, **more), wanted, rtol=1e-13, atol=1e-17)
        assert loss(own, y, classes=(some.start, 9), comm=comm, normalizer=7.0) == value
        for out in (np.empty_like(own, order="F"), np.empty((6, 40))[:, : own.shape[1]]):
            assert loss.grad(own, y, out=out, **more) is out
            np.testing.assert_allclose(out, wanted, rtol=1e-13, atol=1e-17)
        narrow = np.empty(own.shape, np.float32)
        loss.grad(own, y, out=narrow, **more)
        np.testing.assert_allclose(narrow, wanted, rtol=1e-6, atol=1e-17)
        kept = np.ones_like(own)
        loss.grad(own, y, out=kept, accumulate=True, **more)
        np.testing.assert_allclose(kept - 1, wanted, rtol=1e-12, atol=1e-15)
        v, g = loss.value_and_grad(
            own, y, classes=(some.start, 9), comm=comm, reduction="none", grad_output=np.arange(6.0)
        )
        np.testing.assert_allclose(v, terms, rtol=1e-14)
        np.testing.assert_allclose(g, by_rows[:, some], rtol=1e-13, atol=1e-17)
        assert criterion(own, y, classes=(some.start, 9), comm=comm) == pytest.approx(terms.sum())
        loss.value_and_grad(own, y, out=own, **more)
        np.testing.assert_allclose(own, wanted, rtol=1e-13, atol=1e-17)
        return "done"

    assert on_ranks(3, of_rank) == ["done"] * 3


def test_scores_that_are_infinite_or_none(rng):
    """Shards of nothing but -inf; rows of it; NaN and +inf go where they go on one rank."""
    x = rng.normal(size=(7, 10))
    x[0, :3] = x[1, 3:] = -np.inf  # a shard of rank 0, all of rank 1
    x[2] = -np.inf
    x[3, 5] = np.nan
    x[4, 1] = np.inf
    x[5, :3] = -np.inf
    y = np.array([4, 1, 3, 0, 2, 1, 9])
    weight = np.ones(10)
    weight[:3] = 0
    for options in ({}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "weight": weight}):
        value, slopes = nl.cross_entropy.value_and_grad(x, y, reduction="none", **options)

        def of_rank(comm, options=options):
            some = (slice(0, 3), slice(3, 10))[comm.rank]
            return nl.cross_entropy.value_and_grad(
                x[:, some], y, reduction="none", classes=(some.start, 10), comm=comm, **options
            )

        found = on_ranks(2, of_rank)
        np.testing.assert_allclose(found[0][0], value, rtol=1e-14)
        finite = np.isfinite(value)
        got = np.concatenate([g for _, g in found], axis=1)
        np.testing.assert_allclose(got[finite], slopes[finite], rtol=1e-13, atol=1e-16)
        assert np.isnan(got[[2, 3, 4]]).any(axis=1).all()


def test_label_smoothing_where_megatron_is_wrong(rng):
    """Megatron-LM#737: its mean of log-probabilities is over one rank's classes, and not over all."""
    x, y, smoothing = rng.normal(0, 2, (ROWS, 12)), rng.integers(0, 12, ROWS), 0.1
    x[:, 6:] += 3  # the two halves differ
    want = nl.cross_entropy(x, y, label_smoothing=smoothing)
    found = shared(nl.cross_entropy, x, y, 2, label_smoothing=smoothing)
    np.testing.assert_allclose([v for v, _ in found], want, rtol=1e-14)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    spread = smoothing * 12 / 11
    theirs = [
        ((1 - spread) * -log_p[np.arange(ROWS), y] - spread * log_p[:, half].mean(axis=1)).mean()
        for half in (slice(0, 6), slice(6, 12))
    ]
    assert abs(theirs[0] - theirs[1]) > 0.1  # ranks do not even agree


def test_one_exchange_of_four_numbers_a_row(rng):
    _, x, y, _ = drawn("plain", 40, np.float32, rng)

    def of_rank(comm):
        counting, some = Counting(comm), parts(40, 3)[comm.rank]
        nl.cross_entropy.value_and_grad(x[:, some], y, classes=(some.start, 40), comm=counting)
        return counting.reduced, counting.gathered

    assert on_ranks(3, of_rank) == [([40], [32 * (ROWS + 1)])] * 3


@pytest.mark.parametrize(
    "wrong", ["label", "range", "overlap", "gap", "rows", "option", "target", "wrt", "mode"]
)
def test_what_is_wrong_raises_on_all(wrong, rng):
    _, x, y, _ = drawn("plain", 9, np.float64, rng)
    options, mode = {}, "value_and_grad"
    labels = y.copy()
    if wrong == "label":
        labels[3] = 9
    if wrong == "target":
        labels = x.copy()
    if wrong == "wrt":
        options["wrt"] = "target"

    def of_rank(comm):
        some = parts(9, 3)[comm.rank]
        own, mine, more, classes = x[:, some], labels, dict(options), (some.start, 9)
        if wrong == "range":
            classes = (some.start, 8)
        if wrong == "overlap" and comm.rank == 1:
            classes = (0, 9)
        if wrong == "gap":
            classes = (some.start, 10)
        if wrong == "rows" and comm.rank == 1:
            own, mine = own[:-1], mine[:-1]
        if wrong == "option" and comm.rank == 1:
            more["label_smoothing"] = 0.2
        if wrong == "mode":
            return nl.CrossEntropyLoss()(own, mine, comm=comm, classes="all")
        return getattr(nl.cross_entropy, mode)(own, mine, classes=classes, comm=comm, **more)

    found = on_ranks(3, of_rank)
    words = {
        "label": (IndexError, r"target\[3\] is 9, but input has 9 classes"),
        "range": ((ValueError, RuntimeError), "does not go with classes|ranks failed"),
        "overlap": (ValueError, "which are not the 9 once"),
        "gap": (ValueError, "which are not the 10 once"),
        "rows": (ValueError, "ranks have different"),
        "option": (ValueError, "ranks have different"),
        "target": (TypeError, "must hold class indices"),
        "wrt": (ValueError, "wrt must be among 'input'"),
        "mode": (ValueError, "first, how many in all"),
    }
    kind, match = words[wrong]
    for error in found:
        assert isinstance(error, kind), error
        with pytest.raises(kind, match=match):
            raise error


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "softcap": 5.0, "weight": 1, "sample_weight": 1}]
)
@pytest.mark.thin(4)
def test_linear_layer(n, options, rng):
    """The rows of its weight are shared out; the gradient by the input is added up."""
    x, w, bias = rng.normal(size=(40, 6)), rng.normal(size=(25, 6)), rng.normal(size=25)
    y, wrt = rng.integers(0, 25, 40), ("input", "linear_weight", "linear_bias")
    y[3] = -100
    given = {"weight": rng.uniform(0.2, 2, 25), "sample_weight": rng.choice([0, 0.5, 2], 40)}
    options = {k: given.get(k, v) for k, v in options.items()} | {"ignore_index": -100}
    value, slopes = nl.linear_cross_entropy.value_and_grad(x, w, y, linear_bias=bias, wrt=wrt, **options)
    chunked = nl.LinearCrossEntropyOptions(batch_chunk_size=7)

    def of_rank(comm):
        some, counting = parts(25, n)[comm.rank], Counting(comm)
        found = nl.linear_cross_entropy.value_and_grad(
            x, w[some], y, linear_bias=bias[some], wrt=wrt, classes=(some.start, 25), comm=counting,
            options=chunked, **options,
        )  # fmt: skip
        if n > 1:
            assert counting.gathered == [32 * 41] and counting.reduced == [40, x.nbytes]
        alone = nl.linear_cross_entropy(
            x, w[some], y, linear_bias=bias[some], classes=(some.start, 25), comm=comm, **options
        )
        assert alone == pytest.approx(float(found[0]), rel=1e-14)
        return found

    found = on_ranks(n, of_rank)
    for v, (by_input, _, _) in found:
        np.testing.assert_allclose(v, value, rtol=1e-13)
        np.testing.assert_allclose(by_input, slopes[0], rtol=1e-12, atol=1e-15)
    for k in (1, 2):
        np.testing.assert_allclose(
            np.concatenate([g[k] for _, (*g,) in found]), slopes[k], rtol=1e-12, atol=1e-15
        )


@pytest.mark.parametrize("name", ["plain", "weights", "softcap", "own"])
@pytest.mark.thin(4)
def test_many_ranks_add_up(name, rng, monkeypatch):
    """Beyond a few ranks numbers are reduced, and not gathered."""
    loss, x, y, options = drawn(name, 30, np.float64, rng)
    x[0, :20] = x[1, 9:] = -np.inf
    y[:2] = 25, 1
    value, slopes = loss.value_and_grad(x, y, reduction="none", **options)
    monkeypatch.setattr(numbaloss.class_shards, "FEW", 2)

    def of_rank(comm):
        counting, some = Counting(comm), parts(30, 8)[comm.rank]
        found = loss.value_and_grad(
            x[:, some], y, reduction="none", classes=(some.start, 30), comm=counting, **options
        )
        assert counting.gathered == [32] and counting.reduced == [40, 8 * ROWS, 24 * ROWS]
        return found

    found = on_ranks(8, of_rank)
    for v, _ in found:
        np.testing.assert_allclose(v, value, rtol=1e-13)
    got, finite = np.concatenate([g for _, g in found], axis=1), np.isfinite(value)
    np.testing.assert_allclose(got[finite], slopes[finite], rtol=1e-11, atol=1e-15)


def test_a_rank_that_fails_while_it_reads(rng, monkeypatch):
    _, x, y, _ = drawn("plain", 9, np.float64, rng)
    read = numbaloss.class_shards.Part.read

    def failing(self, numbers):
        if self.start:
            raise MemoryError("no memory")
        read(self, numbers)

    monkeypatch.setattr(numbaloss.class_shards.Part, "read", failing)
    first, second = on_ranks(
        2,
        lambda comm: nl.cross_entropy(
            x[:, 4 * comm.rank : 4 + 5 * comm.rank], y, classes=(4 * comm.rank, 9), comm=comm
        ),
    )
    assert isinstance(second, MemoryError)
    assert isinstance(first, RuntimeError) and "1 of 2 ranks failed" in str(first)


def test_classes_need_ranks(rng):
    with pytest.raises(TypeError, match="classes= needs comm="):
        nl.cross_entropy(rng.normal(size=(2, 3)), np.zeros(2, int), classes=(0, 5))

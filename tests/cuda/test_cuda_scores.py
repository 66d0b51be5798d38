"""Losses of class scores by definition: kernels interpreted, calls on an emulated device, and compiled.

The reference is `numbaloss.reference.score_loss` in float64, its gradient by differences; curvature is held
against differences of that gradient.
"""

import emulated
import numpy as np
import pytest
from emulated import CuPyArray, Tensor, host, put
from interpreter import launch
from test_cuda_softmax import (
    AMPERE,
    HOPPER,
    PLANS,
    SHAPES,
    Call,
    aligned,
    budget,
    inspect,
    small,
)
from test_device_linear import multiply

import numbaloss as nl
from numbaloss import reference
from numbaloss.kernels.cuda import binaries, linear, softmax
from numbaloss.kernels.cuda.rows import BLOCK, COLUMNS, SPLIT, STREAM, TEAM
from numbaloss.kernels.cuda.softmax import Request
from numbaloss.kernels.cuda.target import storage
from numbaloss.kernels.spec import CODES, ScoreFunctions


def focal(log_prob, rest, class_weight, gamma=2.0):
    return -class_weight * rest**gamma * log_prob


def focal_of_entropy(rest, cross_entropy, gamma=1.5):
    return rest**gamma * cross_entropy


def z_loss(cross_entropy, logsumexp, scale=0.05):
    return cross_entropy + scale * logsumexp * logsumexp


def poly_1(cross_entropy, rest, epsilon=0.7):
    return cross_entropy + epsilon * rest


def generalised(log_prob, q=0.7):
    return (1 - nl.math.exp(q * log_prob)) / q


def halved(cross_entropy, class_weight, half=0.5):
    return half * cross_entropy


def everything(log_prob, rest, class_weight, cross_entropy, logsumexp, squared=True, a=0.3):
    v = cross_entropy * logsumexp + a * class_weight * rest * cross_entropy - log_prob * logsumexp
    return v * v if squared else v


DEFINITIONS = {
    f.__name__: f for f in (focal, focal_of_entropy, z_loss, poly_1, generalised, halved, everything)
}
OF_PROBABILITIES = ("z_loss", "cross_entropy")
LOSSES = {name: nl.score_loss(f) for name, f in DEFINITIONS.items()} | {"cross_entropy": nl.cross_entropy}
REFERENCES = {name: reference.score_loss(f) for name, f in DEFINITIONS.items()}
REFERENCES["cross_entropy"] = reference.cross_entropy
REFERENCES["generalised"] = reference.score_loss(lambda log_prob, q=0.7: (1 - np.exp(q * log_prob)) / q)


def functions_of(name):
    """A definition as kernels take it, with the numbers that its options are."""
    loss = LOSSES[name].Class
    return loss._functions({n: loss.fields[n].default for n in loss._option_names})


# ---- kernels, interpreted ----------------------------------------------------------------------------------


class Defined(Call):
    """A call of a definition: its numbers in float64, and as a kernel finds them."""

    def __init__(self, name, shape, dtype=np.float32, seed=0, smoothing=0.0, softcap=None, lse=0.0):
        super().__init__(*shape, dtype=dtype, seed=seed, smoothing=smoothing)
        self.x = (self.x / 3).astype(dtype)
        self.name, self.softcap, self.lse = name, softcap, lse

    def terms(self, x, q=None):
        """The rows' terms, times what weighs them."""
        target = self.labels if self.q is None else (self.q.astype(float) if q is None else q)
        terms = REFERENCES[self.name](
            x,
            target,
            weight=None if self.weight is None else self.weight.astype(float),
            label_smoothing=self.smoothing,
            reduction="none",
            softcap=self.softcap,
            lse_square_scale=self.lse,
        )
        return terms if self.sample_weight is None else terms * self.sample_weight

    def slopes(self, x, step=1e-6):
        """The gradient of each row's term by its scores: all rows at once, a class at a time."""
        found = np.empty(x.shape)
        for c in range(x.shape[1]):
            high, low = x.copy(), x.copy()
            high[:, c] += step
            low[:, c] -= step
            found[:, c] = (self.terms(high) - self.terms(low)) / (2 * step)
        return found

    def expected(self, curvature):
        """Terms, gradient, that by probabilities, curvature."""
        x, up = self.x.astype(float), 1.0 if self.upstream is None else self.upstream[:, None].astype(float)
        by_target = bend = None
        if self.q is not None:
            by_target, q, step = np.empty(x.shape), self.q.astype(float), 1e-6
            for c in range(x.shape[1]):
                high, low = q.copy(), q.copy()
                high[:, c] += step
                low[:, c] -= step
                by_target[:, c] = (self.terms(x, high) - self.terms(x, low)) / (2 * step)
            by_target = up * by_target
        if curvature:
            bend, step = np.empty(x.shape), 1e-4
            for c in range(x.shape[1]):
                high, low = x.copy(), x.copy()
                high[:, c] += step
                low[:, c] -= step
                middle = self.terms(x)
                bend[:, c] = (self.terms(high) - 2 * middle + self.terms(low)) / step**2
            bend = up * bend
        return {
            "terms": self.terms(x),
            "grad": up * self.slopes(x),
            "target_grad": by_target,
            "curvature": bend,
        }

    def run(self, plan, curvature=True, target_grad=False, vectors=True, order="random", by_weight=False):
        batch, classes, inner = self.shape
        n, T = batch * inner, self.T
        functions, numbers = functions_of(self.name)
        request = Request(
            has_probabilities=self.q is not None,
            smoothed=self.smoothing > 0,
            weighted=self.weight is not None,
            sample_weighted=self.sample_weight is not None,
            upstream=self.upstream is not None,
            terms=True,
            grad=True,
            target_grad=target_grad,
            curvature=curvature,
            by_weight=by_weight,
            softcap=self.softcap is not None,
            lse_square=self.lse != 0,
        )
        given = self.x, self.q, self.weight, self.sample_weight, self.upstream
        x, q, weight, sample_weight, upstream = (None if a is None else aligned(a) for a in given)

        def blank(wanted, size):
            return aligned(np.full(size, np.nan, self.dtype)) if wanted else None

        made = dict(
            terms=blank(True, n),
            grad=blank(True, x.size),
            target_grad=blank(target_grad, x.size),
            curvature=blank(curvature, x.size),
        )
        partials = np.full(2 * plan.partials, np.nan, T)
        scratch = np.full(plan.blocks * softmax.STATE, np.nan, T) if plan.variant == SPLIT else None
        arguments = (
            x, q, None if q is not None else self.labels.reshape(-1), weight, sample_weight, upstream,
            *made.values(), batch, classes, inner, plan.deal, -100, T(1 - self.smoothing),
            T(self.smoothing / classes) if request.has_probabilities or request.smoothed else None,
            None if self.softcap is None else T(self.softcap), T(self.lse) if self.lse else None,
            tuple(map(T, numbers)), T(1), None, partials,
            None if q is not None else np.zeros(1, np.int64), scratch,
        )  # fmt: skip
        for kernel in softmax.kernels(functions, request, self.code, plan, vectors):
            launch(kernel, plan.blocks, plan.threads, *arguments, order=order, seed=3)
        found = {k: a.astype(float) for k, a in made.items() if a is not None}
        return {k: a.reshape((batch, inner) if k == "terms" else self.shape) for k, a in found.items()}


def check(call, result):
    """Within float32's roundings of the terms that are added up, and the differences' own error."""
    for name, wanted in call.expected("curvature" in result).items():
        if name in result:
            size = max(1.0, float(np.abs(wanted).max()))
            bound = 2e-4 if name == "curvature" else 2e-5
            if call.T is np.float64:
                bound = 2e-6 if name == "curvature" else 1e-8
            np.testing.assert_allclose(result[name], wanted, rtol=bound, atol=bound * size, err_msg=name)


SETTINGS = {
    "plain": dict(),
    "weighted": dict(weights="cru"),
    "smoothed": dict(weights="cru", smoothing=0.1),
    "capped": dict(weights="ru", softcap=2.0, lse=0.05),
    "all": dict(weights="cru", softcap=2.0, lse=0.05, smoothing=0.1),
}
WIDE = {TEAM: (9, 24, 1), BLOCK: (3, 136, 1), STREAM: (2, 296, 1), SPLIT: (2, 300, 1), COLUMNS: (2, 7, 24)}


def some_call(name, shape, setting, probable=False, dtype=np.float32, seed=0):
    given = dict(SETTINGS[setting])
    weights = given.pop("weights", "")
    call = Defined(name, shape, dtype, seed, **given)
    call.weigh("c" in weights, "r" in weights, "u" in weights)
    return call.probabilities() if probable else call


CAPPED = [("cross_entropy", "capped"), ("cross_entropy", "all")]


@pytest.mark.parametrize(
    "name, setting", [*(("everything", s) for s in SETTINGS), ("z_loss", "smoothed"), *CAPPED]
)
@pytest.mark.parametrize("variant", WIDE)
def test_labels(variant, name, setting):
    call = some_call(name, WIDE[variant], setting)
    check(call, call.run(small(variant, call.shape)))


@pytest.mark.parametrize("name", [n for n in DEFINITIONS if n not in ("everything", "z_loss")])
@pytest.mark.parametrize("variant", WIDE)
def test_definitions(variant, name):
    call = some_call(name, WIDE[variant], "weighted", seed=1)
    check(call, call.run(small(variant, call.shape), curvature=variant in (TEAM, COLUMNS)))


@pytest.mark.parametrize("name, setting", [*(("z_loss", s) for s in SETTINGS), *CAPPED])
@pytest.mark.parametrize("variant", WIDE)
def test_probabilities(variant, name, setting):
    call = some_call(name, WIDE[variant], setting, probable=True, seed=2)
    check(call, call.run(small(variant, call.shape), target_grad=True))


@pytest.mark.parametrize("deal", [0, 2])
@pytest.mark.parametrize("setting", ["weighted", "all"])
def test_slices_of_columns(deal, setting):
    call = some_call("everything", (2, 11, 24), setting, seed=3)
    check(call, call.run(small(COLUMNS, call.shape, deal)))


@pytest.mark.parametrize("variant", [TEAM, COLUMNS])
def test_float64(variant):
    for probable, name in ((False, "everything"), (True, "z_loss")):
        call = some_call(name, WIDE[variant], "all", probable, np.float64, seed=4)
        check(call, call.run(small(variant, call.shape), target_grad=probable))


@pytest.mark.parametrize("variant", SHAPES)
def test_rows_that_count_nothing_are_not_read(variant):
    for name in ("focal", "z_loss"):
        call = some_call(name, WIDE[variant], "all", seed=5)
        call.labels.reshape(-1)[0] = -100
        call.sample_weight.reshape(-1)[-1] = 0
        dead = (call.labels == -100) | (call.sample_weight == 0)
        clean = call.run(small(variant, call.shape))
        hidden = np.broadcast_to(dead[:, None], call.shape)
        call.x = np.where(hidden, np.float32(np.nan), call.x)
        dirty = call.run(small(variant, call.shape))
        for k in clean:
            np.testing.assert_array_equal(dirty[k], clean[k])
        assert not dirty["grad"][hidden].any() and not dirty["terms"][dead].any()


def test_a_class_without_weight_counts_unless_the_loss_is_a_multiple_of_cross_entropy():
    for name in ("generalised", "z_loss", "halved"):
        call = some_call(name, WIDE[TEAM], "weighted", seed=6)
        call.weight[call.labels[0, 0]] = 0
        call.sample_weight[...] = 1
        result = call.run(small(TEAM, call.shape))
        check(call, result)
        assert bool(result["terms"][0, 0]) == (name != "halved")


# ---- calls -------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    driver = emulated.install(monkeypatch)
    monkeypatch.setattr(linear, "multiply", multiply)
    return driver


def sample(shape, probable=False, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(dtype)
    axis = 0 if len(shape) == 1 else 1
    rows = shape[:axis] + shape[axis + 1 :]
    target = rng.random(shape).astype(dtype) if probable else np.asarray(rng.integers(0, shape[axis], rows))
    return {"input": x, "target": target}


def moved(arrays, kind=CuPyArray):
    return {n: put(kind, a) if isinstance(a, np.ndarray) else a for n, a in arrays.items()}


def exact(name, call, wrt=None, up=None):
    wide = {
        n: a.astype(float) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a
        for n, a in call.items()
    }
    return REFERENCES[name](**wide) if wrt is None else reference.gradient(REFERENCES[name], wide, wrt, up)


def near(got, wanted, bound=2e-5):
    got = host(got)
    size = max(1.0, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(got.astype(float), wanted, rtol=bound, atol=bound * size)


@pytest.mark.parametrize("shape", [(5,), (6, 8), (2, 5, 4)], ids=str)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_quick_and_general_calls(gpu, name, shape):
    arrays = sample(shape)
    for options in (dict(), dict(reduction="sum"), dict(label_smoothing=0.2)):
        call = {**arrays, **options}
        given = moved(arrays)
        value, gradient = LOSSES[name].value_and_grad(given["input"], given["target"], **options)
        near(value, exact(name, call))
        near(gradient, exact(name, call, "input"))
        general, slope = LOSSES[name].value_and_grad(**given, **options, wrt=("input",))
        near(general, host(value), 1e-6)
        near(slope[0], host(gradient), 1e-6)
    weighted = {**arrays, "weight": np.linspace(0.5, 2, shape[min(1, len(shape) - 1)]).astype("f4")}
    value, gradient = LOSSES[name].value_and_grad(**moved(weighted))
    near(value, exact(name, weighted))
    near(gradient, exact(name, weighted, "input"))
    assert emulated.prepared_calls()


def test_an_option_changes_numbers_and_not_the_kernel(gpu):
    given = moved(sample((6, 8)))
    x, y = given["input"], given["target"]
    LOSSES["focal"](x, y)
    known = len(binaries._kernels)
    for gamma in (0.5, 3.0):
        near(LOSSES["focal"](x, y, gamma=gamma), exact("focal", {**sample((6, 8)), "gamma": gamma}))
    assert len(binaries._kernels) == known


def test_softcap_and_squared_logsumexp_in_quick_calls(gpu):
    arrays = sample((6, 8))
    options = dict(softcap=1.5, lse_square_scale=0.1)
    given = moved(arrays)
    value, gradient = nl.cross_entropy.value_and_grad(given["input"], given["target"], **options)
    near(value, exact("cross_entropy", {**arrays, **options}))
    near(gradient, exact("cross_entropy", {**arrays, **options}, "input"))
    plain = nl.cross_entropy(given["input"], given["target"])
    near(plain, exact("cross_entropy", arrays))


@pytest.mark.parametrize("kind", [CuPyArray, Tensor])
@pytest.mark.parametrize("name", OF_PROBABILITIES)
def test_gradients_by_probabilities_and_class_weights(gpu, name, kind):
    rng = np.random.default_rng(1)
    for shape, reduction in (((5, 6), "mean"), ((2, 6, 3), "none")):
        arrays = sample(shape, True)
        arrays["target"].reshape(-1)[::4] = 0
        rows = shape[:1] + shape[2:]
        call = {
            **arrays,
            "weight": rng.uniform(0.5, 2, 6).astype("f4"),
            "sample_weight": rng.uniform(0.5, 2, rows).astype("f4"),
            "label_smoothing": 0.1,
            "reduction": reduction,
        }
        if name == "cross_entropy":
            call |= dict(softcap=1.5, lse_square_scale=0.1)
        up = rng.normal(size=rows).astype("f4") if reduction == "none" else None
        wrt = ("weight", "input", "target")
        given = moved({**call, "grad_output": up} if up is not None else call, kind)
        value, gradients = LOSSES[name].value_and_grad(**given, wrt=wrt)
        near(value, exact(name, call))
        for n, g in zip(wrt, gradients, strict=True):
            near(g, exact(name, call, n, up))


@nl.score_loss
def squared_entropy(cross_entropy, scale=0.5):
    return scale * cross_entropy * cross_entropy


def test_class_weights_where_the_slope_depends_on_the_row(gpu):
    arrays = sample((5, 6), True)
    call = {**arrays, "weight": np.linspace(0.5, 2, 6).astype("f4"), "label_smoothing": 0.2}
    REFERENCES["squared"] = reference.score_loss(lambda cross_entropy, scale=0.5: scale * cross_entropy**2)
    gradients = squared_entropy.grad(**moved(call), wrt=("weight", "target"))
    for n, g in zip(("weight", "target"), gradients, strict=True):
        near(g, exact("squared", call, n))


@pytest.mark.parametrize("name", ["focal", "z_loss", "cross_entropy"])
def test_curvature(gpu, name):
    arrays = sample((4, 5))
    call = {**arrays, "weight": np.linspace(0.5, 2, 5).astype("f4"), "label_smoothing": 0.1}
    if name == "cross_entropy":
        call |= dict(softcap=1.5, lse_square_scale=0.1)
    value, gradient, curvature = LOSSES[name].value_grad_hess(**moved(call))
    near(value, exact(name, call))
    near(gradient, exact(name, call, "input"))
    wanted, step = np.empty((4, 5)), 1e-4
    for k in np.ndindex(4, 5):
        moved_by = [{**call, "input": call["input"].astype(float)} for _ in range(2)]
        moved_by[0]["input"][k] += step
        moved_by[1]["input"][k] -= step
        high, low = (exact(name, c) for c in moved_by)
        wanted[k] = (high - 2 * exact(name, call) + low) / step**2
    near(curvature, wanted, 1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(gpu, dtype, bfloat16):
    dtype = bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    arrays = sample((6, 8), dtype=dtype)
    value, gradient = LOSSES["focal"].value_and_grad(**moved(arrays, Tensor))
    bound = {"float16": 2e-3, "bfloat16": 1e-2, "float64": 1e-8}[dtype.name]
    wide = {**arrays, "input": arrays["input"].astype(float)}
    near(value, exact("focal", wide), bound)
    near(gradient, exact("focal", wide, "input"), bound)
    assert host(gradient).dtype == dtype


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("inner", [(), (3,)], ids=str)
def test_linear_cross_entropy(gpu, inner, kind):
    rng = np.random.default_rng(2)
    target = np.asarray(rng.integers(0, 7, (8, *inner)))
    if kind == "probabilities":
        target = rng.random((8, 7, *inner)).astype("f4")
    call = {
        "input": rng.normal(size=(8, 5)).astype("f4"),
        "linear_weight": rng.normal(size=(7, *inner, 5)).astype("f4"),
        "target": target,
        "weight": rng.uniform(0.5, 2, 7).astype("f4"),
    }
    wrt = ("input", "linear_weight")
    if kind == "probabilities":
        wrt += ("weight", "target")
    else:
        call["weight"][2] = 0  # its rows still have a squared logsumexp
        target.reshape(-1)[:2] = 2
    for options in (
        dict(softcap=2.0),
        dict(lse_square_scale=0.1),
        dict(softcap=2.0, lse_square_scale=0.1, label_smoothing=0.1),
    ):
        wide = {n: a.astype(float) if a.dtype.kind == "f" else a for n, a in call.items()} | options
        chunks = nl.LinearCrossEntropyOptions(batch_chunk_size=3)
        value, gradients = nl.linear_cross_entropy.value_and_grad(
            **moved(call), **options, options=chunks, wrt=wrt
        )
        near(value, reference.linear_cross_entropy(**wide))
        for n, g in zip(wrt, gradients, strict=True):
            near(g, reference.gradient(reference.linear_cross_entropy, wide, n))
        on_host = nl.linear_cross_entropy.value_and_grad(**call, **options, wrt=wrt)
        near(value, on_host[0])


# ---- the kernel's identity ---------------------------------------------------------------------------------


def test_an_edit_of_the_definition_makes_another_kernel():
    def identity(value, options=(None,), statistics=("log_prob",)):
        functions = ScoreFunctions("edited", value, statistics, options)
        made = softmax.kernels(functions, Request(grad=True), CODES["float32"], PLANS[TEAM])
        on_disk = binaries._identity(softmax.compile_kernels, {"functions": functions})
        return made[0].__qualname__, on_disk

    def first(log_prob, q):
        return -q * log_prob

    def same(log_prob, q):
        return -q * log_prob

    def edited(log_prob, q):
        return -2 * q * log_prob

    before = identity(first)
    assert identity(same) == before
    for other in (identity(edited), identity(first, (True,)), identity(first, statistics=("rest",))):
        assert all(a != b for a, b in zip(other, before, strict=True))


# ---- compiled ----------------------------------------------------------------------------------------------

REQUESTS = {
    "gradient": Request(grad=True),
    "weighted": Request(
        smoothed=True, weighted=True, sample_weighted=True, grad=True, terms=True, upstream=True
    ),
    "curvature": Request(grad=True, curvature=True),
    "capped": Request(grad=True, softcap=True, lse_square=True),
    "probabilities": Request(has_probabilities=True, weighted=True, grad=True, target_grad=True),
}
COVERING = [
    ("gradient", "float32", HOPPER, True),
    ("gradient", "bfloat16", AMPERE, True),
    ("weighted", "float32", AMPERE, False),
    ("curvature", "float32", HOPPER, True),
    ("capped", "bfloat16", HOPPER, True),
    ("probabilities", "float32", AMPERE, True),
]
OF_REQUEST = {"probabilities": ("z_loss",), "capped": ("cross_entropy",)}
SELECTED = [
    (plan, what, dtype, cc, vectors, name)
    for n, plan in enumerate(PLANS)
    for what, dtype, cc, vectors in COVERING
    for k, name in enumerate(OF_REQUEST.get(what, ("focal", "z_loss", "poly_1", "generalised")))
    if (what == "gradient" and dtype == "float32" and k == 0) or ((k + n) % 4 == 0 and (n + len(what)) % 2)
]


def compiled(plan, what, dtype, cc, vectors, name):
    """A definition's kernels."""
    functions, _ = functions_of(name)
    return softmax.compile_kernels(
        functions, REQUESTS[what], CODES[dtype], cc, PLANS[plan], divided=what == "weighted", vectors=vectors
    )


@pytest.mark.parametrize("plan, what, dtype, cc, vectors, name", SELECTED)
def test_compiled(plan, what, dtype, cc, vectors, name):
    r = REQUESTS[what]
    for k, binary in enumerate(compiled(plan, what, dtype, cc, vectors, name)):
        inspect(
            binary,
            CODES[dtype],
            vectors,
            not (plan == SPLIT and k == 0),
            budget(plan, what, CODES[dtype], cc),
        )
        assert r.grad and storage(CODES[dtype]).width

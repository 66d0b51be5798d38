"""Losses in JAX programs, against the same formulas in ``jax.numpy`` and their ``jax.grad``."""

import doctest
import importlib
import sys

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import numbaloss as nl  # noqa: E402
import numbaloss.jax as module  # noqa: E402

RNG = np.random.default_rng(3)
X, Y = RNG.normal(0, 2, (2, 6, 4)).astype(np.float32)
LABELS = RNG.integers(0, 4, 6)
W = np.linspace(0.5, 2, 4).astype(np.float32)


@nl.elementwise_loss
def log_cosh(input, target, scale=1.0):
    d = abs((input - target) / scale)
    return d + nl.math.log1p(nl.math.exp(-2 * d)) - 0.6931471805599453


@pytest.fixture
def x64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(params=["buffers", "copies"])
def callback(request, monkeypatch):
    """Both ways to call back; the second is that of older versions of JAX."""
    if request.param == "copies":
        monkeypatch.setattr(module, "buffer_callback", None)
    elif module.buffer_callback is None:
        pytest.skip("this JAX has no buffer_callback")
    return request.param


def huber(x, y, delta):
    r = jnp.abs(x - y)
    return jnp.where(r <= delta, r * r / 2, delta * (r - delta / 2))


def entropy(x, labels, weight):
    log_p = jax.nn.log_softmax(x)
    w = weight[labels]
    return -(w * log_p[jnp.arange(len(labels)), labels]).sum() / w.sum()


def close(got, wanted, rtol=1e-5, atol=1e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=rtol, atol=atol)


def test_value_and_gradients_under_jit(callback):
    ours = lambda x, y: 3 * module.huber_loss(2 * x, y, delta=0.7)
    theirs = lambda x, y: 3 * huber(2 * x, y, 0.7).mean()
    for wrap in (lambda f: f, jax.jit):
        close(wrap(ours)(X, Y), theirs(X, Y))
        close(wrap(jax.grad(ours))(X, Y), jax.grad(theirs)(X, Y))
        both = jax.value_and_grad(ours, (0, 1)), jax.value_and_grad(theirs, (0, 1))
        close(wrap(both[0])(X, Y), both[1](X, Y))
    assert np.asarray(ours(X, Y)) == 3 * nl.huber_loss(2 * X, Y, delta=0.7)


def test_a_training_step_and_class_scores(callback):
    A = RNG.normal(size=(6, 5)).astype(np.float32)
    B = RNG.normal(size=(5, 4)).astype(np.float32)
    ours = lambda b: module.cross_entropy(A @ b, LABELS, weight=W) + 0.1 * (b**2).sum()
    theirs = lambda b: entropy(A @ b, LABELS, W) + 0.1 * (b**2).sum()
    close(jax.jit(jax.value_and_grad(ours))(B), jax.value_and_grad(theirs)(B))
    q = jax.nn.softmax(Y)
    ours = lambda x, q: module.cross_entropy(x, q, reduction="sum", label_smoothing=0.2)
    theirs = lambda x, q: -((0.8 * q + 0.05) * jax.nn.log_softmax(x)).sum()
    close(jax.jit(jax.grad(ours, (0, 1)))(X, q), jax.grad(theirs, (0, 1))(X, q), atol=1e-5)


def test_terms_and_what_multiplies_them(callback):
    up = RNG.normal(size=(6, 4)).astype(np.float32)
    ours = lambda x, u: (u * module.huber_loss(x, Y, reduction="none")).sum()
    theirs = lambda x, u: (u * huber(x, Y, 1.0)).sum()
    close(jax.jit(jax.value_and_grad(ours, (0, 1)))(X, up), jax.value_and_grad(theirs, (0, 1))(X, up))
    rows = lambda x: (up[:, 0] * module.cross_entropy(x, LABELS, reduction="none")).sum()
    formula = lambda x: -(up[:, 0] * jax.nn.log_softmax(x)[jnp.arange(6), LABELS]).sum()
    close(jax.jit(jax.grad(rows))(X), jax.grad(formula)(X))


@pytest.mark.parametrize(
    ("name", "arrays", "rows"),
    [
        ("mse_loss", (X, Y), (6, 4)),
        ("nll_loss", (X, LABELS), (6,)),
        ("multi_margin_loss", (X, LABELS), (6,)),
        ("multilabel_soft_margin_loss", (X, (Y > 0).astype(np.float32)), (6,)),
        ("cosine_embedding_loss", (X, Y, np.array([1, -1] * 3)), (6,)),
        ("triplet_margin_with_distance_loss", (X, Y, Y[::-1].copy()), (6,)),
        ("linear_cross_entropy", (X, Y, LABELS), (6,)),
        ("gaussian_nll_loss", (X, Y, np.ones((6, 1), np.float32)), (6, 4)),
    ],
)
def test_every_family(name, arrays, rows):
    """The same numbers as outside of JAX, whose own tests say that they are right."""
    loss, ours = nl.registry[name], getattr(module, name)
    if name == "linear_cross_entropy":
        arrays = (X, RNG.normal(size=(5, 4)).astype(np.float32), LABELS)
    wrt = loss.Class._default_wrt()
    wrt = (wrt,) if isinstance(wrt, str) else wrt
    places = tuple(loss.Class._required.index(n) for n in wrt)
    value, gradients = jax.jit(jax.value_and_grad(ours, places))(*arrays)
    wanted, by = loss.value_and_grad(*arrays, wrt=wrt)
    assert np.asarray(value) == wanted
    for a, b in zip(gradients, by, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    terms = jax.jit(lambda *a: ours(*a, reduction="none"))(*arrays)
    assert terms.shape == rows
    np.testing.assert_array_equal(terms, loss(*arrays, reduction="none"))


def test_sequences():
    log_p = np.log(RNG.dirichlet(np.ones(4), (7, 2))).astype(np.float32)
    arrays = log_p, np.array([1, 2, 3, 1]), np.array([7, 6]), np.array([3, 1])
    value, gradient = jax.jit(jax.value_and_grad(module.ctc_loss))(*arrays)
    wanted, by = nl.ctc_loss.value_and_grad(*arrays)
    assert np.asarray(value) == wanted
    np.testing.assert_array_equal(gradient, by)


def test_dtypes(x64, callback):
    for dtype, rtol in ((jnp.float64, 1e-12), (jnp.float32, 1e-5), (jnp.bfloat16, 0.02), (jnp.float16, 3e-3)):
        x, y = jnp.asarray(X, dtype), jnp.asarray(Y, dtype)
        got = jax.jit(jax.value_and_grad(module.mse_loss))(x, y)
        wide = x.astype(jnp.float64), y.astype(jnp.float64)
        wanted = jax.value_and_grad(lambda x, y: ((x - y) ** 2).mean())(*wide)
        assert got[0].dtype == got[1].dtype == dtype
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(a, float), b, rtol=rtol, atol=1e-12)
    mixed = jax.grad(module.mse_loss, (0, 1))(jnp.asarray(X), jnp.asarray(Y, jnp.float64))
    assert [g.dtype for g in mixed] == [jnp.float32, jnp.float64]


def test_own_losses_criteria_and_sums(callback):
    ours = module.function(log_cosh)
    close(jax.grad(ours)(X, Y, scale=2.0), np.tanh((X - Y) / 2) / 2 / X.size)
    criterion = nl.HuberLoss(delta=0.5)
    of_criterion = module.function(criterion)
    criterion.delta = 9.0
    close(jax.jit(of_criterion)(X, Y), huber(X, Y, 0.5).mean())
    for made in (0.5 * nl.MSELoss() + log_cosh.Class(), nl.MSELoss() + nl.L1Loss(reduction="sum")):
        ours = module.function(made)
        value, gradient = jax.jit(jax.value_and_grad(ours))(X, Y)
        wanted, by = made.value_and_grad(X, Y)
        assert np.asarray(value) == wanted
        np.testing.assert_array_equal(gradient, by)
    with pytest.raises(TypeError, match="pass the function linear_cross_entropy, which takes them"):
        module.function(nl.LinearCrossEntropyLoss(3, 4))
    with pytest.raises(TypeError, match="loss must be a loss"):
        module.function(np.square)


def test_weights_and_normalizer():
    w = RNG.random(6).astype(np.float32)
    ours = lambda x: module.cross_entropy(x, LABELS, sample_weight=w, normalizer=3.0)
    theirs = lambda x: -(w * jax.nn.log_softmax(x)[jnp.arange(6), LABELS]).sum() / 3
    close(jax.jit(jax.value_and_grad(ours))(X), jax.value_and_grad(theirs)(X))
    by_weight = jax.grad(lambda v: module.mse_loss(X, Y, weight=v))(jnp.ones((6, 4)))
    terms = (X - Y) ** 2
    close(by_weight, ((terms - terms.mean()) / 24).astype(np.float32))


def test_vmap_calls_one_after_the_other(callback):
    ours = jax.vmap(lambda x, y: module.huber_loss(x, y))
    close(ours(X, Y), huber(X, Y, 1.0).mean(axis=1))
    gradients = jax.jit(jax.vmap(jax.grad(module.huber_loss), in_axes=(0, None)))(X, Y[0])
    close(gradients, jax.vmap(jax.grad(lambda x: huber(x, Y[0], 1.0).mean()))(X))


def test_scan_and_checkpoint():
    def step(x, _):
        value, gradient = jax.value_and_grad(module.mse_loss)(x, Y)
        return x - 5 * gradient, value

    last, values = jax.jit(lambda x: jax.lax.scan(step, x, None, length=4))(X)
    np.testing.assert_allclose(values[-1], values[0] * (1 - 10 / 24) ** 6, rtol=1e-4)
    again = jax.jit(jax.grad(jax.checkpoint(lambda x: module.mse_loss(jnp.tanh(x), Y))))(last)
    close(again, jax.grad(lambda x: ((jnp.tanh(x) - Y) ** 2).mean())(last))


def test_gradients_alone_that_are_asked_for(monkeypatch):
    seen = []
    compute = module.Task.compute
    monkeypatch.setattr(
        module.Task,
        "compute",
        lambda self, *given: (seen.append((self.mode, self.wrt)), compute(self, *given))[1],
    )
    jax.block_until_ready(module.mse_loss(X, Y))
    jax.block_until_ready(jax.jit(jax.grad(module.mse_loss))(X, Y))
    jax.block_until_ready(jax.grad(module.mse_loss, 1)(X, Y))
    assert seen == [("value", ()), ("value_and_grad", ("input",)), ("value_and_grad", ("target",))]


def test_gradients_are_written_where_jax_has_them(monkeypatch):
    """And arguments are read there: nothing is copied."""
    if module.buffer_callback is None:
        pytest.skip("this JAX has no buffer_callback")
    seen = {}

    def compute(self, results, arrays):
        seen.update(input=arrays[0].ctypes.data, grad=results[1].ctypes.data)
        results[0][...], results[1][...] = 7, 1

    x = jnp.asarray(X) + 1
    monkeypatch.setattr(module.Task, "compute", compute)
    value, gradient = jax.jit(jax.value_and_grad(module.l1_loss))(x, Y)
    assert seen["input"] == x.unsafe_buffer_pointer() and seen["grad"] == gradient.unsafe_buffer_pointer()
    assert float(value) == 7 and (gradient == 1).all()


def test_errors_when_traced_and_when_run():
    with pytest.raises(ValueError, match="huber_loss: delta must be > 0, got -1"):
        jax.jit(lambda x: module.huber_loss(x, Y, delta=-1.0))(X)
    with pytest.raises(ValueError, match=r"mse_loss: target must have input's shape \(6, 4\), got \(5, 4\)"):
        jax.jit(module.mse_loss)(X, Y[1:])
    with pytest.raises(TypeError, match="huber_loss: delta must be known when the program is compiled"):
        jax.jit(lambda x, d: module.huber_loss(x, Y, delta=d))(X, 1.0)
    with pytest.raises(TypeError, match="huber_loss: out is no argument here: use jax.grad"):
        module.huber_loss(X, Y, out=X)
    with pytest.raises(TypeError, match="mse_loss: is not differentiated by sample_weight"):
        jax.grad(lambda w: module.mse_loss(X, Y, sample_weight=w))(jnp.ones((6, 4)))
    with pytest.raises(TypeError, match="mse_loss: got multiple values for target"):
        module.mse_loss(X, Y, target=Y)
    with pytest.raises(TypeError, match="mse_loss: takes at most"):
        module.mse_loss(X, Y, "mean", None, 1)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018 - it raises
    with pytest.raises(Exception, match="second derivatives|JVP|custom_jvp|custom_vjp"):
        jax.hessian(module.mse_loss)(X, Y)
    with pytest.raises(Exception, match=r"target\[2\] is 9, but input has 4 classes"):
        labels = LABELS.copy()
        labels[2] = 9
        jax.block_until_ready(jax.jit(module.cross_entropy)(X, labels))


def test_unknown_and_missing_arguments_are_refused():
    for loss in (nl.mse_loss, nl.MSELoss() + nl.L1Loss(reduction="sum")):
        with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
            module.function(loss)(X, Y, gamma=2.0)
        with pytest.raises(TypeError, match="missing required argument: target"):
            module.function(loss)(X)


def test_without_jax_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "numbaloss.jax")
    with pytest.raises(ImportError, match="numbaloss.jax needs JAX: pip install jax"):
        importlib.import_module("numbaloss.jax")


def test_the_same_call_is_compiled_once(callback, caplog):
    """Without ``jax.jit`` too: JAX knows a callback again that is equal to one before."""
    jax.grad(module.mse_loss)(X, Y)
    with jax.log_compiles():
        jax.grad(module.mse_loss)(X, Y)
        assert "Compiling" not in caplog.text
        jax.grad(module.mse_loss)(X[1:], Y[1:])
        assert "Compiling" in caplog.text


def test_names_and_documents():
    assert module.huber_loss is module.huber_loss and module.huber_loss.__name__ == "huber_loss"
    assert "delta" in module.huber_loss.__doc__ and set(nl.registry) < set(module.__all__)


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="scalars print differently")
def test_docstring_examples():
    assert not doctest.testmod(module).failed

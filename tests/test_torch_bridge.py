"""numbaloss.torch: gradients by finite differences and PyTorch's own losses, and all that tensors go through.

PyTorch's own functions are the oracle where it has the loss, `torch.autograd.gradcheck` everywhere.
"""

import copy
import doctest
import gc
import inspect
import io
import pickle
import weakref

import numpy as np
import pytest
from sweeps import sweep

import numbaloss as nl
from numbaloss import testing
from numbaloss.loss import LossFunction, registry

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import numbaloss.torch as nt  # noqa: E402

F = torch.nn.functional

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # of kl_div


@nl.elementwise_loss
def quartic(input, target, scale=1.0):
    return scale * (input - target) ** 4


@nl.score_loss
def squared_entropy(cross_entropy, power=2.0):
    return cross_entropy**power


class Spring(nl.VectorLoss):
    length: float = 1.0

    def terms(x, y):
        return (x - y) ** 2

    def finish(total, stiffness, length):
        return stiffness * (nl.math.sqrt(total) - length) ** 2


def tensors(loss, rng, shape=(3, 4), wrt=None, dtype=torch.float64):
    """Samples for a loss, of which those in `wrt` require grad: by default those that a model produces."""
    name = loss.__name__
    arrays = testing.samples(loss, rng, (8, 2, 4) if name == "ctc_loss" else shape)
    if "var" in arrays:  # off the bound of its domain, where no difference can be taken
        arrays["var"] = arrays["var"].clip(0.1)
    made = {n: torch.from_numpy(a) for n, a in arrays.items()}
    made = {n: t.to(dtype) if t.is_floating_point() else t for n, t in made.items()}
    wrt = loss.Class._default_wrt() if wrt is None else wrt
    for n in (wrt,) if isinstance(wrt, str) else wrt:
        made[n].requires_grad_()
    return made


def normalized(loss, call):
    """A call with log-probabilities that are such: the gradient of ctc_loss takes them for that."""
    return {n: t.log_softmax(-1) if n == "log_probs" else t for n, t in call.items()}


def check(function, call, **options):
    """Compare with finite differences, by each tensor that requires grad."""
    wrt = [n for n, t in call.items() if t.requires_grad]

    def of(*values):
        return function(**{**call, **dict(zip(wrt, values, strict=True))}, **options)

    return torch.autograd.gradcheck(of, [call[n] for n in wrt])


@pytest.fixture
def calls(monkeypatch):
    """The modes in which losses are called, and with which arrays."""
    seen = []
    run = LossFunction._run

    def spy(self, mode, args, kwargs):
        result = run(self, mode, args, kwargs)
        seen.append((mode, args, result))
        return result

    monkeypatch.setattr(LossFunction, "_run", spy)
    return seen


# ---- names and gradients, of all losses ---------------------------------------------------------------


@pytest.mark.parametrize("name", registry)
def test_names_and_signatures(name):
    loss = registry[name]
    parameters = inspect.signature(getattr(nt, name)).parameters
    assert [(n, p.kind, p.default) for n, p in parameters.items()] == [
        (n, p.kind, p.default) for n, p in loss.without_ranks.parameters.items()
    ]
    assert issubclass(getattr(nt, loss.Class.__name__), torch.nn.Module)
    assert {name, loss.Class.__name__} <= {*nt.__all__}


@pytest.mark.parametrize("name", registry)
def test_gradcheck(name, rng):
    loss, function = registry[name], getattr(nt, name)
    call = tensors(loss, rng)
    assert check(lambda **c: function(**normalized(loss, c)), call)


# What PyTorch has, at options that are not the default.
PEERS = {
    "binary_cross_entropy": {},
    "binary_cross_entropy_with_logits": {},
    "kl_div": {},
    "soft_margin_loss": {},
    "hinge_embedding_loss": {"margin": 0.5},
    "cosine_embedding_loss": {"margin": 0.1},
    "triplet_margin_loss": {"swap": True},
    "linear_cross_entropy": {"label_smoothing": 0.1},
    "cross_entropy": {"label_smoothing": 0.1},
    "nll_loss": {},
    "multi_margin_loss": {"margin": 0.5},
    "multilabel_margin_loss": {},
    "multilabel_soft_margin_loss": {},
    "l1_loss": {},
    "mse_loss": {},
    "smooth_l1_loss": {"beta": 0.5},
    "huber_loss": {"delta": 0.5},
    "poisson_nll_loss": {"full": True},
    "gaussian_nll_loss": {"full": True},
    "margin_ranking_loss": {"margin": 0.5},
    "ctc_loss": {"zero_infinity": True},
}


@pytest.mark.parametrize(
    "name",
    sweep(PEERS, "mse_loss", "triplet_margin_loss", "linear_cross_entropy", "cross_entropy", "ctc_loss"),
)
def test_equal_to_pytorch(name, rng):
    """Values and gradients of float32, of terms too, each times an upstream gradient of its own."""
    loss, options = registry[name], PEERS[name]
    call = tensors(loss, rng, (5, 7), dtype=torch.float32)
    wrt = [n for n, t in call.items() if t.requires_grad]
    for reduction in ("mean", "none"):
        ours = getattr(nt, name)(**normalized(loss, call), **options, reduction=reduction)
        theirs = getattr(F, name)(**normalized(loss, call), **options, reduction=reduction)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        upstream = torch.from_numpy(rng.normal(size=ours.shape)).float()
        found = torch.autograd.grad(ours, [call[n] for n in wrt], upstream)
        wanted = torch.autograd.grad(theirs, [call[n] for n in wrt], upstream)
        for n, g, h in zip(wrt, found, wanted, strict=True):
            torch.testing.assert_close(g, h, rtol=1e-5, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


# Arguments that models do not produce, and ones whose elements are in several terms.
OTHERS = [
    ("mse_loss", (3, 4), "target", {}),
    ("mse_loss", (3, 4), "weight", {"weight": (3, 4)}),
    ("huber_loss", (3, 4), "weight", {"weight": (4,)}),
    ("gaussian_nll_loss", (3, 4), "var", {}),
    ("gaussian_nll_loss", (3, 4), "var", {"var": (3, 1)}),
    ("cross_entropy", (3, 4), "target", {"target": (3, 4)}),
    ("cross_entropy", (2, 4, 3), "weight", {"target": (2, 4, 3), "weight": (4,)}),
    ("linear_cross_entropy", (3, 4), ("input", "linear_weight", "linear_bias"), {"linear_bias": (6,)}),
    ("multilabel_soft_margin_loss", (3, 4), ("input", "weight"), {"weight": (4,)}),
]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("name", "shape", "wrt", "more"), OTHERS, ids=[f"{o[0]}-{o[2]}" for o in OTHERS])
def test_gradients_by_other_arguments(name, shape, wrt, more, reduction, rng):
    call = tensors(registry[name], rng, shape, wrt=())
    for n, size in more.items():
        call[n] = torch.from_numpy(rng.uniform(0.5, 2, size))
    for n in (wrt,) if isinstance(wrt, str) else wrt:
        call[n].requires_grad_()
    assert check(getattr(nt, name), call, reduction=reduction)


def test_sample_weight_and_normalizer(rng):
    call = tensors(nl.cross_entropy, rng)
    weight = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    terms = F.cross_entropy(**call, reduction="none")
    value = nt.cross_entropy(**call, sample_weight=weight)
    torch.testing.assert_close(value, (terms * weight).sum() / weight.sum())
    torch.testing.assert_close(nt.cross_entropy(**call, normalizer=7), terms.sum() / 7)
    assert check(nt.cross_entropy, call, sample_weight=weight, normalizer=7.0)


def test_rows_alone(rng):
    """Shapes that PyTorch's margins take: a lone row's label, or score, may have an axis more or less."""
    x = torch.from_numpy(rng.normal(size=4)).requires_grad_()
    for target in (torch.tensor(2), torch.tensor([2])):
        found = nt.multi_margin_loss(x, target, reduction="none")
        assert found.shape == target.shape
        (gradient,) = torch.autograd.grad(found, x, torch.full_like(found, 2.0))
        wanted = torch.autograd.grad(2 * F.multi_margin_loss(x, target), x)[0]
        torch.testing.assert_close(gradient, wanted)
    x = torch.tensor(0.5, requires_grad=True)
    nt.multi_margin_loss(x, torch.tensor([0]), reduction="none").sum().backward()
    assert x.grad.shape == ()


# ---- when the gradient is computed, and where -----------------------------------------------------------


def modes(calls):
    found = [mode for mode, _, _ in calls]
    calls.clear()
    return found


def test_gradient_is_computed_once_and_only_where_it_is_needed(calls):
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    leaf = x.clone().requires_grad_()
    nt.mse_loss(x, y)
    with torch.no_grad():
        assert not nt.mse_loss(leaf, y).requires_grad
    with torch.inference_mode():
        value = nt.mse_loss(leaf, y)
        nt.mse_loss(x * 2, y, reduction="none")
    assert modes(calls) == ["value"] * 4
    assert value.is_inference()
    value = nt.mse_loss(leaf, y)
    assert modes(calls) == ["value_and_grad"]
    for k in range(1, 4):
        (value * 3).backward(retain_graph=True)
        torch.testing.assert_close(leaf.grad, k * 3 * 2 * (x - y) / 12)
    nt.mse_loss(leaf, y, reduction="none").mean().backward()
    torch.testing.assert_close(leaf.grad, 10 * 2 * (x - y) / 12)
    assert modes(calls) == ["value_and_grad"]


def test_calls_that_are_looked_at_go_through_operators():
    """An ordinary call takes no operator; a trace, a mode, autocast or a tensor of another class gets one."""

    class Marked(torch.Tensor):
        pass

    def name(value):
        return type(value.grad_fn).__name__

    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    found = nt.soft_margin_loss(x, y)
    assert name(found) == "soft_margin_lossBackward"
    with torch.autocast("cpu"):
        assert "numbaloss_soft_margin_loss_by_input" in name(nt.soft_margin_loss(x, y))
    assert name(nt.soft_margin_loss(x.as_subclass(Marked), y)) != name(found)
    with Watching() as watching:
        torch.testing.assert_close(
            torch.autograd.grad(nt.soft_margin_loss(x, y), x), torch.autograd.grad(found, x)
        )
    assert "numbaloss.soft_margin_loss_by_input.default" in watching.seen
    with pytest.raises(RuntimeError):  # of PyTorch: an operator has no such rule
        torch.func.grad(nt.soft_margin_loss)(x.detach(), y)


def test_backward_passes_that_add_up():
    """What is not scaled or is scaled in place stays right where the graph is used again."""
    x, y = torch.randn(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    value = nt.mse_loss(leaf, y, reduction="sum")
    for k in range(1, 5):
        value.backward(retain_graph=k < 4)
        torch.testing.assert_close(leaf.grad, k * 2 * x)
        leaf.grad.add_(0)  # writes to it
    twice = torch.autograd.grad(nt.mse_loss(leaf, y, reduction="sum"), leaf, torch.tensor(-3.0).double())
    torch.testing.assert_close(twice[0], -6 * x)
    assert not twice[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tensors_are_used_where_they_lie(dtype, calls):
    if dtype is torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    for x in (torch.randn(6, 4).to(dtype), torch.randn(4, 6).to(dtype).T, torch.randn(12, 4).to(dtype)[::2]):
        leaf = x.detach().requires_grad_()
        y = torch.randn(6, 4).to(dtype)
        value = nt.mse_loss(leaf, y)
        ((_, (array, other, *_), (_, gradients)),) = calls
        calls.clear()
        assert array.__array_interface__["data"][0] == leaf.data_ptr()
        assert array.strides == tuple(s * leaf.element_size() for s in leaf.stride())
        assert other.__array_interface__["data"][0] == y.data_ptr()
        value.backward()
        assert value.dtype == leaf.grad.dtype == dtype
        wanted = 2 * (x.double() - y.double()) / 24
        torch.testing.assert_close(leaf.grad.double(), wanted, rtol=2e-2, atol=1e-3)
        assert leaf.grad.stride() == torch.empty_like(leaf).stride()
        if leaf.is_contiguous():  # of an upstream gradient of 1 nothing is copied
            (gradient,) = gradients
            assert leaf.grad.data_ptr() == gradient.__array_interface__["data"][0]


def test_mixed_dtypes():
    x = torch.randn(3, 4, dtype=torch.float16, requires_grad=True)
    weight = torch.ones(3, dtype=torch.float64)
    value = nt.cross_entropy(x, torch.tensor([0, 1, 2], dtype=torch.int32), sample_weight=weight)
    assert value.dtype == torch.float64
    value.backward()
    assert x.grad.dtype == torch.float16


def test_tensors_that_are_expanded_permuted_or_empty():
    x = torch.randn(1, 4).expand(3, 4).detach().requires_grad_()
    nt.mse_loss(x, torch.zeros(3, 4), reduction="none").sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())
    scores = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last).requires_grad_()
    labels = torch.randint(0, 5, (2, 3, 4))
    nt.cross_entropy(scores, labels, reduction="none").mean().backward()
    assert scores.grad.is_contiguous(memory_format=torch.channels_last)
    wanted = torch.autograd.grad(F.cross_entropy(scores, labels), scores)[0]
    torch.testing.assert_close(scores.grad, wanted)
    nothing = torch.empty(0, 4, requires_grad=True)
    assert nt.mse_loss(nothing, torch.empty(0, 4)).isnan()
    nt.mse_loss(nothing, torch.empty(0, 4), reduction="sum").backward()
    assert nothing.grad.shape == (0, 4)


# ---- autocast, torch.compile, second derivatives --------------------------------------------------------


@pytest.mark.parametrize("name", ["cross_entropy", "mse_loss", "ctc_loss"])
def test_autocast_computes_in_float32(name, rng, calls):
    loss = registry[name]
    call = tensors(loss, rng, dtype=torch.float32)
    (leaf,) = [t for t in call.values() if t.requires_grad]
    wanted = getattr(F, name)(**call)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = {n: t.to(torch.bfloat16) if t is leaf else t for n, t in call.items()}
        value = getattr(nt, name)(**narrow)
    assert calls[-1][1][0].dtype == np.float32
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wanted, rtol=2e-2, atol=1e-2)
    value.backward()
    assert leaf.grad.dtype == torch.float32


def compiled_calls(rng):
    """Calls for torch.compile, none of which was made before."""
    x, y = (torch.from_numpy(rng.normal(size=(4, 6))) for _ in range(2))
    labels = torch.from_numpy(rng.integers(0, 6, 4))
    var = torch.from_numpy(rng.uniform(0.5, 2, (4, 1)))
    log_probs = torch.from_numpy(rng.normal(size=(6, 2, 4))).log_softmax(-1)
    targets = torch.tensor([[1, 2], [3, 1]])
    yield "smooth_l1_loss", (x, y), {"beta": 0.3, "reduction": "sum"}
    yield "smooth_l1_loss", (x.T, y.T), {"reduction": "none"}
    yield "gaussian_nll_loss", (x, y, var), {"reduction": "none"}  # the gradient by var waits
    yield "cross_entropy", (x, labels), {"label_smoothing": 0.1, "weight": torch.ones(6).double()}
    yield "ctc_loss", (log_probs, targets, (6, 5), (2, 1)), {}
    yield "triplet_margin_loss", (x, y, x.flip(0)), {"swap": True}


@pytest.mark.parametrize("dynamic", sweep([False, True], True))
def test_compile_without_a_break(rng, dynamic):
    for name, arrays, options in compiled_calls(rng):
        torch._dynamo.reset()
        function = getattr(nt, name)

        def step(*given, function=function, options=options):
            first, *others = given
            return function(first * 2, *others, **options).sum() * 3

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        results = []
        for run in (compiled, step):
            leaves = [
                a.clone().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a
                for a in arrays
            ]
            value = run(*leaves)
            value.backward()
            results.append([value, *(a.grad for a in leaves if torch.is_tensor(a) and a.requires_grad)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        with torch.no_grad():
            assert compiled(*arrays) == step(*arrays)


def test_compile_a_module_that_trains():
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    criterion = nt.Module(squared_entropy.Class(power=1.5))
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])

    def step(x, y):
        return criterion(model(x), y)

    value = torch.compile(step, fullgraph=True, backend="aot_eager")(x, y)
    found = torch.autograd.grad(value, list(model.parameters()))
    wanted = torch.autograd.grad(
        F.cross_entropy(model(x), y, reduction="none").pow(1.5).mean(), [*model.parameters()]
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_compile_by_inductor(rng):
    """Generated code relies on the layouts that operators promise."""
    torch._dynamo.reset()
    x, y = torch.from_numpy(rng.normal(size=(2, 4, 6)))
    for a, b in ((x, y), (x.T, y.T)):
        leaf = a.clone(memory_format=torch.preserve_format).requires_grad_()
        step = lambda a, b: (nt.huber_loss(a * 2, b, reduction="none") * 3).sum()
        torch.compile(step, fullgraph=True)(leaf, b).backward()
        torch.testing.assert_close(leaf.grad, torch.autograd.grad(step(leaf, b), leaf)[0])


class Watching(TorchDispatchMode):
    """Sees the operators that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, kinds, args=(), kwargs=None):
        self.seen.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", registry)
def test_operators_do_as_they_say(name, rng):
    """Shapes, dtypes and strides without data are those of the call; nothing is written or shared."""
    loss = registry[name]
    call = tensors(loss, rng)
    function = getattr(nt, name) if name != "triplet_margin_with_distance_loss" else nt._by_name
    plain = function(**call)
    with Watching() as watching:  # else there would be no operator
        assert torch.equal(function(**call), plain)
    assert any(operator.startswith(f"numbaloss.{name}") for operator in watching.seen)
    wrt = [n for n, t in call.items() if t.requires_grad]
    operator = getattr(torch.ops.numbaloss, f"{name}_by_{'_'.join(wrt)}").default
    for reduction in ("mean", "none"):
        defaults = {n: p.default for n, p in loss.without_ranks.parameters.items()}
        given = tuple({**defaults, **call, "reduction": reduction}.values())
        tests = "test_schema", "test_autograd_registration", "test_faketensor"
        torch.library.opcheck(operator, given, test_utils=tests)


@pytest.mark.parametrize(
    "name", ["mse_loss", "huber_loss", "binary_cross_entropy_with_logits", "poisson_nll_loss"]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(name, reduction, rng):
    call = tensors(registry[name], rng)
    x = call.pop("input")
    assert torch.autograd.gradgradcheck(
        lambda x: getattr(nt, name)(x, **call, reduction=reduction), x, atol=1e-5
    )


def test_second_derivatives_that_are_refused(rng):
    """None is silently zero."""
    scores = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        nt.cross_entropy(scores, torch.tensor([0, 1, 2])), scores, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="cross_entropy: no second derivative by input"):
        gradient.sum().backward()
    x, y = torch.randn(2, 3, requires_grad=True).unbind()
    (gradient,) = torch.autograd.grad(nt.mse_loss(x, y), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="by input and target"):
        gradient.sum().backward()
    x = torch.randn(3, requires_grad=True)
    (first,) = torch.autograd.grad(nt.mse_loss(x, torch.zeros(3)), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.full((3,), 2 / 3))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        second.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of PyTorch's own forward mode
def test_other_derivatives():
    """Forward mode and `torch.func.grad` are refused; upstream gradients may come in a batch."""
    x, y = torch.randn(3), torch.zeros(3)
    with torch.autograd.forward_ad.dual_level():
        nt.mse_loss(x, y)
        with pytest.raises(NotImplementedError, match="mse_loss: no forward-mode derivative by input"):
            nt.mse_loss(torch.autograd.forward_ad.make_dual(x, x), y)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: nt.mse_loss(x, y), (x,), (x,))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: nt.mse_loss(x, y))(x)
    for reduction in ("none", "sum"):
        found = torch.autograd.functional.jacobian(
            lambda x, r=reduction: nt.mse_loss(x, y, reduction=r), x, vectorize=True
        )
        torch.testing.assert_close(found, torch.diag(2 * x) if reduction == "none" else 2 * x)


def test_checkpoints_compute_again():
    from torch.utils.checkpoint import checkpoint

    x, y = torch.randn(3, requires_grad=True), torch.zeros(3)
    value = checkpoint(lambda x: nt.mse_loss(x * 1, y), x, use_reentrant=False)
    (gradient,) = torch.autograd.grad(value * 2, x)
    torch.testing.assert_close(gradient, 4 * x.detach() / 3)


# ---- losses of one's own, and modules -------------------------------------------------------------------


def test_losses_of_ones_own(rng):
    for loss in (quartic, squared_entropy, Spring):
        function = nt.function(loss)
        assert nt.function(loss) is function
        loss = getattr(loss, "function", loss)
        call = tensors(loss, rng)
        assert check(function, call), loss.__name__
    x = torch.from_numpy(rng.normal(size=3)).requires_grad_()
    y = torch.zeros(3).double()
    assert torch.autograd.gradgradcheck(lambda x: nt.function(quartic)(x, y, scale=0.5), x)
    assert nt.function(quartic)(x, y, reduction="sum") == (x**4).sum()


def test_two_losses_of_one_name():
    def made(power):
        def lp(input, target):
            return abs(input - target) ** power

        return nt.function(nl.elementwise_loss(lp))

    first, second = made(2.0), made(3.0)
    x, y = torch.tensor([2.0]), torch.tensor([0.0])
    assert (first(x, y), second(x, y), first(x, y)) == (4.0, 8.0, 4.0)


def test_module_has_options_as_attributes_and_arrays_as_buffers():
    weight = torch.tensor([0.5, 1.0, 2.0])
    ours, theirs = (m.CrossEntropyLoss(weight, label_smoothing=0.1) for m in (nt, torch.nn))
    assert ours.state_dict().keys() == theirs.state_dict().keys() == {"weight"}
    assert repr(ours).startswith("CrossEntropyLoss(ignore_index=-100, reduction='mean', label_smoothing=0.1")
    scores, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, -100])
    torch.testing.assert_close(ours(scores, labels), theirs(scores, labels))
    ours.label_smoothing = theirs.label_smoothing = 0.0
    ours.reduction = theirs.reduction = "sum"
    torch.testing.assert_close(ours(scores, labels), theirs(scores, labels))
    assert ours.double().weight.dtype == torch.float64
    given = nt.Module(nl.CrossEntropyLoss(weight=np.array([0.5, 1.0, 2.0], np.float32), reduction="sum"))
    torch.testing.assert_close(given(scores, labels), theirs(scores, labels))
    half = torch.tensor([1.0, 0.5, 0, 1])
    terms = F.cross_entropy(scores, labels, weight, reduction="none")
    torch.testing.assert_close(given(scores, labels, sample_weight=half), (terms * half).sum())


def test_modules_are_copied_and_pickled():
    x, y = torch.randn(3), torch.zeros(3)
    for module in (nt.HuberLoss(delta=0.5), nt.Module(quartic.Class(scale=2.0))):
        stream = io.BytesIO()
        torch.save(module, stream)
        stream.seek(0)
        others = [
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            torch.load(stream, weights_only=False),
        ]
        for other in others:
            assert other(x, y) == module(x, y)
            assert repr(other) == repr(module)
    assert pickle.loads(pickle.dumps(nt.huber_loss)) is nt.huber_loss


@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_is_pytorchs_module(bias):
    if not hasattr(torch.nn, "LinearCrossEntropyLoss"):
        pytest.skip("this PyTorch has no LinearCrossEntropyLoss")
    pair = []
    for module in (nt, torch.nn):
        torch.manual_seed(3)
        pair.append(module.LinearCrossEntropyLoss(5, 4, bias=bias, label_smoothing=0.1))
    ours, theirs = pair
    ours.load_state_dict(theirs.state_dict())
    x, y = torch.randn(6, 5), torch.randint(0, 4, (6,))
    torch.testing.assert_close(ours(x, y), theirs(x, y))
    found, wanted = (torch.autograd.grad(m(x, y), [*m.parameters()]) for m in pair)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    ours.options = nl.LinearCrossEntropyOptions(batch_chunk_size=2)
    torch.testing.assert_close(ours(x, y), theirs(x, y))
    positions = nt.LinearCrossEntropyLoss(5, 4, out_features=(2, 3), bias=bias)
    assert positions(x, torch.randint(0, 4, (6, 2, 3)), normalizer=1.0).dim() == 0


@pytest.mark.parametrize("swap", [False, True])
def test_a_distance_of_tensors(swap, rng):
    def distance(x, y):
        return 1 - F.cosine_similarity(x, y)

    a, p, n = torch.from_numpy(rng.normal(size=(3, 5, 4))).requires_grad_()
    for reduction in ("mean", "none"):
        options = {"distance_function": distance, "margin": 0.5, "swap": swap, "reduction": reduction}
        ours, theirs = (m.triplet_margin_with_distance_loss(a, p, n, **options) for m in (nt, F))
        torch.testing.assert_close(ours, theirs)
        for x in (a, p, n):
            found, wanted = (torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in (ours, theirs))
            torch.testing.assert_close(found, wanted)
    by_name = nt.TripletMarginWithDistanceLoss(distance_function="cosine", swap=swap)
    value = by_name(a, p, n)
    torch.testing.assert_close(
        value, F.triplet_margin_with_distance_loss(a, p, n, distance_function=distance, swap=swap)
    )


# ---- whole programs -------------------------------------------------------------------------------------


def trained(criterion, x, y, steps=60):
    """The losses of a small network on real data, step by step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    curve = []
    for k in range(steps):
        rows = slice(64 * (k % 20), 64 * (k % 20) + 64)
        optimizer.zero_grad()
        value = criterion(model(x[rows]), y[rows])
        value.backward()
        optimizer.step()
        curve.append(value.item())
    return np.array(curve)


def test_training_goes_as_with_pytorchs_own():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.from_numpy(x / 16), torch.from_numpy(y)
    curves = [trained(m.CrossEntropyLoss(label_smoothing=0.05), x, y) for m in (nt, torch.nn)]
    np.testing.assert_allclose(*curves, rtol=1e-9)  # the steps carry on what the last bits differ by
    assert curves[0][-1] < 0.6 < 2 < curves[0][0]


class Weighed(torch.utils.data.Dataset):
    """Gives how hard each example is: a worker computes a loss."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        x = self.x[k].clone().requires_grad_()
        value = nt.mse_loss(x, torch.zeros_like(x), reduction="sum")
        value.backward()
        return value.detach(), x.grad


def test_workers_of_a_data_loader():
    x = torch.randn(6, 3)
    Weighed(x)[0]  # kernels and operators are there before the fork, and threads
    loader = torch.utils.data.DataLoader(
        Weighed(x), batch_size=3, num_workers=1, multiprocessing_context="fork"
    )
    values, gradients = (torch.cat(parts) for parts in zip(*loader, strict=True))
    torch.testing.assert_close(values, (x**2).sum(1))
    torch.testing.assert_close(gradients, 2 * x)


def test_nothing_is_kept_when_the_graph_is_gone():
    x = torch.randn(4, requires_grad=True)
    gone = []
    for _ in range(2):
        y = torch.randn(4)
        gone.append(weakref.ref(y))
        value = nt.mse_loss(x * 2, y)
        gone.append(weakref.ref(value))
        del y, value
    gc.collect()
    assert not any(ref() is not None for ref in gone)


def test_docstring_examples():
    result = doctest.testmod(nt, extraglobs={"__name__": "example"})
    assert result.attempted and not result.failed


# ---- errors -----------------------------------------------------------------------------------------------


def test_errors_name_the_loss_and_the_argument():
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    labels = torch.tensor([0, 1, 9])
    for error, message, call in [
        (TypeError, "missing 1 required positional argument: 'target'", lambda: nt.mse_loss(x)),
        (TypeError, "unexpected keyword argument 'scale'", lambda: nt.mse_loss(x, y, scale=1)),
        (TypeError, "mse_loss: target must be a tensor, got ndarray", lambda: nt.mse_loss(x, y.numpy())),
        (TypeError, "mse_loss: input must be a tensor, got NoneType", lambda: nt.mse_loss(None, y)),
        (ValueError, r"mse_loss: target must have input's shape", lambda: nt.mse_loss(x, y[0])),
        (ValueError, "huber_loss: delta must be > 0, got -1", lambda: nt.huber_loss(x, y, delta=-1)),
        (TypeError, "huber_loss: delta must be a number, got '1'", lambda: nt.huber_loss(x, y, delta="1")),
        (ValueError, "reduction must be one of", lambda: nt.huber_loss(x, y, reduction="max")),
        (ValueError, "normalizer must be > 0", lambda: nt.mse_loss(x, y, normalizer=0.0)),
        (TypeError, "normalizer must be a number", lambda: nt.mse_loss(x, y, normalizer="7")),
        (IndexError, r"target\[2\] is 9, but input has 4 classes", lambda: nt.cross_entropy(x, labels)),
        (
            ValueError,
            "mse_loss: sample_weight requires grad, but is not differentiated",
            lambda: nt.mse_loss(x, y, sample_weight=torch.ones(3, 4, requires_grad=True)),
        ),
        (
            TypeError,
            "options must be None or LinearCrossEntropyOptions",
            lambda: nt.linear_cross_entropy(x, y, labels, options=3),
        ),
        (TypeError, "function: loss must be", lambda: nt.function(F.mse_loss)),
        (TypeError, "Module: criterion must be", lambda: nt.Module(nl.mse_loss)),
        (TypeError, "not computed in one pass", lambda: nt.Module(nl.MSELoss() + nl.L1Loss("sum"))),
        (TypeError, "use that of numbaloss.torch", lambda: nt.Module(nl.LinearCrossEntropyLoss(2, 3))),
        (TypeError, "unexpected keyword argument 'beta'", lambda: nt.HuberLoss(beta=1.0)),
        (TypeError, "unexpected keyword argument 'p'", lambda: nt.LinearCrossEntropyLoss(2, 3, p=1)),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_options_that_no_schema_has():
    class Odd(nl.ElementwiseLoss):
        kind: object = nl.arguments.Option(..., lambda loss, name, value: value)

        def value(input, target):
            return input - target

    with pytest.raises(TypeError, match="odd: kind is no bool, number or string"):
        nt.function(Odd)


def test_without_pytorch(python):
    lines = python(
        "import sys\nsys.modules['torch'] = None\nimport numbaloss\n"
        "try:\n    import numbaloss.torch\nexcept ImportError as error:\n    print(error)\n"
    )
    assert lines == ["numbaloss.torch needs PyTorch: pip install torch"]


def test_the_library_imports_no_pytorch(python):
    assert python("import sys, numbaloss\nprint('torch' in sys.modules)") == ["False"]

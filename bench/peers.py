"""The table of peers: what a loss is compared with, and how each computes a case."""

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any, ClassVar

import numba
import numpy as np

from numbaloss.kernels.spec import GRAD, VALUE

from .cases import Arrays, Case
from .formulas import FORMULAS

Call = Callable[[], Any]


class Peer:
    """Another library, or another way, to compute a loss and its gradient.

    Attributes
    ----------
    name : str
        As ``--peer`` takes it.
    module : str
        What must be importable.
    install : str
        The command that brings it.
    devices : tuple of str
    """

    name: ClassVar[str]
    module: ClassVar[str]
    install: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ("cpu",)

    def missing(self, device: str = "cpu") -> str | None:
        """Why it cannot run here, and what to do about it; None if it can."""
        if importlib.util.find_spec(self.module) is None:
            return f"not installed: {self.install}"
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        return None

    def build(self, case: Case, arrays: Arrays) -> Call | None:
        """What computes a case from NumPy arrays; None if it has not this loss, mode or dtype.

        The call returns the value, the gradients, or both, as the case's mode says.
        """
        raise NotImplementedError


class NumPy(Peer):
    """The loss as one writes it in array code, in the case's own precision."""

    name, module, install = "numpy", "numpy", "pip install numpy"

    def build(self, case: Case, arrays: Arrays) -> Call | None:
        if case.loss not in FORMULAS or case.dtype not in ("float32", "float64"):
            return None
        xp = importlib.import_module(self.module)
        formula, held = FORMULAS[case.loss], [xp.asarray(a) for a in arrays.values()]
        if case.mode == VALUE:
            return lambda: formula.terms(xp, *held).mean()
        if case.mode == GRAD:
            return lambda: formula.value_and_grad(xp, *held)[1]
        return lambda: formula.value_and_grad(xp, *held)


class CuPy(NumPy):
    """The same array code on a GPU."""

    name, module = "cupy", "cupy"
    install = "pip install cupy-cuda12x or cupy-cuda13x"
    devices = ("cuda",)


class Torch(Peer):
    """PyTorch's function and its backward, eager."""

    name, module, install = "torch", "torch", "pip install torch"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def function(self, case: Case) -> Any:
        return getattr(importlib.import_module("torch.nn.functional"), case.loss, None)

    def build(self, case: Case, arrays: Arrays) -> Call | None:
        torch = importlib.import_module("torch")
        torch.set_num_threads(numba.get_num_threads())
        function = self.function(case)
        if function is None:
            return None

        def tensor(name: str, array: np.ndarray) -> Any:
            if array.dtype.kind in "iu":
                return torch.tensor(array, dtype=torch.int64, device=case.device)
            wide = array.astype(np.promote_types(array.dtype, np.float32), copy=False)
            made = torch.tensor(wide, dtype=getattr(torch, case.dtype), device=case.device)
            return made.requires_grad_(name in case.wrt)

        tensors = {n: tensor(n, a) for n, a in arrays.items()}
        operands = tuple(tensors.values())
        if case.mode == VALUE:
            return lambda: function(*operands)
        leaves = [tensors[n] for n in case.wrt]

        def run() -> Any:
            for t in leaves:
                t.grad = None
            loss = function(*operands)
            loss.backward()
            gradients = tuple(t.grad for t in leaves)
            gradient = gradients[0] if len(gradients) == 1 else gradients
            return gradient if case.mode == GRAD else (loss, gradient)

        return run


class TorchCompile(Torch):
    """PyTorch's function, compiled for the case's shape."""

    name = "torch-compile"

    def missing(self, device: str = "cpu") -> str | None:
        why = super().missing(device)
        if why is None and device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "needs a C++ compiler: apt-get install g++, or its like"
        return why

    def function(self, case: Case) -> Any:
        torch = importlib.import_module("torch")
        function = super().function(case)
        torch.compiler.reset()  # else it gives up on a function after a few shapes
        return function and torch.compile(function, dynamic=False)


class Liger(Torch):
    """Liger-Kernel's Triton kernels."""

    name, module, install = "liger", "liger_kernel", "pip install liger-kernel"
    devices = ("cuda",)

    def function(self, case: Case) -> Any:
        functional = importlib.import_module("liger_kernel.transformers.functional")
        return {
            "cross_entropy": functional.liger_cross_entropy,
            "kl_div": functional.liger_kl_div,
            "linear_cross_entropy": functional.liger_fused_linear_cross_entropy,
        }.get(case.loss)


class JAX(Peer):
    """The array code, differentiated and compiled by JAX, on arrays that JAX holds already."""

    name, module, install = "jax", "jax", "pip install jax"
    devices = ("cpu", "cuda")

    def missing(self, device: str = "cpu") -> str | None:
        why = super().missing(device)
        if why is None and device == "cuda":
            try:
                self._import().devices(device)
            except RuntimeError:
                return "runs on the CPU only as it is installed: pip install jax[cuda12] or jax[cuda13]"
        return why

    @staticmethod
    def _import() -> Any:
        # Its threads are counted once, when it is first used.
        os.environ.setdefault("PJRT_NPROC", str(numba.get_num_threads()))
        return importlib.import_module("jax")

    def build(self, case: Case, arrays: Arrays) -> Call | None:
        if case.loss not in FORMULAS:
            return None
        jax = self._import()
        if case.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        terms = FORMULAS[case.loss].terms

        def mean(*operands: Any) -> Any:
            return terms(jax.numpy, *operands).mean()

        positions = tuple(list(arrays).index(n) for n in case.wrt)
        by = positions[0] if len(positions) == 1 else positions
        run = mean
        if case.mode != VALUE:
            run = jax.grad(mean, by) if case.mode == GRAD else jax.value_and_grad(mean, by)
        run, device = jax.jit(run), jax.devices(case.device)[0]
        held = [jax.device_put(a, device) for a in arrays.values()]
        return lambda: jax.block_until_ready(run(*held))


class SciKitLearn(Peer):
    """Scikit-learn's metrics; with gradients the compiled losses that its own estimators are trained with.

    Those give each term, and the gradient of their sum; squared errors are halved.
    """

    name, module, install = "sklearn", "sklearn", "pip install scikit-learn"

    METRICS: ClassVar[dict[str, str]] = {"l1_loss": "mean_absolute_error", "mse_loss": "mean_squared_error"}
    LOSSES: ClassVar[dict[str, str]] = {
        "l1_loss": "AbsoluteError",
        "mse_loss": "HalfSquaredError",
        "huber_loss": "HuberLoss",
        "poisson_nll_loss": "HalfPoissonLoss",
        "binary_cross_entropy_with_logits": "HalfBinomialLoss",
        "cross_entropy": "HalfMultinomialLoss",
    }

    def build(self, case: Case, arrays: Arrays) -> Call | None:
        table = self.METRICS if case.mode == VALUE else self.LOSSES
        if case.loss not in table or case.dtype not in ("float32", "float64"):
            return None
        x, y = arrays.values()
        if case.mode == VALUE:
            metric = getattr(importlib.import_module("sklearn.metrics"), table[case.loss])
            return lambda: metric(y.reshape(-1), x.reshape(-1))
        definition = getattr(importlib.import_module("sklearn._loss.loss"), table[case.loss])
        if case.loss == "cross_entropy":
            if x.ndim != 2:
                return None
            loss = definition(n_classes=x.shape[1])
        else:
            options = {"delta": 1.0} if case.loss == "huber_loss" else {}
            loss, x, y = definition(**options), x.reshape(-1), y.reshape(-1)
        y, threads = y.astype(x.dtype), numba.get_num_threads()

        def run() -> Any:
            terms, gradient = loss.loss_gradient(y, x, n_threads=threads)
            return gradient if case.mode == GRAD else (terms.mean(), gradient)

        return run


PEERS: dict[str, Peer] = {
    p.name: p for p in (NumPy(), Torch(), TorchCompile(), JAX(), SciKitLearn(), CuPy(), Liger())
}
# Compared with where they are installed; compiling for each shape takes PyTorch 20 s, so that is asked for.
DEFAULT = ("numpy", "torch", "jax", "sklearn", "cupy")

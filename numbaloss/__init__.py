"""PyTorch's losses for NumPy arrays: value and gradient in one fused pass.

>>> import numpy as np, numbaloss as nl
>>> value, gradient = nl.huber_loss.value_and_grad(np.array([0.5, 3.0]), np.zeros(2), delta=1.0)

Every loss is here under PyTorch's names, as a function (``huber_loss``) and as a class (``HuberLoss``).
"""

import importlib

from . import arguments
from .derive import derive
from .families.elementwise import ElementwiseLoss
from .families.scores import ScoreLoss
from .families.vectors import VectorLoss
from .kernels import math
from .kernels.devices import free_memory, synchronize
from .loss import Loss, LossFunction, registry
from .losses.custom import elementwise_loss, score_loss, vector_loss
from .losses.linear import LinearCrossEntropyOptions
from .sums import SumLoss

__version__ = "0.1.0"

# Editors and type checkers see these, with their signatures, in __init__.pyi (made by numbaloss.stubs).
_losses = {name: f for f in registry.values() for name, f in ((f.__name__, f), (f.Class.__name__, f.Class))}
globals().update(_losses)

__all__ = [
    "ElementwiseLoss",
    "LinearCrossEntropyOptions",
    "Loss",
    "LossFunction",
    "ScoreLoss",
    "SumLoss",
    "VectorLoss",
    "arguments",
    "boosting",
    "derive",
    "distributed",
    "elementwise_loss",
    "free_memory",
    "math",
    "optimize",
    "registry",
    "score_loss",
    "synchronize",
    "testing",
    "vector_loss",
]
__all__ += _losses


def __getattr__(name: str) -> object:
    if name in (
        "boosting",
        "distributed",
        "optimize",
        "testing",
    ):  # when they are asked for: importing stays quick
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

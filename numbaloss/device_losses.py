"""Which of the losses with a term for each row are computed on CUDA devices, and by what."""

from typing import Any

from .device_classes import cross_entropy, margin_loss, nll_loss
from .device_rows import Compute, run
from .device_vectors import run_ctc_loss, vector_loss
from .embedding import VectorLoss
from .multiclass import CrossEntropyLoss, NLLLoss
from .multilabel import MarginLoss
from .sequence import CTCLoss

COMPUTE: dict[type, Compute] = {
    CrossEntropyLoss: cross_entropy,
    NLLLoss: nll_loss,
    MarginLoss: margin_loss,
    VectorLoss: vector_loss,
}


def evaluate(cls: Any, mode: str, call: dict[str, Any]) -> Any:
    """A call with arrays on a device."""
    if issubclass(cls, CTCLoss):
        return run_ctc_loss(cls, mode, call)
    for family, compute in COMPUTE.items():
        if issubclass(cls, family):
            return run(cls, mode, call, compute)
    raise TypeError(
        f"{cls.function.__name__}: computes on the CPU only: pass NumPy arrays, such as cupy.asnumpy(...)"
    )

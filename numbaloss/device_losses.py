"""Which of the losses with a term for each row are computed on CUDA devices, and by what."""

from typing import Any

from .device_classes import cross_entropy, margin_loss, nll_loss
from .device_linear import run_linear_cross_entropy
from .device_rows import Compute, run
from .device_vectors import run_ctc_loss, vector_loss
from .embedding import VectorLoss
from .linear import LinearCrossEntropyLoss
from .multiclass import CrossEntropyLoss, NLLLoss
from .multilabel import MarginLoss
from .sequence import CTCLoss

COMPUTE: dict[type, Compute] = {
    CrossEntropyLoss: cross_entropy,
    NLLLoss: nll_loss,
    MarginLoss: margin_loss,
    VectorLoss: vector_loss,
}
# What checks calls in its own way.
RUN = {CTCLoss: run_ctc_loss, LinearCrossEntropyLoss: run_linear_cross_entropy}


def evaluate(cls: Any, mode: str, call: dict[str, Any]) -> Any:
    """A call with arrays on a device."""
    for family, own in RUN.items():
        if issubclass(cls, family):
            return own(cls, mode, call)
    compute = next(c for family, c in COMPUTE.items() if issubclass(cls, family))
    return run(cls, mode, call, compute)

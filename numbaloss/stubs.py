"""Writes ``__init__.pyi``: the losses' signatures for editors and type checkers.

Run ``python -m numbaloss.stubs`` after a definition changed; a test compares the file with what this makes.
"""

import inspect
import re
from pathlib import Path

from .kernels.spec import GRAD, VALUE, VALUE_AND_GRAD, VALUE_GRAD_HESS
from .loss import COUNT, Loss, registry

PATH = Path(__file__).with_name("__init__.pyi")

HEAD = '''\
"""Made by `python -m numbaloss.stubs`; do not edit."""

from collections.abc import Sequence
from typing import Any

from numpy.random import Generator

from . import (
    arguments as arguments,
    boosting as boosting,
    distributed as distributed,
    optimize as optimize,
    testing as testing,
)
from .derive import derive as derive
from .families.elementwise import ElementwiseLoss as ElementwiseLoss
from .families.scores import ScoreLoss as ScoreLoss
from .families.vectors import VectorLoss as VectorLoss
from .kernels import math as math
from .kernels.devices import free_memory as free_memory, synchronize as synchronize
from .loss import Loss as Loss, LossFunction as LossFunction, registry as registry
from .losses.custom import (
    elementwise_loss as elementwise_loss,
    score_loss as score_loss,
    vector_loss as vector_loss,
)
from .losses.linear import LinearCrossEntropyOptions as LinearCrossEntropyOptions
from .sums import SumLoss as SumLoss

Array = Any
__version__: str
'''


def _parameters(signature: inspect.Signature) -> str:
    parts = ["self"]
    starred = False
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        default = "" if p.default is p.empty else f" = {p.default!r}" if _plain(p.default) else " = ..."
        parts.append(f"{p.name}: {_annotation(p)}{default}")
    return ", ".join(parts)


def _annotation(p: inspect.Parameter) -> str:
    """As written: without the modules of its names, which the head imports."""
    if isinstance(p.annotation, str):
        return p.annotation
    return re.sub(r"\b(?:\w+\.)+", "", inspect.formatannotation(p.annotation))


def _plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _methods(signatures: dict[str, inspect.Signature]) -> list[str]:
    return [
        f"    def {name}({_parameters(s)}) -> {'float' if name == 'count' else 'Any'}: ..."
        for name, s in signatures.items()
    ]


def constructor(loss: type[Loss]) -> inspect.Signature:
    """The signature of a class of losses: its options, but those that are given with each call."""
    if "__init__" in vars(loss):
        return inspect.signature(loss)
    kind = inspect.Parameter.KEYWORD_ONLY if loss._keyword_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
    fields = [
        inspect.Parameter(n, kind, default=f.default, annotation=f.annotation)
        for n, f in loss.fields.items()
        if not f.call_only
    ]
    return inspect.Signature(fields)


def _of_call(loss: type[Loss], mode: str) -> inspect.Signature:
    """The signature of an instance's method: the options are in the constructor."""
    constructed = {n for n, f in loss.fields.items() if not f.call_only}.union(loss._held)
    signature = loss._signature(mode)
    kept = []
    for p in signature.parameters.values():
        if p.name not in constructed:
            kept.append(p if p.name in loss._required else p.replace(kind=p.KEYWORD_ONLY))
    return signature.replace(parameters=kept)


def render() -> str:
    """The text of the stub file."""
    modes = {
        "__call__": VALUE,
        "value_and_grad": VALUE_AND_GRAD,
        "grad": GRAD,
        "value_grad_hess": VALUE_GRAD_HESS,
        "count": COUNT,
    }
    parts = [HEAD]
    for name, function in registry.items():
        loss = function.Class
        bases = [b.__name__ for b in loss.__mro__ if b.__name__ in ("ElementwiseLoss", "VectorLoss", "Loss")]
        attributes = [f"    {n}: {f.annotation}" for n, f in loss.fields.items() if not f.call_only]
        parts += [
            "",
            f"class {loss.__name__}({bases[0]}):",
            *attributes,
            f"    def __init__({_parameters(constructor(loss))}) -> None: ...",
            *_methods({n: _of_call(loss, mode) for n, mode in modes.items()}),
            "",
            f"class _{name}(LossFunction):",
            *_methods({n: loss._signature(mode) for n, mode in modes.items()}),
            "",
            f"{name}: _{name}",
        ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PATH.write_text(render())

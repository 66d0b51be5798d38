"""The shape of a loss's terms, and how they lie along its arguments: what other libraries must know ahead."""

from collections.abc import Mapping
from typing import Any

from .families.elementwise import ElementwiseLoss
from .families.linear import LinearLoss
from .families.scores import ClassLoss, MarginLoss
from .families.sequences import SequenceLoss
from .families.vectors import VectorLoss
from .kernels.layout import class_axis, class_rows
from .kernels.spec import MANY
from .loss import Loss

Shape = tuple[int, ...]


def shape_of_terms(loss: type[Loss], shapes: Mapping[str, Shape]) -> Shape:
    """Return the shape that ``reduction='none'`` gives.

    Parameters
    ----------
    loss : subclass of Loss
    shapes : mapping of str to tuple of int
        Those of a call's arrays by name: they fit, or the call itself says that they do not.
    """
    first = tuple(shapes[loss._required[0]])
    if issubclass(loss, ElementwiseLoss):
        return first
    if issubclass(loss, SequenceLoss):
        return first[1:-1]
    if issubclass(loss, LinearLoss):
        return (*first[:-1], *shapes["linear_weight"][1:-1])
    if issubclass(loss, MarginLoss):
        alone = len(first) < 2 and loss.classes_of_a_row != MANY
        return tuple(shapes["target"]) if alone else first[:-1]
    return class_rows(first) if issubclass(loss, ClassLoss) else first[:-1]


def axes_beyond_terms(loss: type[Loss], name: str, shapes: Mapping[str, Shape]) -> Shape | None:
    """Return the axes of an argument that the terms do not have, where each element is in one term alone.

    None where an element is in several terms, as that of a class weight is.
    """
    of_terms, own = shape_of_terms(loss, shapes), tuple(shapes[name])
    if issubclass(loss, ElementwiseLoss):
        return () if own == of_terms else None
    if issubclass(loss, VectorLoss):
        return (-1,) if name in loss.vectors else ()
    if name in ("weight", "linear_weight", "linear_bias"):
        return None
    if issubclass(loss, LinearLoss) and name == "input":
        return (-1,) if len(own) == len(of_terms) + 1 else None
    if issubclass(loss, ClassLoss | LinearLoss):
        return (class_axis(own),) if len(own) > len(of_terms) else ()
    return (-1,)


def names_of_arrays(loss: type[Loss]) -> tuple[str, ...]:
    """Return the arguments of a call that are arrays, in its order."""
    options: tuple[Any, ...] = tuple(n for n, f in loss.fields.items() if f.array)
    return (*loss._required, *options, "sample_weight")

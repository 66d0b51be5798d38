"""What the mean of a problem of rows counts, on any device."""

from typing import Any, NamedTuple

from .layout import class_axis, class_rows
from .spec import ONE, Linear, Margins, Picks, Scores, Sequences, Vectors


class CountedRows(NamedTuple):
    """What a mean of rows counts."""

    shape: tuple[int, ...]
    labels: Any = None  # of each row, where ignored ones do not count
    class_weight: Any = None  # that labels have
    classes: int = 0


def rows_of(p: Any) -> CountedRows:
    """Return what the mean of a problem of rows counts."""
    match p:
        case Scores() | Picks():
            shape, classes = class_rows(p.input.shape), p.input.shape[class_axis(p.input.shape)]
            if isinstance(p, Scores) and p.has_probabilities:
                return CountedRows(shape)
            return CountedRows(shape, p.target, p.weight, classes)
        case Linear():
            if p.has_probabilities:
                return CountedRows(p.shape)
            return CountedRows(p.shape, p.target, p.weight, p.linear_weight.shape[0])
        case Margins():
            return CountedRows(p.target.shape if p.kind == ONE else p.input.shape[:-1])
        case Vectors():
            return CountedRows(p.vectors[0].shape[:-1])
        case Sequences():
            return CountedRows(p.shape)
    raise TypeError(f"no problem of rows: {type(p).__name__}")

"""Definitions of losses: their arguments, documentation and value. They fill the registry when imported."""

from . import (
    amounts,
    binary,
    embedding,
    linear,
    margins,
    multiclass,
    multilabel,
    quantiles,
    regression,
    robust,
    sequence,
)

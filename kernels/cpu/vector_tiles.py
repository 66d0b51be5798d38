"""Tiles of rows of vectors: how blocks find them, and the arithmetic that all blocks share.

A loss of vectors takes three blocks: C functions over a tile of rows, contiguous and of one dtype. `measure`
writes each row's sums to the tile's state: of a definition's terms (`vector_definitions`), or of a distance
(`vector_distances`). `conclude` makes the row's value of the sums, and the factors of their gradients. `pull`
writes the gradients of the vectors. Each is compiled when a call first needs it.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from ..bind import bind
from ..compiler import DistinctArrays
from ..math import select
from .native import HELPER, compile_function

# A block's signature: ``f(tile, numbers)``, addresses of int64 and of float64; `conclude` gives the sum of
# the values.
BLOCK = types.float64(types.int64, types.int64)
RUN = 4096  # elements that are summed in the arithmetic dtype, before the sum goes on in float64

# Of a tile: rows and coordinates; the state, and the bytes from one number of a row to the next; how many
# distances are measured; then the addresses of the arrays, 0 for those that are absent.
ROWS, SIZE, STATE, PITCH, DISTANCES, ARRAYS = range(6)
GRADIENTS, CURVATURE, ROW_ARRAYS = 3, 6, 7  # of the arrays; the vectors are first
# From the end of the row arrays: weights, gradients from above, values; then the gradients of row arrays.
WEIGHT, UPSTREAM, TERMS, ROW_GRADIENTS = range(4)
SCALE, P, EPS, OPTIONS = range(4)  # of the numbers: the gradient's scale, the norm's p, eps, the options

# The state of a distance. First the sums go where VALUE and the next two are.
(
    VALUE,
    SLOPE,  # the gradient's factor: of the differences' powers, or of the other vector
    OWN,  # cosine: the factor of the first vector itself
    OTHER,  # cosine: the same for the second vector
    FIRST,  # scales the first vector, or the differences, so that nothing overflows
    SECOND,  # cosine: the same for the second vector
    FACTOR,  # the derivative of the loss by the distance
    FIELDS,
) = range(8)


class Block:
    """A template and its scope, to be called by address."""

    def __init__(
        self, template: Callable[..., Any], scope: dict[str, Any], name: str, identity: object
    ) -> None:
        self.template, self.scope, self.name, self.identity = template, scope, name, identity

    @cached_property
    def address(self) -> int:
        """The address of the block's C function."""
        return compile_function(self.template, self.scope, self.name, self.identity, BLOCK)


def scope_of(dtype: np.dtype, **names: Any) -> dict[str, Any]:
    """Return the names that a template of an arithmetic dtype is bound to."""
    single = dtype == np.float32
    return dict(
        T=dtype.type,
        ITEM=dtype.itemsize,
        WIDE=2.0**60 if single else 2.0**900,
        MOST=float(np.finfo(dtype).max),
        **names,
    )


def over_coordinates(template: Callable[..., Any], scope: dict[str, Any], name: str, identity: object) -> Any:
    """Return a loop over one row's coordinates, whose pointers are of distinct memory."""
    return bind(template, scope, name, identity, njit(**HELPER | {"pipeline_class": DistinctArrays}))


def by_vector(wrt: tuple[int, ...]) -> dict[str, bool]:
    """Return the names by which a loop knows the vectors to differentiate."""
    return dict(BY0=0 in wrt, BY1=1 in wrt, BY2=2 in wrt)


# ---- scalars ------------------------------------------------------------------------------------------


@intrinsic
def least(typingctx, a, b):
    """The smaller of two integers."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.icmp_signed("<", *args), *args)

    return types.int64(types.int64, types.int64), codegen


@njit(**HELPER)
def inverse(m, most):
    """1 over the largest of some magnitudes, if that is a number."""
    T = type(m)
    wide, limit = 1 / np.float64(m), np.float64(most)
    return select((m > T(0)) & (m <= most), T(select(wide < limit, wide, limit)), T(1))


@intrinsic
def larger(typingctx, key, x):
    """The larger of a number's bits and those of a magnitude. As integers a NaN is above all."""

    def codegen(context, builder, sig, args):
        other = builder.and_(
            builder.bitcast(args[1], args[0].type), ir.Constant(args[0].type, (1 << (key.bitwidth - 1)) - 1)
        )
        return builder.select(builder.icmp_signed(">", other, args[0]), other, args[0])

    return key(key, x), codegen

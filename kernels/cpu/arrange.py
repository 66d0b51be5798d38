"""How arrays lie, worked out in compiled code: axes in the order of memory, merged where they can be.

Two C functions that drivers call by address. A layout is a record of int64 (see `LAYOUT`): the address and
code of an array, and the extents and strides, in bytes, with which `strided.transfer` walks it.
"""

from functools import cache

from numba import types

from .native import at_address, caller, compile_function, data_of, rank_of, shape_of, stack, strides_of

MOST_AXES = 64  # as NumPy
# Of a layout, in int64: an array's address, its code (the caller's), axes, extents, strides.
ADDRESS, CODE, AXES, SHAPE = range(4)
STRIDES = SHAPE + MOST_AXES
LAYOUT = STRIDES + MOST_AXES
LAYOUT_BYTES = 8 * LAYOUT
UNFIT = -1

ORDER_AXES = types.int64(*[types.int64] * 3)
LAY = types.int64(*[types.int64] * 6)
call_order_axes = caller(types.int64, 3)
call_lay = caller(types.int64, 6)


def order_axes(objects, count, order_at):
    """Sort the axes of arrays of one shape by their strides, the largest first; store the order.

    `objects` is the address of as many arrays' addresses. Gives the number of axes. Axes of one element come
    first: they lie anywhere.
    """
    pointers, order = at_address(objects, 0), at_address(order_at, 0)
    rank = rank_of(pointers[0])
    sizes = stack(8 * 64)
    for axis in range(rank):
        size = 0
        for k in range(count):
            size += abs(at_address(strides_of(pointers[k]), 0)[axis])
        if at_address(shape_of(pointers[0]), 0)[axis] == 1:
            size = 0x7FFFFFFFFFFFFFFF
        j = axis
        while j > 0 and at_address(sizes, 0)[j - 1] < size:
            at_address(sizes, 0)[j] = at_address(sizes, 0)[j - 1]
            order[j] = order[j - 1]
            j -= 1
        at_address(sizes, 0)[j] = size
        order[j] = axis
    return rank


def lay(array, like, order_at, skip, broadcast, into):
    """Write the layout of an array, with its axes in an order.

    Gives 0, or `UNFIT` if its shape is not that of `like`.

    Parameters
    ----------
    array, like : addresses of arrays
    order_at : address
        The order of the axes of `like`.
    skip : int
        An axis of `like` that `array` does not have; -1 for none; or ``-2 - axis`` for an axis that both have
        and that is left out of the layout.
    broadcast : int
        Whether the array may have fewer axes, or axes of one element, and is then broadcast.
    into : address
        Of the layout: all but its code is written.
    """
    rank, own = rank_of(like), rank_of(array)
    wanted, shape = at_address(shape_of(like), 0), at_address(shape_of(array), 0)
    strides, order = at_address(strides_of(array), 0), at_address(order_at, 0)
    out = at_address(into, 0)
    has_all = skip < 0
    if skip < -1:
        skip = -2 - skip
    missing = rank - own if has_all else rank - 1 - own
    if missing < 0 or (missing and not broadcast):
        return UNFIT
    axes = 0
    for k in range(rank):
        axis = order[k]
        if axis == skip:
            continue
        extent = wanted[axis]
        at = axis - missing - (not has_all and axis > skip)
        stride = 0
        if at >= 0:
            if shape[at] == extent:
                stride = strides[at]
            elif not (broadcast and shape[at] == 1):
                return UNFIT
        if extent == 1:
            continue
        if axes and out[STRIDES + axes - 1] == stride * extent:
            out[SHAPE + axes - 1] *= extent
            out[STRIDES + axes - 1] = stride
        else:
            out[SHAPE + axes] = extent
            out[STRIDES + axes] = stride
            axes += 1
    out[ADDRESS] = data_of(array)
    if not axes:
        out[SHAPE] = 1
        out[STRIDES] = 0
        axes = 1
    out[AXES] = axes
    return 0


@cache
def order_axes_address() -> int:
    """The address of `order_axes`."""
    return compile_function(order_axes, {}, "arrays", "arrays", ORDER_AXES)


@cache
def lay_address() -> int:
    """The address of `lay`."""
    return compile_function(lay, {}, "arrays", "arrays", LAY)

"""Calls recorded while they are worked out, and repeated for other arrays of the same signature.

The host never sees an element, so all calls of one signature (library, dtypes, shapes, strides, alignment,
options) make the same arrays and launch the same kernels with the same numbers: only addresses differ.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np

from ..spec import MISSING
from . import driver, faults, libraries

VECTOR_BYTES = 16  # to which the arrays of a kernel with vectors are aligned
ROOM_BYTES = 256  # to which each array in a room for several is aligned
CONSTANTS = frozenset((str, bool, int, float, tuple, type(None)))


def signature(values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return the part of a call that decides what is launched; None of one that is not repeated.

    Of an array that is how it lies, and how its address is aligned; all must be of one library. All else must
    be what cannot change.
    """
    kind = values[0].__class__
    look = libraries.library_of(kind).look
    if look is None:
        return None
    key: list[Any] = [kind]
    for v in values:
        c = v.__class__
        if c is kind:
            seen = look(v)
            if seen is None:
                return None
            address, how = seen
            key += how, address % VECTOR_BYTES
        elif c in CONSTANTS or isinstance(v, np.generic):
            key += c, v
        else:
            return None
    return tuple(key)


class Slot(int):
    """The address where a kind of call records its faults."""

    kind: tuple[Any, Any]  # it, and its errors: see `Faults.slot`


class Recording:
    """The arrays that a call has made, and what it has queued on its device, in order."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        # A kernel, blocks, threads and arguments; of a fill None, the bytes, nothing, and where.
        self.steps: list[tuple[Any, Any, Any, tuple[Any, ...]]] = []
        self.value: Any = None


def repeat(
    queue: Any, outputs: dict[str, Any], made: tuple[str, ...], values: tuple[Any, ...], valued: bool
) -> Callable[[tuple[Any, ...]], Any] | None:
    """Return the function that does a recorded call's steps for other arrays. See the CPU's `repeat`."""
    record, library, device = queue.record, queue.library, queue.device
    if record is None:
        return None
    value, recorded = record.value, record.steps
    if value is not None and not valued:  # nothing reads it: a sum need not be stored there
        recorded = [step for step in recorded if step[3][-1] is not value]
        value = value if any(x is value for *_, xs in recorded for x in xs) else None
    address, empty = library.address, library.empty
    kind = values[0].__class__
    # The numbers that a step's arguments are picked from: first addresses, of what the caller gives, of what
    # is made for the caller, of rooms for all else, one a dtype, and of faults.
    places: dict[int, tuple[int, int]] = {}  # of an array, by its owner: a place there, and its address now
    given: list[int] = []
    for k, v in enumerate(values):
        if v.__class__ is kind and id(v) not in places:
            places[id(v)] = len(given), address(v)
            given.append(k)
    new: list[tuple[Any, ...]] = []
    for a in (*(outputs[n] for n in made), *(() if value is None else (value,))):
        whole = next(m for m in record.made if m.owner is a.owner)
        places[id(a.owner)] = len(given) + len(new), whole.location.address
        axes = None if whole.location.strides is None else order(whole)
        new.append((whole.shape, whole.dtype, device, axes))
    rooms: dict[np.dtype, int] = {}  # their sizes in bytes
    used = {id(x.owner) for *_, xs in recorded for x in xs if getattr(x, "address", 0)}
    kept = [a for a in record.made if id(a.owner) in used - places.keys()]
    first_room, dtypes = len(places), list(dict.fromkeys(a.dtype for a in kept))
    for a in kept:
        start = rooms.get(a.dtype, 0)
        places[id(a.owner)] = first_room + dtypes.index(a.dtype), a.location.address - start
        rooms[a.dtype] = start + -(-a.size * a.itemsize // ROOM_BYTES) * ROOM_BYTES
    blocks = [((size // t.itemsize,), t, device) for t, size in rooms.items()]
    if used - places.keys():
        return None  # an array is not this call's
    slots = list(dict.fromkeys(x.kind for *_, xs in recorded for x in xs if isinstance(x, Slot)))
    first_slot = first_room + len(blocks)
    # Then addresses at offsets from these; at the end, and so counted from there, all other arguments.
    parts: list[tuple[int, int]] = []
    numbers: list[Any] = []

    def at(x: Any) -> int:
        """Return where an argument is found."""
        if isinstance(x, Slot):
            return first_slot + slots.index(x.kind)
        if getattr(x, "address", 0):
            base, start = places[id(x.owner)]
            part = base, x.address - start
            if not part[1]:
                return base
            if part not in parts:
                parts.append(part)
            return first_slot + len(slots) + parts.index(part)
        numbers.append(0 if x is None or hasattr(x, "address") else x)
        return -len(numbers)

    steps = [(kernel, a, b, itemgetter(*map(at, xs))) for kernel, a, b, xs in recorded]
    numbers.reverse()
    written = [places[id(o.owner)][0] for n, o in outputs.items() if n not in made]
    spans = [span(library.locate(values[k])) for k in given] if written else []
    # An array that is written, another, and the difference of their addresses between which they overlap.
    apart = [
        (k, j, spans[k][0] - high, spans[k][1] - low)
        for k in written
        for j, (low, high) in enumerate(spans)
        if j != k
    ]
    has_value = value is not None

    def again(values: tuple[Any, ...]) -> Any:
        pool = [address(values[k]) for k in given]
        for k, j, low, high in apart:
            if low < pool[j] - pool[k] < high:
                return MISSING
        api = driver.driver()
        entered = api.enter(device)
        try:
            arrays = [empty(*like) for like in new]
            memory = [empty(*like) for like in blocks]
            pool += map(address, arrays)
            pool += map(address, memory)
            if slots:
                slot = faults.faults(device).slot
                pool += [slot(*of) for of in slots]
            pool += [pool[k] + offset for k, offset in parts]
            pool += numbers
            stream = library.stream(device)
            for kernel, a, b, pick in steps:
                if kernel is None:
                    api.fill(pick(pool)[0], a, stream)
                else:
                    api.launch(kernel, a, b, stream, pick(pool))
            if slots:
                faults.check_now(device)
        finally:
            if entered:
                api.leave()
        return arrays.pop() if has_value else None, arrays

    return again


def order(array: Any) -> tuple[int, ...]:
    """Return the order of a new array's axes in memory."""
    return tuple(sorted(range(array.ndim), key=lambda k: (-array.strides[k], k)))


def span(location: Any) -> tuple[int, int]:
    """Return the bytes that an array lies in, counted from its address."""
    size = location.dtype.itemsize
    strides = location.strides or libraries.strides_of(location.shape, size)
    if not all(location.shape):
        return 0, 0
    steps = [s * (n - 1) for s, n in zip(strides, location.shape, strict=True)]
    return sum(min(0, s) for s in steps), sum(max(0, s) for s in steps) + size

"""One call of a driver: compiled code and the arrays it is given; and the same for later calls of its shape.

A call is worked out once, by Python that checks and words errors. The launch that comes of it depends on no
extent and no element, so calls with other arrays of the same dtypes and layouts repeat it: they make new
outputs, and leave the rest to the compiled driver, which refuses arrays that do not fit together.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from ..layout import overlaps_itself
from ..spec import MISSING
from . import memory, parallel
from .arithmetic import number
from .native import NO_MEMORY

# What a driver gives beside the value: that all is well; that the arrays do not fit together; `NO_MEMORY`; or
# the position, not negative, of the first wrong number.
OK, UNFIT = -1, -2
INCOMPLETE = -16  # at most this: what a recipe misses, which `Launch.complete` knows

LARGE = memory.FROM_BYTES  # of a new array, which may then be of memory that is used again


class New(NamedTuple):
    """An output that a call makes."""

    slot: int  # among the launch's arrays
    like: int  # the slot of the array whose shape, or that of whose rows, it has
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None  # from that of `like`, where it differs


class Launch(NamedTuple):
    """A call of a driver."""

    entry: Callable[..., tuple[float, int]]  # ``entry(recipe, numbers, arrays, task, fork)``
    recipe: np.ndarray  # int64
    numbers: np.ndarray  # float64
    arrays: tuple[Any, ...]  # in the driver's order; None for one that is absent
    task: int  # the address of the driver's task
    parallel_from: int  # elements of the first array from which all threads are used
    new: tuple[New, ...] = ()  # the arrays that were made for the call
    complete: Callable[[np.ndarray, int], None] | None = None  # compile what a recipe misses, by the status
    before: Any = None  # a launch that has to succeed before anything is written
    broadcast: tuple[int, ...] = ()  # the slots of arrays that were broadcast to the first one's shape


# A family is a module with
# - ``pack(problem, outputs, made)``: a launch of a problem; `outputs` are its gradients by name, and its
#   ``"terms"``; those named in `made` are new. None where it takes more than one;
# - ``new_terms(problem)``: a new array for the terms; None where they are reduced, or not asked for;
# - ``refuse(problem, status)``: the exception for a status that is not `OK`.
TERMS, CURVATURE = "terms", "curvature"


def scalar_of(dtype: np.dtype) -> Callable[[float], Any]:
    """Return `number` for a dtype, quick for numbers that it holds."""
    make = dtype.type
    limit = 65504.0 if dtype == np.float16 else 3e38
    return lambda value: make(value) if -limit <= value <= limit else number(value, dtype)


def compute(family: Any, problem: Any, outputs: dict[str, Any]) -> Any:
    """Write the outputs, and return the value: a number, or the terms where they are not reduced."""
    terms = family.new_terms(problem)
    if terms is not None:
        outputs = {TERMS: terms, **outputs}
    value, status = run(family.pack(problem, outputs, ()))
    if status == NO_MEMORY:
        raise MemoryError(f"{problem.name}: no memory for what a call takes beside its arrays")
    if status != OK:
        raise family.refuse(problem, status)
    return number(value, problem.dtype) if terms is None else terms


def run(launch: Launch) -> tuple[float, int]:
    """Give the value and the status."""
    # The driver reads memory that NumPy's arrays have, and no other object.
    assert all(a is None or a.__class__ is np.ndarray for a in launch.arrays), launch.arrays
    if launch.before is not None:
        value, status = run(launch.before)
        if status != OK:
            return value, status
    while True:
        fork = 0 if launch.arrays[0].size < launch.parallel_from else parallel.forker()
        value, status = launch.entry(launch.recipe, launch.numbers, launch.arrays, launch.task, fork)
        if status > INCOMPLETE or launch.complete is None:
            return value, status
        launch.complete(launch.recipe, status)


# ---- the same call again ------------------------------------------------------------------------------


def maker(new: New, made: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that makes an output as `made` was made, for another array like that of `new`."""
    shape, dtype = new.shape, made.dtype
    if shape is not None:
        return lambda like: np.empty(shape(like.shape), dtype)
    if made.flags.c_contiguous:
        small = LARGE // dtype.itemsize

        def make(like: np.ndarray) -> np.ndarray:
            if like.size < small:
                return np.empty(like.shape, dtype)
            return memory.empty(like.shape, dtype)

        return make
    if made.flags.f_contiguous:
        return lambda like: np.empty(like.shape, dtype, "F")
    return lambda like: np.empty_like(like, dtype, subok=False)


def sources(launch: Launch, values: tuple[Any, ...]) -> list[int] | None:
    """Return where each array of a launch is among the caller's values, None and its new arrays.

    None where one is nowhere: it was made of the caller's by a conversion, so each call has to be worked out.
    """
    made = {n.slot: k for k, n in enumerate(launch.new)}
    none = len(values)
    found: list[int] = []
    for slot, array in enumerate(launch.arrays):
        if array is None:
            found.append(none)
        elif slot in made:
            found.append(none + 1 + made[slot])
        else:
            at = [k for k, v in enumerate(values) if v is array]
            if not at:
                return None
            found.append(at[0])
    return found


def apart(written: list[Any], values: tuple[Any, ...]) -> list[tuple[int, int]] | None:
    """Return the pairs of values that must not share memory, for one is written; None where two do."""
    arrays = [k for k, v in enumerate(values) if isinstance(v, np.ndarray)]
    pairs: list[tuple[int, int]] = []
    for w in written:
        at = [k for k in arrays if values[k] is w]
        others = [k for k in arrays if values[k] is not w]
        if not at or any(np.may_share_memory(w, values[k]) for k in others):
            return None
        pairs += [(at[0], k) for k in others if (k, at[0]) not in pairs]
    return pairs


def where_alike(
    places: list[int], values: tuple[Any, ...], again: Callable[[tuple[Any, ...]], Any]
) -> Callable[[tuple[Any, ...]], Any]:
    """Return `again` for calls whose values at these places have axes of one element where these have."""

    def axes(values: tuple[Any, ...]) -> list[list[bool]]:
        return [[n == 1 for n in values[k].shape] for k in places]

    own = axes(values)
    return lambda values: again(values) if axes(values) == own else MISSING


def repeat(
    family: Any, problem: Any, outputs: dict[str, Any], made: tuple[str, ...], values: tuple[Any, ...]
) -> Callable[[tuple[Any, ...]], Any] | None:
    """Return a function that computes the same problem of other arrays: see `backend.repeat`."""
    scalar = scalar_of(problem.dtype)
    written = [o for n, o in outputs.items() if n not in made]
    terms = family.new_terms(problem)
    if terms is not None:
        outputs, made = {TERMS: terms, **outputs}, (TERMS, *made)
    launch = family.pack(problem, outputs, made)
    if launch is None:
        return None
    found, pairs = sources(launch, values), apart(written, values)
    if found is None or pairs is None or launch.before is not None:
        return None
    pick, first = itemgetter(*found), found[0]
    entry, recipe, numbers, _, task, parallel_from, new, _, _, broadcast = launch
    makers = tuple((found[n.like], maker(n, launch.arrays[n.slot])) for n in new)
    # What is returned is kept for thousands of signatures: it must hold no array.
    bare, has_terms = launch._replace(arrays=()), terms is not None

    def finish(arrays: tuple[Any, ...]) -> tuple[float, int]:
        return run(bare._replace(arrays=arrays))

    # A gap between elements may hide that two of them lie at one address.
    tangled = [k for k, v in enumerate(values) if any(v is o and not v.flags.forc for o in written)]

    def again(values: tuple[Any, ...]) -> Any:
        for i, k in pairs:
            if np.may_share_memory(values[i], values[k]):
                return MISSING
        for k in tangled:
            if overlaps_itself(values[k]):
                return MISSING
        new = tuple([make(values[like]) for like, make in makers])
        arrays = pick((*values, None, *new))
        if values[first].size < parallel_from:
            value, status = entry(recipe, numbers, arrays, task, 0)
            if status <= INCOMPLETE:
                value, status = finish(arrays)
        else:
            value, status = finish(arrays)
        if status != OK:
            return MISSING
        return (new[0], new[1:]) if has_terms else (scalar(value), new)

    if broadcast:
        return where_alike([first, *(found[k] for k in broadcast)], values, again)
    if pairs or has_terms or len(makers) != 1:
        return again
    ((like, make),) = makers

    def again_with_one(values: tuple[Any, ...]) -> Any:
        """The commonest kind of call: a number and a new gradient."""
        made = make(values[like])
        arrays = pick((*values, None, made))
        if values[first].size < parallel_from:
            value, status = entry(recipe, numbers, arrays, task, 0)
            if status <= INCOMPLETE:
                value, status = finish(arrays)
        else:
            value, status = finish(arrays)
        return (scalar(value), (made,)) if status == OK else MISSING

    return again_with_one

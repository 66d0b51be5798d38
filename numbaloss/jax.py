"""Losses in JAX programs, on CPU and GPU: under ``jax.jit``, with ``jax.grad`` and ``jax.value_and_grad``.

``numbaloss.jax.cross_entropy`` is ``nl.cross_entropy`` for JAX's arrays, and so is each built-in loss by its
name; `function` makes one of any loss, yours too. Arrays are traced, options are not: they are numbers and
strings that are known when a program is compiled. An error of shapes, dtypes or options is raised when the
program is traced; one of elements (a class index out of range) when it runs, as a ``JaxRuntimeError`` of JAX
with the message in it.

A loss is a callback in the program (``jax.experimental.buffer_callback``). It reads JAX's buffers where they
lie, and writes value and gradients into the program's: under ``jax.jit`` no array is copied but the terms of
``reduction='none'``, once; without it JAX copies what is differentiated. Where JAX has no such callback, it
is ``jax.pure_callback``, which may copy arguments and does copy results. A call holds Python's lock.

Gradients are computed along with the value, in one pass, by those arguments alone that are differentiated;
the backward pass multiplies them. Of ``reduction='none'`` the backward pass computes them, as the numbers
that multiply terms come there. ``jax.jvp``, ``jax.jacfwd`` and second derivatives are errors that JAX raises.
Under ``jax.vmap`` calls are made one after the other: rows of the loss's own are faster.

On a GPU the kernels run on the program's stream, on its buffers. What is wrong with elements gives NaN there,
and an error by `numbaloss.synchronize`. It needs numba-cuda (``pip install 'numbaloss[cuda13]'``), and a JAX
that has such a callback: with ``jax.pure_callback`` arrays travel to the CPU and back. Memory for the value
and for temporary arrays is asked of the driver in each call, which may wait for the device, and lies outside
of what JAX sets aside: it has to leave some (``XLA_PYTHON_CLIENT_MEM_FRACTION``).
"""

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import numpy as np

try:
    import jax
    from jax.custom_derivatives import SymbolicZero
except ImportError as error:
    raise ImportError("numbaloss.jax needs JAX: pip install jax") from error
try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError:  # an older JAX
    buffer_callback = None

from .kernels import devices
from .kernels.spec import GRAD, VALUE, VALUE_AND_GRAD
from .loss import LossFunction, registry
from .optimize import operands_of, parts_of
from .terms import shape_of_terms

__all__ = ["function", *registry]

ELSEWHERE = "numbaloss.jax computes on CPUs and CUDA devices: place the computation on jax.devices('cpu')[0]"


def function(loss: Any) -> Callable[..., Any]:
    """Make a function of JAX's arrays of a loss.

    Parameters
    ----------
    loss : LossFunction or Loss
        ``nl.huber_loss``, ``nl.HuberLoss(delta=0.5)`` with the options that it has now, one of yours, a sum.

    Returns
    -------
    function
        It takes the loss's arguments. Arrays may be differentiated if the loss can do so.

    Raises
    ------
    TypeError
        If it is no loss, or one that holds arrays to be trained (`LinearCrossEntropyLoss`).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numbaloss as nl, numbaloss.jax
    >>> huber = numbaloss.jax.function(nl.huber_loss)
    >>> step = jax.jit(jax.value_and_grad(lambda x, y: huber(x, y, delta=0.5)))
    >>> value, gradient = step(jnp.array([1.0, 0.25]), jnp.zeros(2))
    >>> float(value), gradient.tolist()
    (0.203125, [0.25, 0.125])
    """
    parts = parts_of("numbaloss.jax.function", loss)
    if not isinstance(loss, LossFunction):
        loss = copy(loss)
        if any(definition._held for definition, _ in parts):
            raise TypeError(
                "numbaloss.jax.function: a criterion that holds arrays does not train them here; pass the "
                f"function {parts[0][0].function.__name__}, which takes them"
            )
    if isinstance(loss, LossFunction):
        name, parameters = loss.__name__, loss.__signature__.parameters
        order = tuple(n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)
    else:
        name, order = repr(loss), operands_of(loss)

    def of_arrays(*args: Any, **kwargs: Any) -> Any:
        return _evaluate(loss, name, _bind(name, order, args, kwargs))

    of_arrays.__name__ = of_arrays.__qualname__ = name
    if isinstance(loss, LossFunction):
        of_arrays.__doc__ = loss.__doc__
        of_arrays.__signature__ = loss.without_ranks  # type: ignore[attr-defined]
    return of_arrays


def __getattr__(name: str) -> Any:
    if name not in registry:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = function(registry[name])
    return made


# ---- a call ---------------------------------------------------------------------------------------------


def _bind(name: str, order: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if len(args) > len(order):
        raise TypeError(f"{name}: takes at most {len(order)} positional arguments, got {len(args)}")
    given = dict(zip(order, args, strict=False))
    twice = given.keys() & kwargs
    if twice:
        raise TypeError(f"{name}: got multiple values for {', '.join(sorted(twice))}")
    for n in ("wrt", "out", "grad_output"):
        if n in kwargs:
            raise TypeError(f"{name}: {n} is no argument here: use jax.grad or jax.value_and_grad")
    if "comm" in kwargs:
        raise TypeError(f"{name}: comm is no argument here: JAX shares out arrays by itself")
    return {n: v for n, v in {**given, **kwargs}.items() if v is not None}


def _evaluate(loss: Any, name: str, given: dict[str, Any]) -> Any:
    """Evaluate a loss as an operation that JAX may differentiate."""
    parts = parts_of("numbaloss.jax", loss)
    unknown = [n for n in given if any(n not in d._signature(VALUE).parameters for d, _ in parts)]
    if unknown:
        raise TypeError(f"{name}: got an unexpected keyword argument {unknown[0]!r}")
    missing = [n for d, _ in parts for n in d._required if n not in given]
    if missing:
        raise TypeError(f"{name}: missing required argument: {missing[0]}")
    arrays_of = {n for d, _ in parts for n in (*d._required, *(k for k, f in d.fields.items() if f.array))}
    names = tuple(n for n in given if n in arrays_of or n == "sample_weight")
    static = tuple((n, v) for n, v in given.items() if n not in names)
    for n, v in static:
        if isinstance(v, jax.core.Tracer):
            raise TypeError(f"{name}: {n} must be known when the program is compiled, got {type(v).__name__}")
    arrays = tuple(jax.numpy.asarray(given[n]) for n in names)
    differentiable = set.intersection(*(set(d._differentiable()) for d, _ in parts))
    result = _result(parts, names, arrays, dict(static))

    def run(mode: str, wrt: tuple[str, ...], arrays: tuple[Any, ...], more: tuple[str, ...] = ()) -> Any:
        by = [_like(arrays[names.index(n)]) for n in wrt]
        outs = [*([] if mode == GRAD else [result]), *by]
        return _call(Task(loss, mode, (*names, *more), wrt, static), outs, arrays)

    @jax.custom_vjp
    def evaluate(*arrays: Any) -> Any:
        return run(VALUE, (), arrays)[0]

    def forward(*primals: Any) -> Any:
        arrays = tuple(p.value for p in primals)
        wrt = tuple(
            n for n, p in zip(names, primals, strict=True) if p.perturbed and p.value.dtype.kind not in "iub"
        )
        for n in wrt:
            if n not in differentiable:
                raise TypeError(
                    f"{name}: is not differentiated by {n}, only by {', '.join(sorted(differentiable))}; "
                    "jax.lax.stop_gradient makes it a constant"
                )
        if not wrt:
            return run(VALUE, (), arrays)[0], ({}, None)
        _result(parts, names, arrays, {**dict(static), "wrt": wrt})
        if result.shape:  # by what each term is multiplied is not known yet
            return run(VALUE, (), arrays)[0], (dict.fromkeys(wrt), arrays)
        value, *gradients = run(VALUE_AND_GRAD, wrt, arrays)
        return value, (dict(zip(wrt, gradients, strict=True)), None)

    def backward(kept: Any, up: Any) -> Any:
        by, arrays = kept
        wrt = tuple(n for n in names if n in by)
        if isinstance(up, SymbolicZero) or not wrt:
            return (None,) * len(names)
        if arrays is not None:
            gradients = dict(zip(wrt, run(GRAD, wrt, (*arrays, up), ("grad_output",)), strict=True))
        else:
            gradients = {n: (by[n] * up).astype(by[n].dtype) for n in wrt}
        return tuple(gradients.get(n) for n in names)

    evaluate.defvjp(forward, backward, symbolic_zeros=True)
    return evaluate(*arrays)


def _like(array: Any) -> Any:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _result(
    parts: list[tuple[Any, dict[str, Any]]], names: tuple[str, ...], arrays: Any, more: dict[str, Any]
) -> Any:
    """Check a call as the loss itself does, of arrays that are not there yet; return the value's form."""
    stand_ins = {
        n: np.broadcast_to(np.zeros((), a.dtype), a.shape) for n, a in zip(names, arrays, strict=True)
    }
    forms, shapes = set(), {n: a.shape for n, a in stand_ins.items()}
    for definition, options in parts:
        held = {n: v for n, v in options.items() if v is not None}
        call = {**held, **stand_ins, **more}
        settings = definition._settings(VALUE_AND_GRAD if "wrt" in more else VALUE, call)
        problem = definition._problem(settings, call, devices.cpu())
        shape = shape_of_terms(definition, shapes) if settings.reduction == "none" else ()
        forms.add((shape, problem.dtype))
    if len({shape for shape, _ in forms}) > 1:
        raise ValueError(f"a sum's losses must have terms of one shape, got {sorted(s for s, _ in forms)}")
    dtypes = [d for _, d in forms]
    return jax.ShapeDtypeStruct(next(iter(forms))[0], max(dtypes, key=lambda d: d.itemsize))


# ---- in the program -------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One evaluation, as JAX's callbacks make it. Equal ones are compiled once."""

    loss: Any
    mode: str
    names: tuple[str, ...]  # of the arrays
    wrt: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, context: Any, outs: list[Any], *buffers: Any) -> None:
        """Compute in JAX's buffers."""
        try:
            arrays, results = [np.asarray(b) for b in buffers], [np.asarray(b) for b in outs]
        except Exception as error:
            if not all(map(devices.is_device_array, (*buffers, *outs))):
                raise NotImplementedError(ELSEWHERE) from error
            cuda = devices.cuda()
            arrays, results = ([cuda.from_program(b, context.stream) for b in bs] for bs in (buffers, outs))
        self.compute(results, arrays)

    def compute(self, results: list[Any], arrays: list[Any]) -> None:
        call = dict(zip(self.names, arrays, strict=True)) | dict(self.options)
        if self.mode == VALUE:
            results[0][...] = self.loss(**call)
        elif self.mode == GRAD:
            self.loss.grad(**call, wrt=self.wrt, out=tuple(results))
        else:
            results[0][...] = self.loss.value_and_grad(**call, wrt=self.wrt, out=tuple(results[1:]))[0]


def _call(task: Task, outs: list[Any], arrays: tuple[Any, ...]) -> Any:
    try:
        hash(task)
    except TypeError:
        raise TypeError(f"numbaloss.jax: options must have a hash, got {dict(task.options)}") from None
    if buffer_callback is not None:
        return buffer_callback(task, outs, vmap_method="sequential")(*arrays)
    shapes = tuple((o.shape, o.dtype) for o in outs)
    return jax.pure_callback(Anew(task, shapes), tuple(outs), *arrays, vmap_method="sequential")


class Anew(NamedTuple):
    """A task that makes its results, for ``jax.pure_callback``."""

    task: Task
    shapes: tuple[Any, ...]

    def __call__(self, *arrays: Any) -> tuple[np.ndarray, ...]:
        results = [np.empty(shape, dtype) for shape, dtype in self.shapes]
        self.task.compute(results, [np.asarray(a) for a in arrays])
        return tuple(results)

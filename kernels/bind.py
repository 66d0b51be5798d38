"""A template and the scalars it is bound to make a kernel, kept in Numba's disk cache.

Numba finds a cached kernel by its file's time stamp, its name and its bytecode. A function that closes over
another compiled function never hits that cache; a copy of the template whose *globals* hold the scalars does,
if its name says everything that the bytecode does not: which scalars, their source, the options they were
compiled with. This module makes such copies and such names, and is the only metaprogramming here.

A template calls what varies by a name that the scope binds, and all else by its own name: what it calls is
bound along with it, so that a kernel is written, and read, as if it were one module's ordinary functions.
"""

import dis
import gc
import hashlib
import inspect
import signal
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .branches import chosen

HERE = Path(__file__).parent


@cache
def sources() -> str:
    """A digest of this package's own source: an edit of the maths or of a template drops what it made."""
    digest = hashlib.sha256()
    # Without source, Python's own compiled files say what it was.
    for path in sorted(HERE.rglob("*.py")) or sorted(HERE.rglob("*.pyc")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let a function compile without Python's search for cycles, and with Ctrl-C put off until it is done.

    The search would visit all of Numba's objects hundreds of times, a twelfth of the time. It has to come
    once, after: errors that Numba caught on its way hold their callers' frames, and the arrays in them. An
    interrupt in one of LLVM's callbacks is lost or, now and then, the process's end; a function takes a
    second or two.
    """
    collects = gc.isenabled()
    handler: Any = signal.getsignal(signal.SIGINT)
    interrupts: list[Any] = []
    mine = callable(handler) and threading.current_thread() is threading.main_thread()
    if mine:
        signal.signal(signal.SIGINT, lambda *given: interrupts.append(given))
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        if mine:  # last, as an interrupt may be raised from here on
            signal.signal(signal.SIGINT, handler)
        if interrupts:
            handler(*interrupts[-1])


def bind(
    template: Callable[..., Any],
    scope: Mapping[str, Any],
    name: str,
    identity: object,
    decorate: Callable[[Callable[..., Any]], Any],
    helpers: "Helpers | None" = None,
) -> Any:
    """A copy of `template` whose globals hold `scope`, compiled by `decorate`.

    Parameters
    ----------
    template : function
        It refers to what is bound as to globals.
    scope : mapping
        Names that the template uses, and their objects.
    name : str
        Stands in the cache's file name, for people.
    identity : object
        All that the kernel depends on beyond the template and this package's source: its ``repr`` goes
        into the name's digest, so that two different kernels never share a cache entry. With `helpers` the
        constants in `scope`, and the names of the functions there, go there by themselves.
    decorate : callable
        For instance ``disk.kept()``.
    helpers : Helpers, optional
        For what the template calls: each plain function of its own folder's modules that it names, in
        `scope` or as its module does, is bound to the same scope, and so is what that names in turn.
        Functions that are compiled already stay as they are, and so do those of other folders.
    """
    assert inspect.isfunction(template)
    if helpers is not None:
        identity = identity, sorted((k, _said(v)) for k, v in scope.items())
    digest = hashlib.sha256(f"{sources()} {identity!r}".encode()).hexdigest()[:16]
    with undisturbed():
        return _copy(template, scope, f"{name}_{digest}", decorate, helpers)


class Helpers:
    """The functions that templates of one scope call, bound to it, each once; `decorate` compiles them."""

    def __init__(self, decorate: Callable[[Callable[..., Any]], Any]) -> None:
        self.decorate = decorate
        self.bound: dict[Any, Any] = {}


def _copy(
    template: types.FunctionType,
    scope: Mapping[str, Any],
    suffix: str,
    decorate: Callable[[Callable[..., Any]], Any],
    helpers: Helpers | None,
) -> Any:
    """A bound copy of a template, and of what it calls."""
    copy = types.FunctionType(
        chosen(template, scope),
        {**template.__globals__, **scope},
        template.__name__,
        template.__defaults__,
        template.__closure__,
    )
    copy.__qualname__ = f"{template.__name__}_{suffix}"
    copy.__module__ = template.__module__
    if helpers is None:
        return decorate(copy)
    folder = template.__module__.rpartition(".")[0] + "."
    for called in _globals_of(template.__code__):
        value = copy.__globals__.get(called)
        if isinstance(value, types.FunctionType) and value.__module__.startswith(folder):
            if value not in helpers.bound:
                helpers.bound[value] = _copy(value, scope, suffix, helpers.decorate, helpers)
            copy.__globals__[called] = helpers.bound[value]
    return decorate(copy)


def _globals_of(code: types.CodeType) -> set[str]:
    """The names of globals that a function reads, nested functions included."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _globals_of(constant)
    return found


def _said(value: object) -> object:
    """What the digest says of a bound object: of a constant all, of a function its name."""
    if isinstance(value, tuple):
        return tuple(map(_said, value))
    if isinstance(value, types.FunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value) if value is None or isinstance(value, bool | int | float | str | np.generic) else ""


def named(function: Callable[..., Any], names: tuple[str, ...], defaults: tuple[Any, ...]) -> Any:
    """A copy of a function of as many positional parameters, with these names and trailing defaults."""
    code = function.__code__
    assert code.co_argcount == len(names), (function, names)
    renamed = code.replace(co_varnames=names + code.co_varnames[len(names) :])
    copy = types.FunctionType(
        renamed, function.__globals__, function.__name__, defaults, function.__closure__
    )
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return copy


# `named` gives these the loss's own parameter names.
GATHER: dict[int, Callable[[Any], Callable[..., Any]]] = {
    1: lambda f: lambda a: f((a,)),
    2: lambda f: lambda a, b: f((a, b)),
    3: lambda f: lambda a, b, c: f((a, b, c)),
    4: lambda f: lambda a, b, c, d: f((a, b, c, d)),
    5: lambda f: lambda a, b, c, d, e: f((a, b, c, d, e)),
    6: lambda f: lambda a, b, c, d, e, g: f((a, b, c, d, e, g)),
    7: lambda f: lambda a, b, c, d, e, g, h: f((a, b, c, d, e, g, h)),
    8: lambda f: lambda a, b, c, d, e, g, h, i: f((a, b, c, d, e, g, h, i)),
    9: lambda f: lambda a, b, c, d, e, g, h, i, j: f((a, b, c, d, e, g, h, i, j)),
    10: lambda f: lambda a, b, c, d, e, g, h, i, j, k: f((a, b, c, d, e, g, h, i, j, k)),
}


def gathered(function: Any, names: tuple[str, ...], defaults: tuple[Any, ...], what: str) -> Any:
    """Return a function of a tuple as one of as many parameters, with these names and trailing defaults."""
    if len(names) not in GATHER:
        raise TypeError(
            f"{what} takes at most {max(GATHER)} arguments inside compiled code, got {len(names)}"
        )
    return named(GATHER[len(names)](function), names, defaults)

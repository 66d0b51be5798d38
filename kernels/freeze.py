"""A definition's function as it stands at one moment.

Compiled code keeps the numbers that it was compiled with. So a definition is copied together with all that
it reads: globals, attributes of modules, closure cells, the functions that it calls. Each kernel is compiled
of the copy, whenever that is: none sees another number than the others do. The copy's digest says all of it,
and names the kernels on disk. What was read tells, at a later call, whether the copy still says what the
definition does.
"""

import builtins
import dis
import enum
import hashlib
import types
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .spec import MISSING

# What was read: how, by which name, and what was there. All are compared at each call of a user's loss.
Read = tuple[Callable[..., Any], str, object]


class Frozen(NamedTuple):
    """A function that does not change, the digest of all that decides what it computes, and what was read."""

    function: types.FunctionType
    digest: str
    read: tuple[Read, ...]


# Functions that say the same are one, so that kernels of either are.
_by_digest: dict[str, types.FunctionType] = {}
_digests: dict[types.FunctionType, str] = {}

# Modules whose functions compiled code stands in for, or whose source the cache knows: they are named.
PACKAGE = __package__.split(".")[0]
TRUSTED = {"builtins", "math", "cmath", "operator", "numpy", "numba", "numba_cuda"}
# Constants whose `repr` says all, with their type.
PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic, np.dtype, range, slice, type(...))


def freeze(function: Any) -> Frozen:
    """Copy a definition's function.

    Raises
    ------
    TypeError
        If it refers to something of which a change could not be noticed.
    """
    if function in _digests:
        return Frozen(function, _digests[function], ())
    walk = _Walk(getattr(function, "__name__", "definition"))
    copy = walk.value(function)
    digest = walk.digest.hexdigest()
    copy = _by_digest.setdefault(digest, copy)
    _digests[copy] = digest
    return Frozen(copy, digest, tuple(walk.read.values()))


def frozen(function: Callable[..., Any]) -> Any:
    """Return the copy alone."""
    return freeze(function).function


def fingerprint(function: Callable[..., Any]) -> str:
    """Return the digest alone. Comments and line numbers do not count, nor the defaults of options."""
    return freeze(function).digest


def has_changed(read: Iterable[Read]) -> bool:
    """Whether anything that was read is now something else."""
    return any(get(name, MISSING) is not value for get, name, value in read)


def is_trusted(value: object) -> bool:
    """Whether a name says all of a module, or of a function: what it is does not change."""
    is_module = isinstance(value, types.ModuleType)
    named = getattr(value, "__name__" if is_module else "__module__", None)
    module = named if isinstance(named, str) else ""
    # Of the library all modules, but not the losses' functions; copies from a disk are of this module.
    ours = module.split(".")[0] == PACKAGE if is_module else module.startswith(f"{__package__}.")
    return module.split(".")[0] in TRUSTED or (ours and module != __name__)


class _Walk:
    """Copies a function and what it reads, and says all of it to a digest."""

    def __init__(self, name: str) -> None:
        self.name, self.digest = name, hashlib.sha256()
        self.read: dict[tuple[int, str], Read] = {}  # by the owner's address and the name
        self.copies: dict[int, tuple[int, Any]] = {}  # by a function's address: its number, its copy
        self.kept: list[Any] = []  # those functions

    def say(self, *parts: object) -> None:
        self.digest.update(repr(parts).encode() + b"\0")

    def note(self, owner: Any, name: str) -> Any:
        """Read a dict's item, or an attribute."""
        get = owner.get if isinstance(owner, dict) else partial(getattr, owner)
        return self.read.setdefault((id(owner), name), (get, name, get(name, MISSING)))[2]

    # ---- values ------------------------------------------------------------------------------------
    def value(self, value: Any) -> Any:
        """Say a value; return what stands for it in the copy."""
        if id(value) in self.copies:
            number, copy = self.copies[id(value)]
            self.say("again", number)
            return copy
        kind = type(value)
        if isinstance(value, enum.Enum):
            self.say("member", f"{kind.__module__}.{kind.__qualname__}", value.name)
            self.value(value.value)
            return value
        if isinstance(value, PLAIN):
            self.say(kind.__module__, kind.__name__, value)
            return value
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self.say("array", value.dtype.str, value.shape)
            self.digest.update(value.tobytes())
            return value.copy()
        if isinstance(value, list | tuple):
            self.say(kind.__name__, getattr(kind, "_fields", ()), len(value))
            made = [self.value(x) for x in value]
            return kind._make(made) if hasattr(kind, "_make") else kind(made)
        if hasattr(value, "py_func"):
            return self.compiled(value)
        if isinstance(value, types.FunctionType) and not is_trusted(value):
            return self.function(value)
        if isinstance(value, type) and issubclass(value, enum.Enum):
            self.say("enum", [(n, repr(m.value)) for n, m in value.__members__.items()])
            return value
        if isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields"):
            self.say("namedtuple", value.__qualname__, getattr(value, "_fields", ()))
            return value
        if is_trusted(value) or kind.__module__.split(".")[0] == "numba":
            named = getattr(value, "__qualname__", getattr(value, "__name__", None))
            self.say("name", getattr(value, "__module__", ""), repr(value) if named is None else named)
            return value
        if isinstance(value, types.BuiltinFunctionType | np.ufunc):
            self.say("name", getattr(value, "__module__", ""), value.__name__)
            return value
        raise TypeError(
            f"{self.name} refers to {value!r}, of type {kind.__name__}, of which a change could not be "
            "noticed; refer to a number, an array or a compiled function, or make it an option"
        )

    def compiled(self, value: Any) -> Any:
        """A compiled function that is called: it may have been compiled of what has since changed."""
        if is_trusted(value.py_func):
            self.say("name", value.py_func.__module__, value.py_func.__qualname__)
            return value
        self.say("compiled", sorted(getattr(value, "targetoptions", {}).items()))
        copy = self.value(value.py_func)
        if is_trusted(type(value)) and hasattr(value, "targetoptions"):
            copy = type(value)(copy, targetoptions=dict(value.targetoptions))
        self.keep(value, copy)
        return copy

    def keep(self, value: Any, copy: Any) -> None:
        self.copies[id(value)] = len(self.kept), copy
        self.kept.append(value)

    # ---- functions ---------------------------------------------------------------------------------
    def function(self, f: types.FunctionType) -> Any:
        whole = not self.kept  # the definition itself, whose defaults are options: every call gives them
        self.note(f, "__code__")
        code, scope = f.__code__, f.__globals__
        cells = dict(zip(code.co_freevars, f.__closure__ or (), strict=True))
        made: dict[str, Any] = {"__name__": __name__, "__builtins__": builtins}
        closure = tuple(types.CellType() for _ in cells)
        copy = types.FunctionType(code, made, f.__name__, None, closure)
        # A kernel on disk names the modules of the functions that it was made of, and they are imported when
        # it is loaded. The same definition may by then stand in another module, or in none.
        copy.__module__ = __name__
        self.keep(f, copy)
        self.say("function")
        if not whole:
            copy.__defaults__ = self.value(self.note(f, "__defaults__"))
        enclosed: dict[str, Any] = {}
        for name, attributes in self.code(code):
            self.say(name, attributes)
            if name in cells:
                value, copies = self.note(cells[name], "cell_contents"), enclosed
            else:
                value, copies = self.note(scope, name), made
            if value is not MISSING:
                copies[name] = self.attributes(value, attributes, copies.get(name))
        for name, cell in zip(cells, closure, strict=True):
            if name in enclosed:
                cell.cell_contents = enclosed[name]
        return copy

    def code(self, code: types.CodeType) -> list[tuple[str, tuple[str, ...]]]:
        """Say a code object; return the names that it reads from outside, with the attributes that follow."""
        self.say(code.co_code, code.co_names, code.co_varnames, code.co_argcount)
        found: list[tuple[str, tuple[str, ...]]] = []
        open_ = False
        for i in dis.get_instructions(code):
            outside = i.opname in ("LOAD_GLOBAL", "LOAD_NAME") or (
                i.opname == "LOAD_DEREF" and i.argval in code.co_freevars
            )
            if outside:
                found.append((i.argval, ()))
            elif open_ and i.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                found[-1] = found[-1][0], (*found[-1][1], i.argval)
            open_ = outside or (open_ and i.opname in ("LOAD_ATTR", "LOAD_METHOD"))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                found += self.code(constant)
            else:
                self.say(constant)
        return found

    def attributes(self, value: Any, names: tuple[str, ...], before: Any) -> Any:
        """Follow attributes of modules; return what stands for the first, or `before` with more in it."""
        if not isinstance(value, types.ModuleType):
            return self.value(value)
        if is_trusted(value):
            self.say("module", value.__name__)
            return value
        if not names:
            raise TypeError(
                f"{self.name} refers to the module {value.__name__} as a whole, of which a change could not "
                "be noticed; refer to its attributes"
            )
        # By a name that no module has: a kernel on disk holds the copy, and is not to import the module.
        made = before if isinstance(before, types.ModuleType) else types.ModuleType(f"{value.__name__}, read")
        name, own = names[0], vars(value)
        found = self.note(own if name in own else value, name)
        if found is not MISSING:
            setattr(made, name, self.attributes(found, names[1:], getattr(made, name, None)))
        return made

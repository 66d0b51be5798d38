"""What the commands' options take: lists of names, shapes and sizes, and files, all checked first."""

import difflib
import os
from collections.abc import Callable, Iterable
from typing import Any

import click

import numbaloss as nl

from .cases import DTYPES, FAMILIES, Shape, dtype_of, family_of


class ListOf(click.ParamType):
    """Values separated by commas, each part of the text giving one or several."""

    def __init__(self, name: str, values: Callable[[str], Iterable[Any]]) -> None:
        self.name, self.values = name, values

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        try:
            return [v for part in value.split(",") if part.strip() for v in self.values(part.strip())]
        except ValueError as error:
            self.fail(str(error), param, ctx)


def listed(name: str, kind: ListOf, **settings: Any) -> Any:
    """An option that takes lists and may be repeated; it gives each value once, in order."""

    def merged(ctx: Any, param: Any, given: tuple[list[Any], ...]) -> list[Any]:
        return list(dict.fromkeys(v for values in given for v in values))

    return click.option(name, type=kind, multiple=True, callback=merged, **settings)


def unknown(kind: str, text: str, names: Iterable[str]) -> ValueError:
    names = list(names)
    near = difflib.get_close_matches(text, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return ValueError(f"unknown {kind} {text!r}; {hint}")


def names_of(kind: str, names: Iterable[str]) -> ListOf:
    """A list of names out of some."""
    names = list(names)

    def values(text: str) -> list[str]:
        if text not in names:
            raise unknown(kind, text, names)
        return [text]

    return ListOf(kind, values)


def losses(text: str) -> list[str]:
    """A loss by its function's or its class's name, a family of them, or all."""
    by_class = {f.Class.__name__: n for n, f in nl.registry.items()}
    if text == "all":
        return list(nl.registry)
    if text in FAMILIES:
        return [n for n, f in nl.registry.items() if family_of(f).name == text]
    if text not in (*nl.registry, *by_class):
        raise unknown("loss", text, [*nl.registry, *by_class, *FAMILIES, "all"])
    return [by_class.get(text, text)]


def dtypes(text: str) -> list[str]:
    if text not in (*DTYPES, "all"):
        raise unknown("dtype", text, (*DTYPES, "all"))
    names = DTYPES if text == "all" else (text,)
    try:
        for name in names:
            dtype_of(name)
    except ImportError:
        raise ValueError('bfloat16 needs ml_dtypes: pip install "numbaloss[bfloat16]"') from None
    return list(names)


def whole(text: str) -> int:
    """A number of at least one: 1000, 1e3 or 1k."""
    factor = {"k": 10**3, "m": 10**6, "g": 10**9}.get(text[-1:].lower(), 1)
    try:
        number = float(text if factor == 1 else text[:-1]) * factor
    except ValueError:
        number = 0.0
    if not (number >= 1 and number.is_integer()):
        raise ValueError(f"{text!r} is no whole number from 1 on, such as 1000, 1e3 or 1k")
    return int(number)


def shapes(text: str) -> list[Shape]:
    return [tuple(whole(part) for part in text.lower().split("x"))]


def sizes(text: str) -> list[int]:
    """A size, or a sweep `first:last` in steps of ten."""
    first, _, last = text.partition(":")
    found = [whole(first)]
    while last and found[-1] * 10 <= whole(last):
        found.append(found[-1] * 10)
    return found


def writable(ctx: click.Context, param: click.Parameter, given: Any) -> Any:
    """Refuse files that cannot be written before anything is measured for them."""
    for path in given if isinstance(given, tuple) else (given,):
        if path is None:
            continue
        place = path if path.exists() else path.parent
        if path.is_dir() or not path.parent.is_dir() or not os.access(place, os.W_OK):
            raise click.BadParameter(f"cannot write {path}", ctx, param)
    return given

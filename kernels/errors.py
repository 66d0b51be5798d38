"""Errors of Numba in a definition of the user's, as ones that lead to its line."""

import linecache
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# How lines of Numba's own begin.
OURS = ("During", "Failed in", "Overload", "Rejected", "File ", "- ", "->", "^", "[", "Known sig", " * ")


def at_users_line(
    name: str, functions: tuple[Callable[..., Any], ...], error: Exception, value: str = "value"
) -> TypeError:
    """Return Numba's error as one that leads to the line of a definition's function.

    `value` is the definition's name for the function that gives the loss's value.
    """
    file, line = functions[0].__code__.co_filename, functions[0].__code__.co_firstlineno
    of = [v.py_func for f in functions for v in f.__globals__.values() if hasattr(v, "py_func")]
    functions = (*of, *functions)  # an error is rather in what they call
    text = str(error)
    places = re.findall(r'File "([^"]+)", line (\d+)', text)
    for f in reversed(functions):
        for where, number in places:
            if Path(where).name == Path(f.__code__.co_filename).name:
                file, line = f.__code__.co_filename, int(number)
    stated = re.search(r"TypingError: ((?:value|terms) must .*)", text)  # by the jets
    if "<intrinsic interleave>" in text:  # a call in our own loop: the reason comes after it
        text = text.partition("raised a specific error:")[2] or text
    lines = [x.strip().removeprefix("TypingError: ") for x in re.sub(r"\x1b\[\d*m", "", text).splitlines()]
    reasons = [x for x in lines if x and not x.startswith(OURS) and "resolving callee" not in x]
    reason = stated[1] if stated else reasons[0] if reasons else text
    if stated and reason.startswith("value "):
        reason = reason.replace("value", value, 1)
    source = linecache.getline(file, line).strip()
    return TypeError(
        f"{name}: cannot be compiled and differentiated as it stands\n"
        f'  File "{file}", line {line}\n    {source}\n'
        f"{reason}\n"
        "A definition may use arithmetic, if, abs, min, max and the functions of numbaloss.math."
    )

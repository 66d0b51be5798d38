"""Straight-line code: rules that plain Python states, and the templates' branches that constants rule out."""

import ast
import importlib
import math as libm

import numpy as np
import pytest
from numba import njit, types

from numbaloss.kernels import branches, jets
from numbaloss.kernels.cpu import ctc, elementwise, margins, score_blocks
from numbaloss.kernels.cpu.target import derivatives
from numbaloss.kernels.straight import Functions, Number

F = Functions


def compiled(rule):
    """A rule of three numbers, inside compiled code."""
    ruled = derivatives().straight(rule)
    return njit(lambda x, y, z: ruled(x, y, z))


RULES = {
    "arithmetic": lambda x, y, z: (x + 2) * y - 1 / z + (3 - x) / 2 - (-y),
    "absolute": lambda x, y, z: abs(x - y) * abs(z),
    "compare": lambda x, y, z: where((x < y) & (y <= z) | (x == z), x, where((x > y) | (y >= z), y, z)),
    "unequal": lambda x, y, z: where(x != y, z, -z),
    "literal": lambda x, y, z: where(x > 0, 1, 0.5) + x,
}


def where(condition, a, b):
    if isinstance(condition, Number):
        return (
            F.where(condition, a, b)
            if isinstance(a, Number) or isinstance(b, Number)
            else (F.where(condition, condition.code.constant(types.float64, a), b))
        )
    return a if condition else b


@pytest.mark.parametrize("name", RULES)
def test_rules_are_what_python_says(name):
    rule = RULES[name]
    function = compiled(rule)
    for x, y, z in ((1.5, -2.0, 3.0), (-0.25, 0.5, 0.75), (2.0, 2.0, 2.0), (3.0, -1.0, 3.0)):
        assert function(x, y, z) == rule(x, y, z)


def test_not_a_number_is_unequal_to_all():
    function = compiled(RULES["unequal"])
    assert function(libm.nan, libm.nan, 2.0) == 2.0
    assert function(1.0, 1.0, 2.0) == -2.0


def test_numbers_keep_their_width():
    function = compiled(RULES["arithmetic"])
    assert function.py_func.__code__.co_argcount == 3
    function(*np.ones(3, np.float32))
    assert function.nopython_signatures[0].return_type == types.float32


def test_straight_code_has_no_branches():
    with pytest.raises(TypeError, match="no branches"):
        compiled(lambda x, y, z: x if x > y else z)(1.0, 2.0, 3.0)


def test_rules_of_derivatives_run_on_floats():
    """They are plain Python: with floats as parts they are the derivatives themselves."""
    x, y, one = jets.Dual(0.75, 1.0, 0.0), jets.Dual(2.0), jets.Dual(1.0)
    product, quotient = x * x * y, jets._divide(one, x)
    assert (product.v, product.d, product.h) == (1.125, 3.0, 4.0)
    assert (quotient.v, quotient.d, quotient.h) == pytest.approx((4 / 3, -16 / 9, 128 / 27))


# ---- branches ----------------------------------------------------------------------------------------------

YES, NO, OTHER, SIZE = True, False, None, 3


def template(x):
    total = 0
    if YES and not NO:
        total += 1
    elif x > 5:
        total += 1000
    else:
        total += 2000
    if NO or (x > 1 and YES):
        total += 10
    if NO and x > 1:
        total += 100
    else:
        pass
    for k in range(SIZE):
        if NO:
            total += k
    total += 7 if NO else (8 if x and YES else 9)
    if OTHER:
        total = -total
    while NO:
        total += 1
    return total


def names_in(code):
    return {name for name in ("YES", "NO", "OTHER", "SIZE") if name in code.co_names}


@pytest.mark.parametrize("no", [False, True])
@pytest.mark.parametrize("yes", [False, True])
def test_branches_that_constants_rule_out_are_gone(yes, no):
    scope = {"YES": yes, "NO": no, "SIZE": 3}
    code = branches.chosen(template, scope)
    assert names_in(code) <= {"NO", "OTHER", "SIZE"}  # `while` stays
    assert code.co_name == "template"
    assert code.co_firstlineno == template.__code__.co_firstlineno
    given = {**template.__globals__, **scope}
    if no:
        given["range"] = range
        return  # the loop that stays has no end
    short, whole = (type(template)(c, given) for c in (code, template.__code__))
    for x in (0, 1, 2, 9):
        assert short(x) == whole(x)


def test_code_whose_source_is_not_clear_stays():
    def inner():
        return YES if YES else x

    x = 3
    assert branches.chosen(inner, {"YES": True}) is inner.__code__
    made = {}
    exec(compile("def made(x):\n    return 1 if YES else x\n", "no such file", "exec"), made)
    assert branches.chosen(made["made"], {"YES": True}) is made["made"].__code__
    assert branches.chosen(template, {}) is template.__code__
    assert branches.chosen(template, {"SIZE": 5}) is template.__code__


def test_a_file_that_is_edited_later_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "edited.py").write_text("YES = True\n\n\ndef made(x):\n    return 1 if YES else x\n")
    monkeypatch.syspath_prepend(tmp_path)
    made = importlib.import_module("edited").made
    scope = {"YES": True}
    assert "YES" not in branches.chosen(made, scope).co_names
    branches.source.cache_clear()
    (tmp_path / "edited.py").write_text("YES = True\n\n\ndef made(x):\n    return 2 if YES else x\n")
    assert branches.chosen(made, scope) is made.__code__
    branches.source.cache_clear()
    (tmp_path / "edited.py").write_text("YES = True\n\n\ndef other(x):\n    return x\n")
    assert branches.chosen(made, scope) is made.__code__
    branches.source.cache_clear()


@pytest.mark.parametrize(
    "function",
    [
        score_blocks.columns_of_labels,
        score_blocks.rows_of_labels,
        elementwise.loop,
        margins.one_label,
        ctc.read,
    ],
    ids=lambda f: f.__name__,
)
def test_templates_are_read_in_part(function):
    """Their source is found, and is theirs."""
    flags = {n: False for n, value in function.__globals__.items() if type(value) is bool}
    code = branches.chosen(function, flags)
    assert len(code.co_code) < len(function.__code__.co_code)


def test_conditions():
    chosen = branches.Chosen({"A": True, "B": False})
    for text, value in {
        "A": True, "not A": False, "A and B": False, "A or x": True, "B and x": False, "B or A": True,
        "B or x": "x", "A and x": "x", "A and x and y": "x and y", "x": "x", "not x": "not x",
        "not (A and B)": True, "(A or x) and y": "y", "not (A and x)": "not x",
        "not (x or B or y)": "not (x or y)",
    }.items():  # fmt: skip
        made = chosen.settle(ast.parse(text, mode="eval").body)
        assert (made if isinstance(made, bool) else ast.unparse(made)) == value, text

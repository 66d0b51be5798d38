"""What is written for people and editors is true: docstring examples, README code, type stubs."""

import doctest
import importlib.util
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

import numbaloss as nl
from numbaloss import arguments, stubs
from numbaloss import reference as oracle
from numbaloss.losses import multiclass, regression

ROOT = Path(__file__).parent.parent
MODULES = [
    "numbaloss",
    "numbaloss.distributed",
    "numbaloss.distributed.in_process",
    "numbaloss.distributed.partial",
    "numbaloss.losses.custom",
    "numbaloss.optimize",
    "numbaloss.sums",
    *sorted({f.__module__ for f in nl.registry.values()}),
]


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="scalars print differently")
@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name), extraglobs={"__name__": "example"})
    assert not result.failed


@pytest.mark.parametrize("function", nl.registry.values(), ids=lambda f: f.__name__)
def test_every_loss_is_documented(function):
    text = function.Class.__doc__
    for section in ("Parameters\n", "References\n", "Examples\n", ".. math::"):
        assert section in text, section
    for argument in (*function.Class._required, *function.Class.fields):
        assert re.search(rf"\b{argument}\b", text), argument


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    scope: dict = {"__name__": "readme"}
    hosts = "cupy", "torch", "xgboost", "scipy", "jax"
    for block in blocks:
        wanted = [h for h in hosts if re.search(rf"^(?:import|from) {h}", block, re.MULTILINE)]
        if "cupy" not in wanted and all(importlib.util.find_spec(h) for h in wanted):
            exec(compile(block, "README.md", "exec"), scope)


def test_stubs_are_fresh():
    assert stubs.PATH.read_text() == stubs.render(), "run python -m numbaloss.stubs"


def added_as_the_contributing_page_says(module, number):
    """The names that the page's `number`-th loss defines, and its reference's."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[2 * number : 2 * number + 2]
    definition, reference = map(textwrap.dedent, blocks)
    scope = {**vars(arguments), **vars(module), "__name__": "contributing"}
    exec(definition, scope)
    naive = dict(vars(oracle))
    exec(reference, naive)
    return scope, naive


def test_adding_a_loss_as_the_contributing_page_says():
    scope, naive = added_as_the_contributing_page_says(regression, 0)
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(2, 50))
    for kwargs in ({}, {"scale": 0.5}, {"reduction": "sum"}):
        np.testing.assert_allclose(
            scope["log_cosh_loss"](x, t, **kwargs), naive["log_cosh_loss"](x, t, **kwargs), rtol=1e-12
        )
    with pytest.raises(ValueError, match="scale must be > 0"):
        scope["LogCoshLoss"](scale=-1.0)


def test_adding_a_loss_of_rows_as_the_contributing_page_says():
    scope, naive = added_as_the_contributing_page_says(multiclass, 1)
    loss, wanted = scope["bounded_cross_entropy"], naive["bounded_cross_entropy"]
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 7)), rng.integers(0, 7, 20)
    for kwargs in ({}, {"bound": 0.5}, {"reduction": "sum", "weight": rng.random(7)}):
        np.testing.assert_allclose(loss(x, y, **kwargs), wanted(x, y, **kwargs), rtol=1e-12)
        by = oracle.gradient(wanted, {"input": x, "target": y, **kwargs}, "input")
        np.testing.assert_allclose(loss.grad(x, y, **kwargs), by, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="bound must be > 0"):
        scope["BoundedCrossEntropyLoss"](bound=-1.0)

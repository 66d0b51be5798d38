"""What is written for people and editors is true: docstring examples, pages' code, links, type stubs."""

import doctest
import importlib.util
import inspect
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

import numbaloss as nl
from numbaloss import arguments, stubs
from numbaloss import reference as oracle
from numbaloss.bench import readme
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
@pytest.mark.thin(18)
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


PUBLIC = (
    *(
        "elementwise_loss",
        "score_loss",
        "vector_loss",
        "ElementwiseLoss",
        "ScoreLoss",
        "VectorLoss",
        "SumLoss",
    ),
    *("derive", "free_memory", "synchronize", "testing.check_loss", "LinearCrossEntropyOptions"),
    *("Loss.value_and_grad", "Loss.grad", "Loss.value_grad_hess", "Loss.count"),
    *("boosting.xgboost", "boosting.lightgbm", "boosting.catboost", "boosting.hist_gradient"),
    *("optimize.objective", "optimize.rho", "optimize.norm", "distributed.Communicator", "distributed.Ray"),
    *("distributed.threads", "distributed.partial", "distributed.dask.objective"),
)
# Not asked for: more than a line where a line says it, examples and references of each. A class of losses
# documents what its function takes, which is compared below.
LEFT = {"ES01", "EX01", "SA01"}
OF_FUNCTION = {"PR01", "PR02"}


@pytest.mark.parametrize("name", [*PUBLIC, *sorted(loss.Class.__name__ for loss in nl.registry.values())])
def test_docstrings_follow_numpydoc(name):
    validate = pytest.importorskip("numpydoc.validate", reason="numpydoc is in the extra docs").validate
    found = dict(validate(f"numbaloss.{name}")["errors"])
    left = LEFT | (OF_FUNCTION if name[0].isupper() or name.endswith("Communicator") else set())
    assert not set(found) - left, found


@pytest.mark.parametrize("loss", nl.registry.values(), ids=lambda f: f.__name__)
def test_parameters_are_documented(loss):
    docscrape = pytest.importorskip("numpydoc.docscrape", reason="numpydoc is in the extra docs")
    text = docscrape.NumpyDocString(inspect.getdoc(loss.Class))
    named = [name.strip() for p in text["Parameters"] for name in p.name.split(",")]
    of_every_call = {"sample_weight", "normalizer", "comm", "classes"}
    assert set(named) == set(inspect.signature(loss).parameters) - of_every_call


def test_the_gallery_has_all_examples():
    text = (ROOT / "docs" / "gallery.md").read_text()
    assert set(re.findall(r"{example} (\w+)", text)) == {p.stem for p in (ROOT / "examples").glob("*.py")}


PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# Without these a block is left out; of CuPy there is no device to run it.
OPTIONAL = "cupy", "torch", "xgboost", "lightgbm", "scipy", "jax"


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.thin(15)
def test_code_of_pages_runs(page, tmp_path, monkeypatch):
    """Each block of Python, one after another, as a reader copies them."""
    monkeypatch.chdir(tmp_path)
    scope: dict = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        wanted = [h for h in OPTIONAL if re.search(rf"^(?:import|from) {h}", block, re.MULTILINE)]
        if "cupy" not in wanted and all(importlib.util.find_spec(h) for h in wanted):
            exec(compile(block, page, "exec"), scope)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "bench/README.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\"#]+)", (ROOT / page).read_text()):
        assert target.startswith("http") or (ROOT / page).parent.joinpath(target).exists(), target


def test_every_loss_is_on_the_page_of_problems_and_in_the_readme():
    for page in ("README.md", "docs/choose.md"):
        text = (ROOT / page).read_text()
        for name in nl.registry:
            assert re.search(rf"\b{name}\b", text), (page, name)


@pytest.mark.parametrize("name", readme.BLOCKS)
def test_the_readme_s_speed_is_of_the_reports(name):
    found = readme.between(name).search((ROOT / "README.md").read_text())
    assert found and found[0] == readme.BLOCKS[name](), "run python -m numbaloss.bench.readme"


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

"""A page for each loss, written from its definition when the site is built: nothing stands in two places.

Each has the docstring's formula, parameters and notes, pictures that the loss draws, how it differs by what
it is (arguments, domains, derivatives), its definition, and its lines of the reports in `bench/results`.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import drawings
import scenes
from docutils import nodes
from numpydoc.docscrape_sphinx import SphinxDocString
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from numbaloss import stubs
from numbaloss.bench.report import read_tables
from numbaloss.families.elementwise import ElementwiseLoss
from numbaloss.families.scores import ScoreLoss

DOCS = Path(__file__).parents[1]
RESULTS = DOCS.parent / "bench" / "results"
FOLDER = DOCS / "losses"

# The modules of losses, as people look for them.
GROUPS = {
    "regression": "Regression",
    "robust": "Robust regression",
    "quantiles": "Quantiles and expectiles",
    "amounts": "Counts and amounts",
    "binary": "Two classes, and probabilities",
    "multiclass": "One class of several",
    "linear": "Many classes, with their linear layer",
    "margins": "Margins and boosting",
    "multilabel": "Several labels a row",
    "embedding": "Vectors and embeddings",
    "sequence": "Sequences",
}


def group_of(loss: Any) -> str:
    """The key in `GROUPS` of a loss."""
    return loss.Class.__module__.rsplit(".", 1)[-1]


def summary(loss: Any) -> str:
    """The first sentence of the docstring."""
    return (inspect.getdoc(loss.Class) or "").split("\n\n")[0].replace("\n", " ")


def signature(parameters: Any) -> str:
    """Names and defaults, without annotations."""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters.parameters.values()]
    return str(inspect.Signature(bare))


def indented(text: str) -> str:
    """A text as the content of a directive."""
    return textwrap.indent(text.strip("\n"), "   ")


def image(stem: str, text: str) -> Iterator[str]:
    """A picture in both themes."""
    for theme in ("light", "dark"):
        yield f".. image:: /pictures/{stem}-{theme}.svg"
        yield f"   :alt: {text}"
        yield f"   :class: only-{theme}"
        yield ""


def facts(loss: Any) -> Iterator[tuple[str, str]]:
    """What a loss can do, as its class says."""
    cls = loss.Class
    by = cls._default_wrt()
    by = (by,) if isinstance(by, str) else by
    yield "Differentiated by default", ", ".join(f"``{n}``" for n in by)
    for name, operand in cls.operands.items():
        if operand.domain:
            yield f"Domain of ``{name}``", f"{operand.low:g} to {operand.high:g}; anything else is an error"
    for name, option in cls.fields.items():
        domain = str(option.domain) if option.domain and not isinstance(option.domain, tuple) else ""
        if domain and domain != "a number":
            yield f"Domain of ``{name}``", domain
    if hasattr(cls, "residual"):
        yield "Of the residual alone", "yes" if cls.residual else "no"
    yield "In compiled code", "``jit``" + (" and ``scalar``" if issubclass(cls, ElementwiseLoss) else "")
    boosters = issubclass(cls, ElementwiseLoss | ScoreLoss)
    yield "Objective of boosters", ":doc:`yes </hosts>`" if boosters else "no"
    yield "Classes shared out over ranks", "yes" if "classes" in inspect.signature(loss).parameters else "no"


def definition(loss: Any) -> str:
    """The source of what a loss is defined by."""
    cls = loss.Class
    found = []
    for name in ("distance", "terms", "value", "finish"):
        stated = cls.__dict__.get(name)
        if inspect.isfunction(stated):
            found.append(textwrap.dedent(inspect.getsource(stated)))
    return "\n".join(found)


def table(rows: list[dict[str, str]], keep: tuple[str, ...]) -> Iterator[str]:
    """Some columns of a report's rows, without the marks that are wanted; nothing if it has few of them."""
    columns = [c for c in rows[0] if c.startswith(keep)]
    if len(columns) < 3:
        return
    yield from (".. list-table::", "   :header-rows: 1", "")
    for cells in [columns, *([row[c] for c in columns] for row in rows)]:
        bare = [re.sub(r" \(.*?\)$", "", cell).replace("*", r"\*") or " " for cell in cells]
        yield f"   * - {bare[0]}"
        yield from (f"     - {cell}" for cell in bare[1:])
    yield ""


REPORTS = {
    "roofline.md": ("Speed on one thread, in cache", ("shape", "dtype", "ns", "torch, one"), "/speed"),
    "accuracy.md": ("Accuracy", ("dtype", "by", "results", "conditioned", "lost"), "/accuracy"),
}


def page(loss: Any) -> str:
    """The text of a loss's page."""
    name, cls = loss.__name__, loss.Class
    scene = scenes.scene(loss)
    changed = max(Path(inspect.getfile(m)).stat().st_mtime for m in (cls, scenes, drawings))
    pictures = drawings.pictures(name, scene, DOCS / "pictures", changed)
    documented = str(SphinxDocString(inspect.getdoc(cls), config={"show_class_members": False}))
    lines = [name, "=" * len(name), "", summary(loss), "", ".. container:: pictures", ""]
    for stem, text in pictures:
        lines += [indented("\n".join(image(stem, text))), ""]
    said = scene.said if isinstance(scene, scenes.Maps) else scene.fixed
    lines += [f"Drawn by the loss itself{': ' + said if said else ''}.", ""]
    lines += [f".. py:function:: numbaloss.{name}{signature(inspect.signature(loss))}", ""]
    lines += [indented(documented), ""]
    lines += [f".. py:class:: numbaloss.{cls.__name__}{signature(stubs.constructor(cls))}", ""]
    lines += ["   The same as an object that holds its options; see :doc:`/calls`.", ""]
    lines += ["At a glance", "-----------", "", ".. list-table::", ""]
    for what, answer in facts(loss):
        lines += [f"   * - {what}", f"     - {answer}"]
    lines += [""]
    if source := definition(loss):
        lines += ["Definition", "----------", "", "Kernels and derivatives are made from this:", ""]
        lines += [".. code-block:: python", "", indented(source), ""]
    for report, (title, keep, more) in REPORTS.items():
        tables = []
        for heading, rows in read_tables((RESULTS / report).read_text()):
            own = [row for row in rows if row.get("loss") == name]
            if made := list(table(own, keep)) if own else []:
                tables += [f"{heading}:", "", *made]
        if tables:
            lines += [title, "-" * len(title), "", *tables, f"How this is measured: :doc:`{more}`.", ""]
    return "\n".join(lines)


def index(losses: dict[str, Any]) -> str:
    """The page of all losses: a card each, in groups."""
    lines = ["Losses", "======", ""]
    lines += ["Each name leads to its formula, options, pictures and figures.", ""]
    lines += [".. toctree::", "   :hidden:", "", *(f"   {name}" for name in losses), ""]
    for group, title in GROUPS.items():
        lines += [title, "-" * len(title), ""]
        for name, loss in losses.items():
            if group_of(loss) == group:
                lines += [".. container:: loss-card", ""]
                lines += [indented("\n".join(image(f"{name}-small", ""))), ""]
                lines += [f"   :doc:`{name} <{name}>`", "", f"   {summary(loss)}", ""]
    return "\n".join(lines)


class Comparison(SphinxDirective):
    """Losses beside each other: value and slope by the input, the target 0."""

    required_arguments = 1
    optional_arguments = 9
    final_argument_whitespace = False

    def run(self) -> list[nodes.Node]:
        names, losses = self.arguments, scenes.every()
        found: list[Any] = [scenes.scene(losses[n]) for n in names]
        lines = [replace(scene.lines[0], label=n) for n, scene in zip(names, found, strict=True)]
        together = replace(found[0], lines=lines)
        stem = "-".join(names)
        shown = nodes.container(classes=["pictures"])
        for kind in ("value", "slope"):
            text = drawings.said_of_curve("losses", together, kind)
            for theme in ("light", "dark"):
                path = f"pictures/{stem}-{kind}-{theme}.svg"
                drawings.curve(together, kind, DOCS / path, theme)
                shown += nodes.image(uri=f"/{path}", alt=text, classes=[f"only-{theme}"])
        return [shown]


class Results(SphinxDirective):
    """A report of `bench/results`, below the heading at which it stands."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = RESULTS / self.arguments[0]
        self.env.note_dependency(str(path))
        text = re.sub(r"^# .*\n", "", path.read_text())
        text = re.sub(r"^(#+) (.*)$", r"**\2**", text, flags=re.MULTILINE)
        text = re.sub(r"\[([^\]]*)\]\((?!http)[^)]*\)", r"\1", text)  # links to files of the repository
        return self.parse_text_to_nodes(text)


def write(app: Sphinx) -> None:
    """Write all pages; those that are as before keep their time, so Sphinx leaves them alone."""
    losses = scenes.every()
    unknown = {group_of(loss) for loss in losses.values()} - set(GROUPS)
    if unknown:
        raise ValueError(f"losses of {', '.join(unknown)} belong in no group of GROUPS")
    FOLDER.mkdir(exist_ok=True)
    texts = {name: page(loss) for name, loss in losses.items()} | {"index": index(losses)}
    for old in FOLDER.glob("*.rst"):
        if old.stem not in texts:
            old.unlink()
    for name, text in texts.items():
        path = FOLDER / f"{name}.rst"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write)
    app.add_directive("comparison", Comparison)
    app.add_directive("results", Results)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Formulas as MathML: browsers draw it and screen readers read it, with no script and no network."""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def inline(self: Any, node: nodes.math) -> None:
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block(self: Any, node: nodes.math_block) -> None:
    formula = convert(" ".join(node.astext().split()), display="block")
    # It may be wider than a phone: a region that scrolls can be reached by the keyboard.
    self.body.append(f'<div class="formula" tabindex="0" role="region" aria-label="formula">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Templates without the branches that their bound constants rule out.

Numba prunes such branches too, after it has read all that they hold, up to half of a template.
"""

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any


@cache
def source(path: str) -> list[str]:
    """Return a file's lines; none, without the file."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


class Chosen(ast.NodeTransformer):
    """Leave out branches whose conditions are known, by the names of what is true and what is false."""

    def __init__(self, known: Mapping[str, bool]) -> None:
        self.known = known

    def settle(self, test: ast.expr) -> ast.expr | bool:
        """Return a condition's value, or what is left to ask; none has an effect."""
        if isinstance(test, ast.Name):
            return self.known.get(test.id, test)
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            value = self.settle(test.operand)
            if isinstance(value, bool):
                return not value
            test.operand = value
            return test
        if isinstance(test, ast.BoolOp):
            decides = isinstance(test.op, ast.Or)  # alone; the other value alone does not
            values = [self.settle(value) for value in test.values]
            if decides in values:
                return decides
            test.values = [value for value in values if not isinstance(value, bool)]
            return test if test.values[1:] else test.values[0] if test.values else not decides
        return test

    def visit_If(self, node: ast.If | ast.IfExp) -> Any:
        test = self.settle(node.test)
        if not isinstance(test, bool):
            node.test = test
            return self.generic_visit(node)
        part = node.body if test else node.orelse
        if isinstance(part, ast.expr):
            return self.visit(part)
        return self.generic_visit(ast.Module(part, [])).body

    visit_IfExp = visit_If

    def generic_visit(self, node: ast.AST) -> Any:
        super().generic_visit(node)
        if isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.FunctionDef) and not node.body:
            node.body = [ast.Pass()]
        return node


def chosen(template: FunctionType, scope: Mapping[str, Any]) -> CodeType:
    """Return a template's code without the branches that bound constants rule out.

    A function within another is left as it is, and so is one whose source is not there, is another by now, or
    goes on after its last instruction.
    """
    code = template.__code__
    known = {n: scope[n] for n in code.co_names if type(scope.get(n)) is bool and n not in code.co_varnames}
    if not known or code.co_freevars:
        return code
    first, last = code.co_firstlineno, max((end for _, end, _, _ in code.co_positions() if end), default=0)
    lines = source(code.co_filename)[first - 1 : last]
    if not lines or not lines[0].startswith("def "):
        return code
    # Python compiles a call of an imported module's function in a way of its own.
    modules = [n for n in code.co_names if isinstance(template.__globals__.get(n), ModuleType)]
    head = "import " + ", ".join(modules) if modules else ""
    try:
        tree = ast.parse(head + "\n" * (first - 1) + "\n".join(lines))
    except SyntaxError:
        return code
    if function_of(tree, code) != code:
        return code
    return function_of(ast.fix_missing_locations(Chosen(known).visit(tree)), code) or code


def function_of(tree: ast.Module, code: CodeType) -> CodeType | None:
    """Compile a tree, and return the function of the same name as another, if there is one."""
    made = compile(tree, code.co_filename, "exec", dont_inherit=True)
    found = (c for c in made.co_consts if isinstance(c, CodeType) and c.co_name == code.co_name)
    return next(found, None)

"""Who may import whom. Every import is read, also one within a function."""

import ast
import re
from pathlib import Path

import pytest

from numbaloss.loss import registry

ROOT = Path(__file__).parent.parent
# What `numbaloss` may know of `kernels`; `inside` alone gives the functions for compiled code.
KNOWN = {"spec", "lift", "freeze", "devices", "layout", "chunks", "powers", "math", "inside"}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for top in ("numbaloss", "kernels")
    for path in (ROOT / top).rglob("*.py")
    if not path.is_relative_to(ROOT / "numbaloss" / "kernels")
    and not path.is_relative_to(ROOT / "numbaloss" / "bench")
}


def imported(module):
    """The modules of ours that a module imports, as they lie in the checkout."""
    path = FILES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # The folder `kernels` is in the package, by a link.
            whole = ["numbaloss", *package] if package[0] == "kernels" else package
            base = whole[: len(whole) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{name}.{alias.name}" for alias in node.names)
            found.add(name)
    ours = {name.removeprefix("numbaloss.") if ".kernels" in name else name for name in found}
    return {name for name in ours if name in FILES} - {module, "numbaloss"}


IMPORTS = {module: imported(module) for module in FILES}


def allowed(module, other):
    """Whether a module may import another."""
    here, there = module.split("."), other.split(".")
    if here[0] == "kernels":
        devices = {"cpu", "cuda"} & {*here[1:2], *there[1:2]}
        return there[0] == "kernels" and len(devices) < 2 and (here[1:2] != ["spec"] or not devices)
    if there[0] == "kernels":
        return len(there) == 1 or there[1] in KNOWN
    if here[1:2] == ["families"] and len(there) > 1:
        return there[1] not in ("families", "losses")
    if here[1:2] == ["losses"] and len(here) > 2:
        return there[1:2] != ["losses"]
    if len(here) > 1 and here[1] in ("loss", "arguments", "arrays", "call"):
        return there[1:2] not in (["families"], ["losses"])
    return True


@pytest.mark.parametrize("module", FILES)
def test_imports_point_downward(module):
    wrong = sorted(other for other in IMPORTS[module] if not allowed(module, other))
    assert not wrong, f"{module} imports {', '.join(wrong)}"


def test_kernels_of_shared_code_import_no_device():
    shared = "spec layout chunks counts class_weights math straight jets bind devices inside"
    for module in shared.split():
        assert not [n for n in IMPORTS[f"kernels.{module}"] if n.startswith(("kernels.cpu", "kernels.cuda"))]


def test_kernels_name_no_loss():
    # `cross_entropy` is a statistic of a row, too.
    names = [name for name in registry if name != "cross_entropy"]
    for module, path in FILES.items():
        if module.startswith("kernels"):
            said = [f"{name} in {module}" for name in names if re.search(rf"\b{name}\b", path.read_text())]
            assert not said


def test_there_are_no_circles():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(IMPORTS[module]):
                visit(other)
            path.pop()
            done.add(module)

    for module in FILES:
        visit(module)


def test_the_test_sees_imports():
    assert {"numbaloss.call", "kernels.spec", "kernels.inside"} <= IMPORTS["numbaloss.families.elementwise"]
    assert {"kernels.spec", "kernels.cuda.rows", "kernels.class_weights"} <= IMPORTS["kernels.cuda.softmax"]
    assert "kernels.cpu.memory" in IMPORTS["kernels.cpu.backend"]
    assert not allowed("kernels.cuda.softmax", "kernels.cpu.softmax")
    assert not allowed("numbaloss.call", "kernels.cpu.backend")

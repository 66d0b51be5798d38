"""The gallery's programs: each is run when the site is built, and shown with its picture and last lines.

    ```{example} huber_regression
    :alt: "Points with outliers; the line of Huber's loss follows the others."
    ```

A program that fails stops the build; one whose library is not installed says so, and has no picture.
`:ranks: 4` starts four of it by mpiexec.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).parents[1]
EXAMPLES = DOCS.parent / "examples"
LINES = 8  # of output


def run(name: str, picture: Path, ranks: int) -> str:
    """Run a program, which draws its picture; return what it prints.

    Both are kept until the program changes. Where a library is not installed it says so, and draws nothing.
    """
    program, kept = EXAMPLES / f"{name}.py", picture.with_suffix(".txt")
    if kept.exists() and kept.stat().st_mtime > program.stat().st_mtime:
        return kept.read_text()
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.unlink(missing_ok=True)
    command = ["mpiexec", "-n", str(ranks)] if ranks else []
    command += [sys.executable, str(program), str(picture)]
    done = subprocess.run(
        command,
        env=os.environ | {"MPLBACKEND": "agg", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{program.name} failed:\n{done.stdout}\n{done.stderr}")
    if picture.exists():
        kept.write_text(done.stdout)
    return done.stdout


class Example(SphinxDirective):
    """A program of `examples/`: its first lines, picture, output and source."""

    required_arguments = 1
    option_spec = {"alt": directives.unchanged_required, "ranks": directives.nonnegative_int}

    def run(self) -> list[nodes.Node]:
        (name,) = self.arguments
        source = (EXAMPLES / f"{name}.py").read_text()
        self.env.note_dependency(str(EXAMPLES / f"{name}.py"))
        path = DOCS / "pictures" / "programs" / f"{name}.svg"
        printed = run(name, path, self.options.get("ranks", 0)).rstrip().splitlines()
        said = source.split('"""')[1].strip().partition("\n\n    python")[0]
        shown = self.parse_text_to_nodes(said.replace("``", "`"))
        if path.exists():
            uri = f"/{path.relative_to(DOCS)}"
            shown.append(nodes.image(uri=uri, alt=self.options["alt"], classes=["program"]))
        last = [line for line in printed if not line.startswith("picture: ")][-LINES:]
        shown.append(nodes.literal_block(text="\n".join(last), language="text"))
        folded = nodes.raw("", f"<details><summary>examples/{name}.py</summary>", format="html")
        whole = nodes.literal_block(text=source, language="python")
        return [*shown, folded, whole, nodes.raw("", "</details>", format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("example", Example)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

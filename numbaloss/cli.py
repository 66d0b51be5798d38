"""The command line: ``numbaloss list | info | bench | check | warmup``.

This is its entry point, which says what to install where the libraries that it is built on are missing; the
commands themselves are in :mod:`numbaloss.bench.commands`.
"""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 if all is well, 2 for an option that is not.

    What else a command returns is said by its ``--help``.
    """
    try:
        from .bench.commands import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("click", "rich"):
            raise
        print(f'numbaloss: the command line needs {missing}: pip install "numbaloss[bench]"', file=sys.stderr)
        return 1
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())

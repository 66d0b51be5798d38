"""``python -m numbaloss``, which is the same as ``numbaloss``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

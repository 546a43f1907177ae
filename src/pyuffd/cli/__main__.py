"""`python -m pyuffd.cli`: the command line."""

from __future__ import annotations

import sys

from pyuffd.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m kvist` is the `kvist` command."""

from __future__ import annotations

import sys

from kvist.cli import main

if __name__ == "__main__":
    sys.exit(main())

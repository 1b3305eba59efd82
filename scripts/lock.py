"""Writes constraints-hashes.txt: every package of constraints.txt, with the hash of the file for this platform.

    python scripts/lock.py

Gets the hashes from the package index. Run it after constraints.txt has changed, with the Python of the tests.
"""

from __future__ import annotations

import sys

from packages import CONSTRAINTS, HASHES, hashed_lines, pins

_HEAD = """\
# The files that the tests ran with, on Linux x86-64 with CPython {python}; written by scripts/lock.py.
#
#     pip install torch==VERSION            # of constraints.txt, for your device
#     pip install --no-deps --require-hashes -r constraints-hashes.txt
#
# torch is not here: each device has a build of its own, from an index of its own.
"""


def main() -> int:
    wanted = {name: str(version) for name, version in pins(CONSTRAINTS).items() if name != "torch"}
    lines = hashed_lines((f"{name}=={version}" for name, version in wanted.items()), "--no-deps")
    head = _HEAD.format(python=f"{sys.version_info.major}.{sys.version_info.minor}")
    HASHES.write_text(head + "".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes constraints-hashes.txt: every package of constraints.txt, with the hash of the file for this platform.

    python scripts/lock.py

Gets the hashes from the package index. Run it after constraints.txt has changed, with the Python of the tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packages import CONSTRAINTS, HASHES, pins

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
    with tempfile.TemporaryDirectory() as folder:
        requirements, report_path = Path(folder, "wanted.txt"), Path(folder, "report.json")
        requirements.write_text("".join(f"{name}=={version}\n" for name, version in wanted.items()), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
        subprocess.run([*pip, "--report", report_path, "-r", requirements], check=True)
        report = json.loads(report_path.read_text(encoding="utf-8"))
    lines = []
    for one in report["install"]:
        digest = one["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{one['metadata']['name']}=={one['metadata']['version']} --hash=sha256:{digest}\n")
    head = _HEAD.format(python=f"{sys.version_info.major}.{sys.version_info.minor}")
    HASHES.write_text(head + "".join(sorted(lines, key=str.lower)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs every test marked `gpu` with the Python that runs this script, and writes the output to out/gpu-tests.txt.

    python3 scripts/gpu_tests.py [arguments for pytest, such as -k fa3]

Needs torch, pytest and the packages that Kvist imports; installs nothing, and Kvist itself need not be installed. Only
files with that mark are collected, so packages that other tests import may be missing. The exit status is 0 only if
tests ran and none failed: without a GPU it is 1, not "all skipped".
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "out" / "gpu-tests.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    num_run: int
    num_bad: int
    num_skipped: int


def marked_files(tests: Path) -> list[Path]:
    return [path for path in sorted(tests.rglob("test_*.py")) if re.search(r"\bmark\.gpu\b", path.read_text("utf-8"))]


def missing_requirement() -> str | None:
    """Return the reason why the tests cannot run on this machine, or None."""
    missing = [name for name in ("torch", "pytest") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} lacks {' and '.join(missing)}"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device here"
    return None


def counts_of(results: Path) -> Counts:
    """Count the results in pytest's JUnit file. Raises `OSError` or `ParseError` if pytest did not write it."""
    suites = list(ElementTree.parse(results).getroot().iter("testsuite"))

    def total(name: str) -> int:
        return sum(int(suite.get(name, "0")) for suite in suites)

    skipped = total("skipped")
    return Counts(num_run=total("tests") - skipped, num_bad=total("failures") + total("errors"), num_skipped=skipped)


def verdict(status: int, results: Path) -> tuple[int, str]:
    """Return the exit status and the last line of the output."""
    try:
        counts = counts_of(results)
    except (OSError, ElementTree.ParseError):
        return status or 1, f"FAILED: pytest ended with status {status} and without results"
    result = f"{counts.num_run} GPU tests ran, {counts.num_bad} failed, {counts.num_skipped} skipped"
    if status != 0 or counts.num_bad:
        return status or 1, f"FAILED: {result}"
    if not counts.num_run:
        return 1, f"FAILED: {result}: nothing was tested"
    return 0, f"passed: {result}"


def run(command: Sequence[str], output: Path, about: str) -> int:
    """Run the command; show its output and write it to `output`. Return its exit status."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.getenv("PYTHONPATH")]))}
    with output.open("w", encoding="utf-8") as kept:
        kept.write(about)
        child = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            kept.write(line)
        return child.wait()


def describe() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"Python {sys.version.split()[0]}, torch {torch.__version__}, {', '.join(gpus)}\n"


def main(arguments: Sequence[str]) -> int:
    if problem := missing_requirement():
        print(f"the GPU tests cannot run: {problem}", file=sys.stderr)
        return 1
    OUTPUT.parent.mkdir(exist_ok=True)
    results = OUTPUT.with_suffix(".xml")
    results.unlink(missing_ok=True)  # of an earlier run
    files = [str(path.relative_to(ROOT)) for path in marked_files(ROOT / "tests")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rsfE", f"--junitxml={results}", *arguments, *files]
    about = describe()
    print(about, end="", flush=True)
    status, result = verdict(run(command, OUTPUT, about), results)
    with OUTPUT.open("a", encoding="utf-8") as kept:
        kept.write(result + "\n")
    print(f"{result}; see {OUTPUT.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

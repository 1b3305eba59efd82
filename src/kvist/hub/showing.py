"""Shows how much of a model has been downloaded, by the size of the folder that it is written to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

Show = Callable[[str], None]  # gets texts such as "downloading ORG/NAME (1.2 GB) 40%"

_INTERVAL_S = 0.5


def size_bytes(folder: Path) -> int:
    """Return the size of the files in a folder that another thread writes to; 0 without the folder."""
    total = 0
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):  # renamed in the meantime
            total += path.stat().st_size
    return total


@contextlib.contextmanager
def show_growth(folder: Path, expected_bytes: int, what: str, show: Show) -> Iterator[None]:
    """While the body runs, show how much of `expected_bytes` has come to the folder, twice a second."""
    before, ended = size_bytes(folder), threading.Event()

    def watch() -> None:
        while not ended.wait(_INTERVAL_S):
            show(f"{what} {min(99, max(0, 100 * (size_bytes(folder) - before) // expected_bytes))}%")

    watcher = threading.Thread(target=watch, name="kvist-download-progress", daemon=True)
    show(f"{what} 0%")
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    show(f"{what} 100%")

"""What a process arranges with the one that started it."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def continue_when_parent_dies() -> None:
    """From now on the parent's death continues this process if it is stopped (SIGSTOP).

    A child notices that its parent is gone by the end of its standard input. A stopped one would never look."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT))

"""Lets a stopped child process notice the death of its parent."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def continue_when_parent_dies() -> None:
    """Resume this process (SIGCONT) when its parent dies, in case it is stopped (SIGSTOP).

    A child detects the end of its parent by the end of its standard input, which a stopped child would never read."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT))

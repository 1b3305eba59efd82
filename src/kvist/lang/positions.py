"""Finds the line of a program that is being carried out."""

from __future__ import annotations

import sys
from pathlib import Path

from kvist.planning.graph import Position

_OWN_FOLDER = str(Path(__file__).parent)


def here() -> Position:
    """Return the line of the innermost caller outside of this package."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_OWN_FOLDER):
        if frame.f_back is None:
            break
        frame = frame.f_back
    return Position(frame.f_code.co_filename, frame.f_lineno)

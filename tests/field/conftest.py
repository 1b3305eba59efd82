"""The application over a scripted dispatcher (tests/server) for the tests of this folder."""

from __future__ import annotations

from tests.server.conftest import bench, busy, letters, make_bench

__all__ = ["bench", "busy", "letters", "make_bench"]

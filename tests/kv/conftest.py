from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture
def as_somebody() -> Iterator[None]:
    """root may write anywhere, so it is not root that tries."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    if user == 0:
        os.seteuid(0)

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture
def as_unprivileged_user() -> Iterator[None]:
    """Run the test as an unprivileged user, because root may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    if user == 0:
        os.seteuid(0)

"""How much a random or repeated test does: little in `make test`, much under KVIST_TEST_PROFILE=long."""

from __future__ import annotations

import os
from typing import Literal, TypeVar, get_args

Profile = Literal["ordinary", "long"]
Amount = TypeVar("Amount", int, float)


def profile() -> Profile:
    """The profile that KVIST_TEST_PROFILE names, `ordinary` without it. Raises ValueError for an unknown one."""
    name = os.environ.get("KVIST_TEST_PROFILE") or "ordinary"
    for known in get_args(Profile):
        if name == known:
            return known
    raise ValueError(f"KVIST_TEST_PROFILE is {name!r}: set it to one of {', '.join(get_args(Profile))}, or unset it")


def budget(ordinary: Amount, *, long: Amount) -> Amount:
    """The amount in force: of seconds, of hypothesis' examples, of rounds or of seeds.

    In an ordinary run, a test does as much as it needs to fail when its mechanism is broken.
    """
    return long if profile() == "long" else ordinary

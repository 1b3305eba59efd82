"""PURE. The version of the messages between processes (wire.py), and which versions work together.

Processes of neighbouring protocol versions work together: a cluster is upgraded one process at a time. A receiver
ignores fields that it does not know, and a field that is added to a message has a default; a new message is sent only
to a peer whose version has it. A change that an older peer must not ignore needs two versions: the first one reads the
new form, the second one sends it.
"""

from __future__ import annotations

PROTOCOL_VERSION = 6  # 5: SetRole, RoleAnswer; 6: LeaseCommand, LeaseAnswer, SubmitTogether
OLDEST_PROTOCOL_VERSION = 4  # earlier versions work with no other version


def interworks(version: int, other: int) -> bool:
    """Return whether processes of these two protocol versions work together."""
    return abs(version - other) <= 1 and min(version, other) >= OLDEST_PROTOCOL_VERSION

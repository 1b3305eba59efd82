"""The two state machines of a handoff, one for each side. docs/handoff.md has the protocol; a test compares the two.

A trigger that is missing in the table of a state is ignored in that state, so that duplicates and late answers are
harmless. This file lists the transitions; source.py and target.py carry out their actions.
"""

from __future__ import annotations

import enum


class SourceState(enum.Enum):
    """The prefill side."""

    AWAITING_GRANT = "awaiting grant"  # no Grant has arrived; the request may be computing
    WRITING = "writing"  # granted: pages are written as they are computed
    DONE_SENT = "done sent"  # every page is written; Done is repeated until it is answered
    STOPPING = "stopping"  # our pages are kept until the transport has stopped writing
    CLOSED = "closed"


class SourceTrigger(enum.Enum):
    GRANT = "Grant"
    BAD_GRANT = "unusable Grant"
    ALL_WRITTEN = "all pages written"
    WRITES_FAILED = "writes failed"
    WRITES_STOPPED = "writes stopped"
    ACK = "Ack"
    REVOKE = "Revoke"
    REQUEST_ENDED = "request ended"  # aborted, timed out, or its step failed
    PEER_DIED = "peer died"


SOURCE_TRANSITIONS: dict[SourceState, dict[SourceTrigger, SourceState]] = {
    SourceState.AWAITING_GRANT: {
        SourceTrigger.GRANT: SourceState.WRITING,
        SourceTrigger.BAD_GRANT: SourceState.CLOSED,
        SourceTrigger.REVOKE: SourceState.CLOSED,
        SourceTrigger.REQUEST_ENDED: SourceState.CLOSED,
    },
    SourceState.WRITING: {
        SourceTrigger.ALL_WRITTEN: SourceState.DONE_SENT,
        SourceTrigger.WRITES_FAILED: SourceState.CLOSED,
        SourceTrigger.REVOKE: SourceState.STOPPING,
        SourceTrigger.REQUEST_ENDED: SourceState.STOPPING,
        SourceTrigger.PEER_DIED: SourceState.STOPPING,
    },
    SourceState.DONE_SENT: {
        SourceTrigger.ACK: SourceState.CLOSED,
        SourceTrigger.REVOKE: SourceState.CLOSED,
        SourceTrigger.PEER_DIED: SourceState.CLOSED,
    },
    SourceState.STOPPING: {
        SourceTrigger.WRITES_STOPPED: SourceState.CLOSED,
        SourceTrigger.WRITES_FAILED: SourceState.CLOSED,
    },
    SourceState.CLOSED: {},
}


class TargetState(enum.Enum):
    """The decode side."""

    GRANTED = "granted"  # Grant sent: prefill may write our pages
    VERIFYING = "verifying"  # Done arrived: no more writes; the checksum is being computed
    DISCARDING = "discarding"  # the request ended while the checksum was computed: a transport may still use the pages
    REVOKED = "revoked"  # the request ended; Revoke is repeated, since prefill may still write
    CLOSED = "closed"


class TargetTrigger(enum.Enum):
    DONE = "Done"
    VERIFIED = "checksum equal"
    MISMATCH = "checksum differs"
    SOURCE_CLOSED = "Closed"
    REQUEST_ENDED = "request ended"  # aborted or timed out
    PEER_DIED = "peer died"


TARGET_TRANSITIONS: dict[TargetState, dict[TargetTrigger, TargetState]] = {
    TargetState.GRANTED: {
        TargetTrigger.DONE: TargetState.VERIFYING,
        TargetTrigger.SOURCE_CLOSED: TargetState.CLOSED,
        TargetTrigger.REQUEST_ENDED: TargetState.REVOKED,
        TargetTrigger.PEER_DIED: TargetState.CLOSED,
    },
    TargetState.VERIFYING: {
        TargetTrigger.VERIFIED: TargetState.CLOSED,
        TargetTrigger.MISMATCH: TargetState.CLOSED,
        TargetTrigger.REQUEST_ENDED: TargetState.DISCARDING,
    },
    TargetState.DISCARDING: {
        TargetTrigger.VERIFIED: TargetState.CLOSED,
        TargetTrigger.MISMATCH: TargetState.CLOSED,
    },
    TargetState.REVOKED: {
        TargetTrigger.DONE: TargetState.CLOSED,
        TargetTrigger.SOURCE_CLOSED: TargetState.CLOSED,
        TargetTrigger.PEER_DIED: TargetState.CLOSED,
    },
    TargetState.CLOSED: {},
}

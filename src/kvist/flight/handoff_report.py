"""Where the time of one handoff went, in messages from engines to gateways."""

from __future__ import annotations

import msgspec


class HandoffReport(msgspec.Struct, frozen=True, kw_only=True):
    """Pages, bytes and times of one handoff, as measured by the decode engine."""

    num_pages: int  # pages written by prefill; through the store: pages fetched from it
    num_pages_reused: int  # pages that decode had cached already
    num_bytes: int
    duration_s: float  # grant sent → pages verified; through the store: request received → pages loaded
    wait_s: float  # the last part of `duration_s`: Done received → pages verified; the delay of the stream
    transport: str = ""  # by which the pages travelled, "store" through the store; empty if no page did
    transport_reason: str = ""  # why it was chosen; a text to be read
    num_pages_recomputed: int = 0  # written pages that had arrived changed, and those behind them
    num_pages_missing: int = 0  # full pages that the store did not deliver: decode computed them
    # Further parts of the time between first and second token; `wait_s` is between `last_copy_s` and `admission_s`.
    grant_wait_s: float = 0.0  # as in `Done`
    last_copy_s: float = 0.0  # as in `Done`
    admission_s: float = 0.0  # pages verified or loaded → planned in the step that samples the second token
    first_step_s: float = 0.0  # from then on → second token sampled


class StoredPages(msgspec.Struct, frozen=True, kw_only=True):
    """The pages of a prompt that a prefill engine has stored for a decode engine."""

    num_pages: int  # full pages of the prompt
    num_stored: int  # the leading pages that are in the store
    duration_s: float  # first token sampled → last page stored; the delay of the stream

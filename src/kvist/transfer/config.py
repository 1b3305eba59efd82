"""The option that names the transports which an engine offers."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.door import Given, choice_of, options_of_choice
from kvist.transfer import TRANSPORTS


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferConfig:
    """The copies of pages from prefill to decode."""

    disaggregation_transfer_backend: str = choice_of(
        TRANSPORTS,
        "auto",
        "how pages are copied between engines: transports that this worker offers, best first. A pair of workers uses "
        "the first one of prefill's that decode offers too",
        auto="all that work here",
        several=True,
    )
    disaggregation_transfer_options: Given = options_of_choice(
        TRANSPORTS, chosen_by="disaggregation_transfer_backend", title="transport", prefix="transfer_", several=True
    )

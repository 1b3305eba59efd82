"""The options of the APIs that agents speak."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentApiOptions:
    """Bounds the responses that /v1/responses keeps for `previous_response_id`, in the memory of the gateway."""

    max_stored_responses: int = option(
        10_000, "maximum number of responses kept for `previous_response_id`; the oldest ones are dropped", minimum=1
    )
    max_stored_response_bytes: int = option(
        64 << 20,
        "maximum size of the responses kept for `previous_response_id`, with their inputs; the oldest responses of the "
        "API key with the most bytes are dropped",
        unit="bytes",
        minimum=1024,
    )
    stored_response_ttl_s: float = option(
        86_400.0, "maximum time for which a response is kept for `previous_response_id`", unit="s", minimum=1
    )

"""The endpoints that compute a prompt and generate nothing, for clients that plan their requests.

    POST /v1/continuations/score    scoring.py    logprobs of texts that may follow a prompt, all in one step
    POST /v1/prefill                prefill.py    computes a prompt, so that its pages are cached
    /v1/leases                      leases.py     computes a prompt, and pins its pages for a limited time

prompts.py reads the prompt, which all have in common. `prompt_api` mounts the endpoints on a gateway (server/app.py).
"""

from __future__ import annotations

from kvist.prompt_work.leases import Leases
from kvist.prompt_work.prefill import Prefill
from kvist.prompt_work.scoring import Scoring
from kvist.server.app import MountedApi
from kvist.server.gateway import GatewayContext

__all__ = ["prompt_api"]


def prompt_api(gateway: GatewayContext) -> MountedApi:
    leases = Leases(gateway)
    return MountedApi(
        routes=[
            ("/v1/continuations/score", Scoring(gateway).score, ["POST"]),
            ("/v1/prefill", Prefill(gateway).prefill, ["POST"]),
            ("/v1/leases", leases.all, ["GET", "POST"]),
            ("/v1/leases/{lease}", leases.one, ["GET", "DELETE"]),
            ("/v1/leases/{lease}/renew", leases.renew, ["POST"]),
        ]
    )

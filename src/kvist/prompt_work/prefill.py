"""POST /v1/prefill: computes a prompt without an answer, so that the prompts that begin with it find its pages cached.

Without a `priority` the prompt is computed after all other work of its worker.
"""

from __future__ import annotations

from functools import partial

from starlette.types import Receive, Scope, Send

from kvist.api.decoding import BodyDecoder
from kvist.api.schemas import PrefillRequest
from kvist.clock import unix_time_s
from kvist.http.asgi import send_json
from kvist.http.caller import Caller, caller_of
from kvist.prompt_work.prompts import PromptWork, computed_and_cached, prompt_work, usage
from kvist.server.gateway import GatewayContext
from kvist.server.respond import compute

_PREFILL = BodyDecoder(PrefillRequest)


class Prefill:
    """`prefill` is the endpoint, raw ASGI."""

    def __init__(self, gateway: GatewayContext) -> None:
        self._gateway = gateway

    async def prefill(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self._gateway
        gateway.lifecycle.check()
        work = await gateway.prepare(scope, receive, partial(self._work, caller_of(scope)))
        await compute(gateway, [work.choice], scope, receive)
        answer = {
            "id": work.job_id,
            "object": "prefill",
            "created": unix_time_s(),
            "model": gateway.model_name,
            **computed_and_cached([work.choice]),
            "usage": usage(work.num_prompt_tokens, [work.choice]),
        }
        await send_json(send, answer, headers=work.headers)

    def _work(self, caller: Caller, body: bytes) -> PromptWork:
        self._gateway.require_tokenizer()
        request, headers = _PREFILL.decode(body)
        background = request.priority is None
        return prompt_work(self._gateway, caller, request, headers, kind="prefill", background=background)

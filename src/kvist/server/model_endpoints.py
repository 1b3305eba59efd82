"""Endpoints that describe the model, in the formats of OpenAI, vLLM and SGLang; and a probe that generates.

/health_generate generates two tokens: a prefill worker may produce the first token, but the second one needs a handoff
and a decode worker. Concurrent probes share one generation, so that further probes cost nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from dataclasses import asdict

from starlette.types import Receive, Scope, Send

from kvist.clock import unix_time_s
from kvist.errors import RequestError, Unavailable
from kvist.http.asgi import send_json
from kvist.request import EngineRequest, RequestId, SamplingParams
from kvist.server.gateway import GatewayContext

_PROBE_TIMEOUT_S = 20.0  # SGLang's
_PROBE_TOKENS = 2
_PROBE_PROMPT = (0,)  # any token id


class ModelEndpoints:
    """Each public method is one endpoint, raw ASGI."""

    def __init__(self, gateway: GatewayContext, model_path: str | None) -> None:
        self._gateway = gateway
        self._model_path = model_path
        self._started_unix_s = unix_time_s()
        self._probe: asyncio.Task[None] | None = None

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        await send_json(send, {"object": "list", "data": [self._model()]})

    async def model(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        self._gateway.check_model(scope["path_params"]["model"])
        await send_json(send, self._model())

    def _model(self) -> dict[str, object]:
        spec = self._gateway.dispatcher.model()
        permission = {
            "id": f"modelperm-{self._gateway.model_name}",
            "object": "model_permission",
            "created": self._started_unix_s,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        return {
            "id": self._gateway.model_name,
            "object": "model",
            "created": self._started_unix_s,
            "owned_by": "kvist",
            "root": self._path(),
            "parent": None,
            "max_model_len": spec.max_model_len if spec is not None else None,
            "permission": [permission],
        }

    def _path(self) -> str:
        return self._model_path or self._gateway.model_name

    async def model_info(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Describe the model with SGLang's fields."""
        del scope, receive
        gateway = self._gateway
        spec = gateway.dispatcher.model()
        defaults = {name: value for name, value in asdict(gateway.sampling_defaults).items() if value is not None}
        info = {
            "model_path": self._path(),
            "served_model_name": gateway.model_name,
            "tokenizer_path": self._path(),
            "is_generation": True,
            "preferred_sampling_params": defaults or None,
            "weight_version": spec.model_fingerprint if spec is not None else None,
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "max_model_len": spec.max_model_len if spec is not None else None,
        }
        await send_json(send, info)

    async def tokenizer_info(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Describe the tokenizer with vLLM's fields, from which a client can render and count as this server does."""
        del scope, receive
        tokenizer = self._gateway.require_tokenizer()
        template = tokenizer.chat_template
        added = {
            str(token_id): {"content": text, "special": True}
            for text, token_id in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
        }
        info = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": self._gateway.limit().num_tokens,
            "clean_up_tokenization_spaces": False,
            "chat_template": template.source if template is not None else None,
            "added_tokens_decoder": added,
            **(template.special_tokens if template is not None else {}),
        }
        await send_json(send, info)

    async def health_generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        if not self._gateway.generates:
            raise RequestError("a prefill or decode worker alone cannot generate: use /health_generate of the router")
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._generate(), name="health_generate")
        await asyncio.shield(self._probe)  # other clients may wait for the probe after this one disconnects
        await send_json(send, {"status": "ok"})

    async def _generate(self) -> None:
        """Generate `_PROBE_TOKENS` tokens. Raises `KvistError` when the tokens do not arrive in time."""
        request = EngineRequest(
            request_id=RequestId(f"health-{uuid.uuid4().hex}"),
            prompt_token_ids=_PROBE_PROMPT,
            sampling=SamplingParams(max_tokens=_PROBE_TOKENS, temperature=0.0, ignore_eos=True),
        )
        num_tokens = 0
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                async with contextlib.aclosing(self._gateway.dispatcher.generate(request)) as parts:
                    async for part in parts:
                        num_tokens += len(part.chunk.token_ids)
        except TimeoutError as error:
            message = f"{num_tokens} of {_PROBE_TOKENS} tokens were generated within {_PROBE_TIMEOUT_S:g} s"
            raise Unavailable(message) from error
        if num_tokens < _PROBE_TOKENS:
            raise Unavailable(f"the stream of the probe ended after {num_tokens} of {_PROBE_TOKENS} tokens")

"""The endpoints of Anthropic's Messages API: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import msgspec
from starlette.types import Receive, Scope, Send

from kvist.agents_api.chat_job import job_of_chat
from kvist.agents_api.messages_format import MessagesFormat, error_body
from kvist.agents_api.messages_request import chat_of_messages
from kvist.api.decoding import BodyDecoder
from kvist.api.messages import MessagesRequest, TokenCount
from kvist.checking.tools import offered_tools
from kvist.http.asgi import JSON_TYPE, Headers, send_bytes
from kvist.http.caller import Caller
from kvist.server.app import MountedApi
from kvist.server.gateway import GatewayContext
from kvist.server.generation_endpoint import generation_endpoint
from kvist.server.openai import ChatRun
from kvist.server.respond import Job
from kvist.server.routing_fields import with_ignored

_PATH = "/v1/messages"
_MESSAGES = BodyDecoder(MessagesRequest)


def messages_api(gateway: GatewayContext) -> MountedApi:
    async def count_tokens(scope: Scope, receive: Receive, send: Send) -> None:
        answer, headers = await gateway.prepare(scope, receive, lambda body: _token_count(gateway, body))
        await send_bytes(send, answer, headers=[JSON_TYPE, *headers])

    return MountedApi(
        routes=(
            (_PATH, generation_endpoint(gateway, messages_job), ("POST",)),
            (f"{_PATH}/count_tokens", count_tokens, ("POST",)),
        ),
        error_bodies={_PATH: error_body},
    )


def messages_job(gateway: GatewayContext, caller: Caller, body: bytes) -> Job:
    """Build the job of a message. Raises `RequestError` for an invalid field."""
    template = gateway.require_tokenizer().chat_template
    request, headers = _MESSAGES.decode(body)
    limits_thinking = template is not None and template.formats.reasoning is not None
    chat, paths = chat_of_messages(request, limits_thinking=limits_thinking)
    if request.thinking is not None and request.thinking.budget_tokens is not None and not limits_thinking:
        headers = with_ignored(headers, ["thinking.budget_tokens"])

    def write(run: ChatRun) -> MessagesFormat:
        return MessagesFormat(run, model_name=gateway.model_name, max_tokens=request.max_tokens)

    return job_of_chat(gateway, caller, chat, paths, headers, prefix="msg", write=write)


def _token_count(gateway: GatewayContext, body: bytes) -> tuple[bytes, Headers]:
    tokenizer = gateway.require_tokenizer()
    request, headers = _MESSAGES.decode(body)
    gateway.check_model(request.model)
    chat, paths = chat_of_messages(request)
    text = paths.checked(lambda: gateway.chat_prompt(chat.messages, chat, offered_tools(chat, tokenizer)))
    [token_ids] = gateway.encode_to_show([text], add_special_tokens=False, param="messages")
    return msgspec.json.encode(TokenCount(len(token_ids))), headers

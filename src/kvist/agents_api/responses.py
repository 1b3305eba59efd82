"""The endpoints of OpenAI's Responses API, over the store of this gateway.

Life of a response: its body is decoded → the conversation before it is looked up → both become a chat, whose job runs
as any other → the response is kept before its last byte is sent, so that the client can continue it at once. A
background response is a task of the gateway: its places are reserved before the client gets its id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from urllib.parse import parse_qsl

import msgspec
from prometheus_client.core import Metric
from starlette.types import Receive, Scope, Send

from kvist.agents_api.chat_job import job_of_chat
from kvist.agents_api.config import AgentApiOptions
from kvist.agents_api.response_store import ResponseStore, Turn
from kvist.agents_api.responses_format import ResponsesFormat, opened_response
from kvist.agents_api.responses_request import LOGPROBS, chat_of_responses, check_includable, check_request, items_of
from kvist.api.decoding import BodyDecoder
from kvist.api.response_objects import DeletedResponse, InputTokens, ItemList, ResponseObject
from kvist.api.responses import InputItem, InputPart, ResponsesRequest
from kvist.checking.tools import offered_tools
from kvist.errors import Conflict, EngineError, KvistError, RequestError, UnsupportedField
from kvist.http.asgi import JSON_TYPE, Headers, cancel_on_disconnect, send_bytes
from kvist.http.caller import Caller, caller_of
from kvist.server.app import MountApi, MountedApi
from kvist.server.flights import recorded
from kvist.server.gateway import GatewayContext
from kvist.server.generation_endpoint import run_job, with_constraint
from kvist.server.openai import ChatRun
from kvist.server.respond import Job, complete

logger = logging.getLogger(__name__)

_json = msgspec.json.Encoder().encode
_PATH = "/v1/responses"
_RESPONSES = BodyDecoder(ResponsesRequest)
_CANCEL_TIMEOUT_S = 10.0
_CONTINUABLE = ("completed", "incomplete")
_MAX_LISTED = 100
_INCLUDES = ("include", "include[]")
_ID_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


class _KeptResponse(msgspec.Struct):
    """The part of a stored response that the next request reads."""

    status: str
    output: list[InputItem]


def responses_api(options: AgentApiOptions) -> MountApi:
    def mount(gateway: GatewayContext) -> MountedApi:
        api, one, post = Responses(gateway, options), f"{_PATH}/{{response_id}}", ("POST",)
        return MountedApi(
            routes=(
                (_PATH, api.create, post),
                (f"{_PATH}/input_tokens", api.input_tokens, post),
                (one, api.retrieve, ("GET",)),
                (one, api.delete, ("DELETE",)),
                (f"{one}/cancel", api.cancel, post),
                (f"{one}/input_items", api.input_items, ("GET",)),
            ),
            families=api.families,
        )

    return mount


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A decoded request."""

    request: ResponsesRequest
    headers: Headers
    num_bytes: int
    before: Turn | None = None  # of `previous_response_id`


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """A background response."""

    task: asyncio.Task[bytes]
    job: Job
    response: ResponseObject


class Responses:
    """Each public method is one endpoint, raw ASGI. Owned by the event loop."""

    def __init__(self, gateway: GatewayContext, options: AgentApiOptions) -> None:
        self._gateway = gateway
        self._store = ResponseStore(options, gateway.clock)
        self._running: dict[tuple[str, str], _Running] = {}  # by API key and id

    def families(self) -> Iterator[Metric]:
        return self._store.families()

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, owner = self._gateway, _owner(scope)
        gateway.lifecycle.check()
        gateway.require_tokenizer()
        asked = await self._asked(scope, receive)
        caller = caller_of(scope)
        job, form = await gateway.compute(scope, receive, _num_bytes(asked), lambda: self._job(asked, caller, owner))
        if not asked.request.background:
            await run_job(gateway, job, scope, receive, send)
            return
        with contextlib.ExitStack() as places:
            places.enter_context(recorded(gateway, job.choices, scope))
            async with cancel_on_disconnect(receive):
                job = await with_constraint(gateway, job)
            places.enter_context(gateway.lifecycle.open_request())
            places.enter_context(gateway.admission.reserve(job.caller, len(job.choices)))
            body, key = _json(form.response), (owner, form.response.id)
            task = asyncio.create_task(complete(gateway, job), name=form.response.id)
            self._running[key] = _Running(task=task, job=job, response=form.response)
            task.add_done_callback(partial(self._ended, key, job, form, places.pop_all()))
        await send_bytes(send, body, headers=[JSON_TYPE, *job.headers])

    def _ended(
        self,
        key: tuple[str, str],
        job: Job,
        form: ResponsesFormat,
        places: contextlib.ExitStack,
        task: asyncio.Task[bytes],
    ) -> None:
        """End a background response, also one that was cancelled before its task began."""
        places.close()
        del self._running[key]
        if task.cancelled():
            form.cancel_whole(job.choices)
            return
        error = task.exception()
        if error is None:
            return
        if not isinstance(error, KvistError):
            logger.error("bug while generating a response in the background", exc_info=error)
            error = EngineError("internal error in the gateway; see its log")
        form.fail_whole(job.choices, error)

    async def input_tokens(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the tokens of the prompt that the request would have."""
        gateway = self._gateway
        gateway.require_tokenizer()
        asked = await self._asked(scope, receive)
        count = await gateway.compute(scope, receive, _num_bytes(asked), lambda: self._num_tokens(asked))
        await send_bytes(send, _json(InputTokens(count)), headers=[JSON_TYPE, *asked.headers])

    async def retrieve(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        for name, value in _query(scope, (*_INCLUDES, "stream")):
            if name == "stream" and value not in ("false", "0"):
                raise UnsupportedField("stored responses are not streamed: omit `stream`", param="stream")
        running = self._running.get(_key(scope))
        await send_bytes(send, self._store.get(*_key(scope)).response if running is None else _json(running.response))

    async def delete(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        await self._stop(_key(scope))
        self._store.delete(*_key(scope))
        await send_bytes(send, _json(DeletedResponse(id=_key(scope)[1])))

    async def cancel(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Cancel a background response. A response that has ended stays as it is."""
        del receive
        key = _key(scope)
        await self._stop(key)
        body = self._store.get(*key).response
        if not msgspec.json.decode(body)["background"]:
            raise RequestError(
                "only background responses can be cancelled: to cancel another response, close its connection"
            )
        await send_bytes(send, body)

    async def _stop(self, key: tuple[str, str]) -> None:
        running = self._running.get(key)
        if running is not None:
            if running.job.choices[0].finish_reason is None:  # else its response is being written
                running.task.cancel()
            await asyncio.wait({running.task}, timeout=_CANCEL_TIMEOUT_S)

    async def input_items(self, scope: Scope, receive: Receive, send: Send) -> None:
        """List the items of one response's own input, the last one first unless `order` is asc."""
        del receive
        asked = dict(_query(scope, ("limit", "order", "after", *_INCLUDES)))
        limit, order = asked.get("limit", "20"), asked.get("order", "desc")
        if not (limit.isascii() and limit.isdigit()) or not 1 <= int(limit[:9]) <= _MAX_LISTED:
            raise RequestError(f"`limit` is {limit[:64]!r}; it must be 1 to {_MAX_LISTED}", param="limit")
        if order not in ("asc", "desc"):
            raise RequestError(f"`order` is {order[:64]!r}; use asc or desc", param="order")
        items = msgspec.json.decode(self._store.get(*_key(scope)).input_items, type=list[InputItem])
        items = items if order == "asc" else items[::-1]
        ids = [item.id for item in items]
        if "after" in asked and asked["after"] not in ids:
            raise RequestError(f"no item has the id {asked['after'][:64]!r}", param="after")
        start = ids.index(asked["after"]) + 1 if "after" in asked else 0
        page = items[start : start + int(limit)]
        first_id, last_id = (page[0].id, page[-1].id) if page else (None, None)
        has_more = start + len(page) < len(items)
        await send_bytes(send, _json(ItemList(data=page, first_id=first_id, last_id=last_id, has_more=has_more)))

    # ---------------------------------------------------------------- from a request to its job

    async def _asked(self, scope: Scope, receive: Receive) -> _Asked:
        asked = await self._gateway.prepare(scope, receive, _decode)
        previous_id = asked.request.previous_response_id
        if previous_id is None:
            return asked
        try:
            if (_owner(scope), previous_id) in self._running:
                raise Conflict(f"the response {previous_id[:64]!r} is still being generated: poll it first")
            asked = replace(asked, before=self._store.get(_owner(scope), previous_id))
        except RequestError as error:
            error.param = "previous_response_id"
            raise
        most = self._gateway.config.max_body_bytes
        if _num_bytes(asked) > asked.num_bytes + most:
            raise RequestError(
                f"the conversation before this request has over {most} bytes, the limit of a request "
                "(--max-body-bytes): start a new conversation",
                param="previous_response_id",
            )
        return asked

    def _job(self, asked: _Asked, caller: Caller, owner: str) -> tuple[Job, ResponsesFormat]:
        gateway, request, items = self._gateway, asked.request, items_of(asked.request)
        chat, paths = chat_of_responses(request, _earlier(asked.before), items)
        forms: list[ResponsesFormat] = []

        def keep(response: ResponseObject) -> None:
            if response.store:
                turn = Turn(before=asked.before, input_items=_json(_named(items)), response=_json(response))
                self._store.put(owner, response.id, turn)

        def write(run: ChatRun) -> ResponsesFormat:
            if run.parsing is not None and chat.logprobs:
                raise UnsupportedField(
                    "logprobs of answers with tools or reasoning are a feature of /v1/chat/completions: omit "
                    f"{LOGPROBS}",
                    param="include",
                )
            response = opened_response(request, run, gateway.model_name)
            forms.append(ResponsesFormat(response, run, gateway.require_tokenizer(), keep))
            return forms[0]

        job = job_of_chat(gateway, caller, chat, paths, asked.headers, prefix="resp", write=write)
        return job, forms[0]

    def _num_tokens(self, asked: _Asked) -> int:
        gateway, request = self._gateway, asked.request
        gateway.check_model(request.model)
        chat, paths = chat_of_responses(request, _earlier(asked.before), items_of(request))
        tokenizer = gateway.require_tokenizer()
        text = paths.checked(lambda: gateway.chat_prompt(chat.messages, chat, offered_tools(chat, tokenizer)))
        [token_ids] = gateway.encode_to_show([text], add_special_tokens=False, param="input")
        return len(token_ids)


def _decode(body: bytes) -> _Asked:
    request, headers = _RESPONSES.decode(body)
    check_request(request)
    return _Asked(request=request, headers=headers, num_bytes=len(body))


def _num_bytes(asked: _Asked) -> int:
    """Return how many bytes of JSON the request and the conversation before it have."""
    turns = [] if asked.before is None else asked.before.conversation()
    return asked.num_bytes + sum(len(turn.input_items) + len(turn.response) for turn in turns)


def _earlier(before: Turn | None) -> list[InputItem]:
    """Return the items of the conversation. Raises `RequestError` if its last response cannot be continued."""
    items: list[InputItem] = []
    for turn in [] if before is None else before.conversation():
        response = msgspec.json.decode(turn.response, type=_KeptResponse)
        if response.status not in _CONTINUABLE:
            raise RequestError(
                f"the response before has the status {response.status}: continue one that has ended",
                param="previous_response_id",
            )
        items += msgspec.json.decode(turn.input_items, type=list[InputItem])
        items += response.output
    return items


def _named(items: Sequence[InputItem]) -> list[InputItem]:
    """Return the items with ids, and texts as lists of parts."""
    found = []
    for item in items:
        kind, content = item.type or "message", item.content
        if isinstance(content, str):
            part_type = "output_text" if item.role == "assistant" else "input_text"
            content = [InputPart(type=part_type, text=content)]
        item_id = item.id or f"{_ID_PREFIXES[kind]}_{uuid.uuid4().hex}"
        found.append(msgspec.structs.replace(item, type=kind, content=content, id=item_id))
    return found


def _owner(scope: Scope) -> str:
    return caller_of(scope).key_id or ""


def _key(scope: Scope) -> tuple[str, str]:
    return _owner(scope), scope["path_params"]["response_id"]


def _query(scope: Scope, known: Sequence[str]) -> list[tuple[str, str]]:
    query: bytes = scope["query_string"]
    found = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    for name, value in found:
        if name not in known:
            raise RequestError(f"{scope['path']} takes {', '.join(known)}, not `{name[:64]}`", param=name)
        if name in _INCLUDES:
            check_includable(value)
    return found

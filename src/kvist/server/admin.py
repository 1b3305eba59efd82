"""Endpoints other than generation: tokenising, health, readiness, state, metrics, cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal
from urllib.parse import parse_qsl

import msgspec
from starlette.types import Receive, Scope, Send

from kvist import __version__, metrics
from kvist.api.decoding import BodyDecoder
from kvist.api.schemas import DetokenizeRequest, TokenizeRequest
from kvist.checking.sampling import check_num_lists, check_token_ids, token_lists
from kvist.checking.tools import offered_tools
from kvist.errors import RequestError, Unavailable, error_from_wire
from kvist.http.asgi import JSON_TYPE, Headers, send_bytes, send_json
from kvist.request import Role
from kvist.router.stream import WorkerSnapshot
from kvist.server.capacity import capacity_of
from kvist.server.gateway import GatewayContext
from kvist.server.pairs import pair_infos
from kvist.server.storage_names import decode_store, field_of, named_status
from kvist.server.worker_metrics import pages_by_state
from kvist.wire import FlushCache, Flushed, FlushTier, StorageAnswer, StorageCommand

_TOKENIZE = BodyDecoder(TokenizeRequest)
_DETOKENIZE = BodyDecoder(DetokenizeRequest)
_STORAGE_ACTIONS: Mapping[str, Literal["status", "attach", "detach"]] = {
    "GET": "status",
    "HEAD": "status",  # Starlette routes HEAD wherever it routes GET
    "PUT": "attach",
    "DELETE": "detach",
}
_ROOT_BODY = {
    "server": "Kvist, which serves a large language model",
    "generate": ["POST /v1/chat/completions", "POST /v1/completions", "POST /generate"],
    "look": ["GET /v1/models", "GET /ready", "GET /server_info", "GET /metrics", "GET /dashboard"],
}
_TIERS: dict[str, FlushTier] = {"device": "device", "host": "host"}
_RESET_FLAGS = frozenset({"reset_running_requests", "reset_external", "reset_connector"})  # vLLM's; false only
_TEXT = [(b"content-type", metrics.CONTENT_TYPE.encode())]


class Admin:
    """Each method is one endpoint, raw ASGI."""

    def __init__(self, gateway: GatewayContext) -> None:
        self._gateway = gateway

    async def root(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Describe the server to a person who opens its address in a browser."""
        del scope, receive
        needs_key = bool(self._gateway.config.api_key)
        await send_json(send, {"api_key": "required" if needs_key else "not required", **_ROOT_BODY})

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Report that this process answers. `ready` reports on the engines."""
        del scope, receive
        await send_json(send, {"status": "ok", **self._instance()})

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        self._gateway.lifecycle.check()
        if not self._gateway.ready():
            health = self._gateway.own_health()
            if health is not None and health.doing:
                raise Unavailable(f"not ready: {health.doing}")
            raise Unavailable(f"not ready{_missing(self._workers())}")
        await send_json(send, {"status": "ready", **self._instance()})

    def _instance(self) -> dict[str, str]:
        instance_id = self._gateway.instance_id
        return {} if instance_id is None else {"instance_id": instance_id}

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tokenize one prompt, several prompts (then `tokens`, `count` and `token_strs` are lists), or a chat.

        The request and response have vLLM's and SGLang's fields."""
        self._gateway.require_tokenizer()
        answer, headers = await self._gateway.prepare(scope, receive, self._tokenized)
        await send_bytes(send, answer, headers=[JSON_TYPE, *headers])

    def _tokenized(self, body: bytes) -> tuple[bytes, Headers]:
        gateway = self._gateway
        tokenizer = gateway.require_tokenizer()
        request, headers = _TOKENIZE.decode(body)
        gateway.check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("set exactly one of `prompt` and `messages`", param="prompt")
        texts, param, add_special_tokens = request.prompt, "prompt", True
        if request.messages is not None:
            param, add_special_tokens = "messages", False
            texts = gateway.chat_prompt(request.messages, request, offered_tools(request, tokenizer))
        if request.add_special_tokens is not None:
            add_special_tokens = request.add_special_tokens
        several = isinstance(texts, list)
        texts = texts if isinstance(texts, list) else [texts or ""]
        check_num_lists(len(texts), gateway.config.max_choices, param)
        ids = gateway.encode_to_show(texts, add_special_tokens=add_special_tokens, param=param)
        spellings = (
            [[tokenizer.token_text(one) for one in tokens] for tokens in ids] if request.return_token_strs else None
        )
        counts = [len(tokens) for tokens in ids]
        answer = {
            "count": counts if several else counts[0],
            "max_model_len": gateway.limit().num_tokens,
            "tokens": ids if several else ids[0],
            "token_strs": spellings if several or spellings is None else spellings[0],
        }
        return msgspec.json.encode(answer), headers

    async def detokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Return the text under vLLM's name and under SGLang's; a list of texts for several lists of ids."""
        self._gateway.require_tokenizer()
        answer, headers = await self._gateway.prepare(scope, receive, self._detokenized)
        await send_bytes(send, answer, headers=[JSON_TYPE, *headers])

    def _detokenized(self, body: bytes) -> tuple[bytes, Headers]:
        gateway = self._gateway
        tokenizer = gateway.require_tokenizer()
        request, headers = _DETOKENIZE.decode(body)
        gateway.check_model(request.model)
        lists = token_lists(request.tokens) if request.tokens else [[]]
        if lists is None:
            raise RequestError("`tokens` mixes token ids and lists of token ids", param="tokens")
        check_num_lists(len(lists), gateway.config.max_choices, "tokens")
        limit, num_tokens = gateway.max_tokens_shown(), sum(map(len, lists))
        if num_tokens > limit:
            raise RequestError(f"`tokens` holds {num_tokens} ids; the limit is {limit}", param="tokens")
        for one in lists:
            check_token_ids(one, tokenizer.vocab_size, "tokens")
        texts = [tokenizer.decode(one, skip_special_tokens=bool(request.skip_special_tokens)) for one in lists]
        answer = texts if request.tokens and isinstance(request.tokens[0], list) else texts[0]
        return msgspec.json.encode({"prompt": answer, "text": answer}), headers

    async def server_info(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Return the server's state. `engine` is this worker's own engine, which a router reads in order to connect;
        `engine` is null while the engine loads, and on a router."""
        del scope, receive
        gateway = self._gateway
        info = {
            "version": __version__,
            "model": gateway.model_name,
            "ready": gateway.ready(),
            "requests_in_flight": gateway.metrics.num_requests,
            "engine": gateway.own_engine(),
            "engine_health": gateway.own_health(),
            "workers": [_worker_info(worker) for worker in self._workers()],
            "pairs": pair_infos(self._workers()),
        }
        await send_json(send, info)

    async def flush_cache(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        tier, headers = _flush_query(scope)
        answers = await self._gateway.dispatcher.ask_workers(FlushCache(call_id="", tier=tier), Flushed)
        dropped = {worker_id: flushed.num_pages for worker_id, flushed in answers.items()}
        answer = {"success": True, "num_pages": sum(dropped.values()), "workers": dropped}
        await send_json(send, answer, headers=headers)

    async def storage_backend(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET returns the status of every worker's storage tier, PUT attaches a store, DELETE detaches the store."""
        command = StorageCommand(call_id="", action=_STORAGE_ACTIONS[scope["method"]])
        if command.action == "attach":
            attach, _ = await self._gateway.prepare(scope, receive, decode_store)
            command = msgspec.structs.replace(command, store=attach)
        answers = await self._gateway.dispatcher.ask_workers(command, StorageAnswer)
        if not answers:
            raise Unavailable("every worker was lost before it answered")
        refused = [(worker_id, answer) for worker_id, answer in sorted(answers.items()) if answer.error_code]
        for worker_id, answer in refused[:1]:
            error = error_from_wire(answer.error_code or "", f"worker {worker_id}: {answer.message}")
            error.param = field_of(answer.param)
            if len(refused) < len(answers):
                error.message += f" ({len(answers) - len(refused)} of {len(answers)} workers succeeded)"
            raise error
        statuses = {worker_id: named_status(answer.status) for worker_id, answer in answers.items()}
        await send_json(send, {"success": True, "workers": statuses})

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        await send_bytes(send, self._gateway.metrics.exposition(), headers=_TEXT)

    def _workers(self) -> tuple[WorkerSnapshot, ...]:
        return self._gateway.dispatcher.snapshot().workers


def _missing(workers: Sequence[WorkerSnapshot]) -> str:
    """Return what a gateway that cannot serve waits for."""
    if not workers:
        return ": no worker has joined yet"
    problems = [f"{worker.worker_id}: {worker.problem or worker.state}" for worker in workers if not worker.alive]
    if problems:
        return f" ({'; '.join(problems)})"
    roles = {worker.role for worker in workers}
    for role in (Role.PREFILL, Role.DECODE):
        if role not in roles:
            return f": no {role.value} worker has joined yet"
    return ": no prefill worker can hand pages over to a decode worker (`pairs` in /server_info has the reasons)"


def _flush_query(scope: Scope) -> tuple[FlushTier | None, Headers]:
    """Return the tier of /flush_cache?tier= (None: device and host) and the header that names ignored parameters."""
    query: bytes = scope["query_string"]
    tier: FlushTier | None = None
    headers: Headers = []
    names: set[str] = set()
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name in names:
            raise RequestError(f"give `{name}` once", param=name)
        names.add(name)
        if name == "tier":
            tier = _tier(value)
        elif name == "timeout":  # SGLang waits until no request runs; Kvist drops unused pages now and keeps the others
            headers = [(b"x-kvist-ignored", b"timeout")]
        elif name not in _RESET_FLAGS or value.lower() not in ("false", "0"):
            raise RequestError(f"{scope['path']} takes only `tier`, not `{name}`", param=name)
    return tier, headers


def _tier(value: str) -> FlushTier:
    if value in ("storage", "all"):
        message = "the storage tier cannot be flushed: detach the store from its workers and remove its folder"
        raise RequestError(f"{message}; omit `tier` to flush the device and host tiers", param="tier")
    if value not in _TIERS:
        raise RequestError(f"`tier` is {value!r}; use device or host, or omit `tier` for both", param="tier")
    return _TIERS[value]


def _worker_info(worker: WorkerSnapshot) -> dict[str, object]:
    load = worker.load
    return {
        "worker_id": worker.worker_id,
        "role": worker.role_name,
        "alive": worker.alive,
        "state": worker.state,
        "problem": worker.problem,
        "url": worker.url,
        "sources": worker.sources,
        "requests_in_flight": worker.num_in_flight,
        "capacity": capacity_of(worker),
        "engine": worker.spec,
        "load": None
        if load is None
        else {
            "num_running": load.num_running,
            "num_waiting": load.num_waiting,
            "num_pages": pages_by_state(load),
            "num_host_pages": load.num_host_pages,
            "storage": named_status(load.storage),
            "totals": load.totals,
        },
    }

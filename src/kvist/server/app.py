"""The gateway's HTTP application: routes, request ids, checks before the routes, and errors in OpenAI's shape.

    TrafficMiddleware (request id, access log, counts) → CORS (with --allowed-origins)
      → GuardMiddleware (Host, API key, Origin, Content-Type, errors) → routes

`build_app` composes the layers; nothing here keeps state. Endpoints are raw ASGI callables, because a response object
for each token would be too slow. `GuardMiddleware` turns every KvistError that no endpoint handled into its status and
body. A client that has disconnected gets no response.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import chain

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvist.clock import Clock, MonotonicClock
from kvist.errors import EngineError, KvistError, RequestError
from kvist.http.asgi import ClientDisconnected, header, send_error
from kvist.http.caller import ApiKeys, Caller, caller_of
from kvist.http.traffic import TokenCounts, Traffic, exchange_of
from kvist.http.work import BodyBudget, WorkPool
from kvist.metrics import GatewayMetrics
from kvist.request import Role
from kvist.server.admin import Admin
from kvist.server.admission import Admission
from kvist.server.config import ServerConfig
from kvist.server.gateway import GatewayContext
from kvist.server.generation import EngineClient
from kvist.server.lifecycle import Lifecycle
from kvist.server.model_endpoints import ModelEndpoints
from kvist.server.native import native_job
from kvist.server.not_served import NOT_SERVED, NotServed
from kvist.server.openai import chat_job, completion_job
from kvist.server.respond import Job, respond
from kvist.server.sampling import MAX_SEED
from kvist.server.web_pages import OriginGuard, check_host_header
from kvist.server.worker_metrics import member_families, worker_families
from kvist.server.workers import Workers, WorkerSet
from kvist.text import PromptEncoder, SamplingDefaults, Tokenizer
from kvist.wire import EngineHealth, EngineSpec

logger = logging.getLogger(__name__)

_PATHS_WITHOUT_KEY = frozenset({"/", "/health", "/ready"})  # probes carry no key, and / says whether a key is needed
_CORS_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
_CORS_HEADERS = ("x-request-id", "x-kvist-ignored", "retry-after")  # response headers that scripts of a page may read
_MAX_REQUEST_ID_CHARS = 128
_FREE_BODY_BYTES = 64 << 10  # about what uvicorn reads before the application does
Endpoint = Callable[[Scope, Receive, Send], Awaitable[None]]


def no_engine() -> None:
    """Return None, as on a router, which has no engine of its own."""
    return


def build_app(
    *,
    dispatcher: EngineClient,
    members: WorkerSet | None = None,
    tokenizer: Tokenizer | None,
    config: ServerConfig,
    model_name: str,
    model_path: str | None = None,
    sampling_defaults: SamplingDefaults | None = None,
    own_role: Role | None = None,
    own_engine: Callable[[], EngineSpec | None] = no_engine,
    own_health: Callable[[], EngineHealth | None] = no_engine,
    lifecycle: Lifecycle | None = None,
    instance_id: str | None = None,
    clock: Clock | None = None,
    draw_seed: Callable[[], int] = lambda: secrets.randbelow(MAX_SEED),
) -> TrafficMiddleware:
    """Build the ASGI application. `members` are the workers of a router; None on the HTTP port of a worker.

    `instance_id` is shown by /health and /ready. On the HTTP port of a worker, `own_role` is the role of its engine: a
    prefill or decode worker needs no tokenizer, and refuses generation with an error that names the router. Clients on
    this host may read the tokenizer from `model_path`. `own_engine` and `own_health` return the values of `engine` and
    `engine_health` in /server_info."""
    clock = clock or MonotonicClock()
    work = WorkPool(num_threads=config.tokenizer_threads, max_waiting=config.max_concurrent_requests)
    bodies = BodyBudget(limit_bytes=config.max_total_body_bytes, free_bytes=_FREE_BODY_BYTES)
    gateway_metrics = GatewayMetrics(
        of_workers=lambda: chain(
            worker_families(dispatcher.snapshot()), () if members is None else member_families(members.counts())
        ),
        num_long_requests_waiting=lambda: work.num_waiting,
        num_body_bytes=lambda: bodies.num_bytes,
    )
    gateway = GatewayContext(
        dispatcher=dispatcher,
        tokenizer=tokenizer,
        encoder=None if tokenizer is None else PromptEncoder(tokenizer),
        config=config,
        model_name=model_name,
        instance_id=instance_id,
        metrics=gateway_metrics,
        clock=clock,
        draw_seed=draw_seed,
        own_role=own_role,
        own_engine=own_engine,
        own_health=own_health,
        admission=Admission(limit=config.max_concurrent_requests, metrics=gateway_metrics, clock=clock),
        work=work,
        sampling_defaults=sampling_defaults or SamplingDefaults(),
        lifecycle=lifecycle or Lifecycle(),
        bodies=bodies,
    )
    routes = _routes(gateway, model_path, Workers(gateway, members))
    guarded: ASGIApp = GuardMiddleware(Router(routes), config, gateway.lifecycle)
    if config.allowed_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=config.allowed_origins,
            allow_methods=_CORS_METHODS,
            allow_headers=("*",),
            expose_headers=_CORS_HEADERS,
        )
    paths = [route.path.replace(":path", "") for route in routes]
    return TrafficMiddleware(
        guarded, Traffic(gateway.metrics, gateway.clock, paths=paths, access_log=config.access_log)
    )


def _routes(gateway: GatewayContext, model_path: str | None, workers: Workers) -> list[Route]:
    admin, model = Admin(gateway), ModelEndpoints(gateway, model_path)
    get, post = ["GET"], ["POST"]
    table: list[tuple[str, Endpoint, list[str]]] = [
        ("/v1/chat/completions", _generation(gateway, chat_job), post),
        ("/v1/completions", _generation(gateway, completion_job), post),
        ("/generate", _generation(gateway, native_job), post),
        ("/v1/models", model.models, get),
        ("/v1/models/{model:path}", model.model, get),
        ("/model_info", model.model_info, get),
        ("/get_model_info", model.model_info, get),
        ("/tokenizer_info", model.tokenizer_info, get),
        ("/health_generate", model.health_generate, get),
        ("/tokenize", admin.tokenize, post),
        ("/detokenize", admin.detokenize, post),
        ("/v1/tokenize", admin.tokenize, post),
        ("/v1/detokenize", admin.detokenize, post),
        ("/", admin.root, get),
        ("/health", admin.health, get),
        ("/ready", admin.ready, get),
        ("/server_info", admin.server_info, get),
        ("/get_server_info", admin.server_info, get),
        ("/reset_prefix_cache", admin.flush_cache, post),
        ("/flush_cache", admin.flush_cache, post),
        ("/hicache/storage-backend", admin.storage_backend, ["GET", "PUT", "DELETE"]),
        ("/metrics", admin.metrics, get),
        ("/workers", workers.all, ["GET", "POST"]),
        ("/workers/{worker:path}", workers.one, ["GET", "DELETE"]),
    ]
    served = [Route(path, _Raw(endpoint), methods=methods) for path, endpoint, methods in table]
    return [*served, *(Route(path, NotServed(instead)) for path, instead in NOT_SERVED.items())]


class _Raw:
    """Wraps an endpoint in an object: Starlette treats a plain function as a request handler, not as an ASGI app."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoint(scope, receive, send)


def _generation(gateway: GatewayContext, make_job: Callable[[GatewayContext, Caller, bytes], Job]) -> Endpoint:
    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        gateway.lifecycle.check()
        job = await gateway.prepare(scope, receive, partial(make_job, gateway, caller_of(scope)))
        try:
            with gateway.lifecycle.open_request():
                await respond(gateway, job, receive, send)
        finally:
            exchange_of(scope).tokens = _counted(job)

    return endpoint


def _counted(job: Job) -> TokenCounts:
    first = [choice for choice in job.choices if not choice.repeats_prompt]
    return TokenCounts(
        num_prompt=sum(choice.request.num_prompt_tokens for choice in first),
        num_output=sum(len(choice.token_ids) for choice in job.choices),
        num_cached=sum(choice.num_cached_tokens for choice in first),
        is_complete=all(choice.finish_reason is not None for choice in job.choices),
    )


class TrafficMiddleware:
    """The outermost layer: logs and counts every request, and gives every response its request id."""

    def __init__(self, inner: ASGIApp, traffic: Traffic) -> None:
        self.traffic = traffic
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})  # reject before accepting
        else:
            await self._inner(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = _request_id(scope)
        exchange = self.traffic.begin(scope, request_id.decode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id)]}
            await send(message)

        try:
            await self._inner(scope, receive, send_with_id)
        except ClientDisconnected:
            logger.debug("client disconnected: %s %s", scope["method"], scope["path"])
        finally:
            self.traffic.end(scope, exchange)


class GuardMiddleware:
    """Checks a request before the routes see it, and turns an error into its response."""

    def __init__(self, router: Router, config: ServerConfig, lifecycle: Lifecycle) -> None:
        self._router = router
        self._lifecycle = lifecycle
        self._keys = ApiKeys(config.api_key)
        self._pages = OriginGuard(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # makes the router raise for an unknown path instead of sending its own error body
        try:
            if scope["type"] == "http":
                self._check(scope)
            await self._router(scope, receive, send)
        except ClientDisconnected:
            raise
        except asyncio.CancelledError:
            if not self._lifecycle.stopping:
                raise
            logger.warning(
                "stopping: the client of %s %s did not read its response in time", scope["method"], scope["path"]
            )
        except Exception as error:
            known = _known(error)
            if known is None:
                logger.exception("bug while answering %s %s", scope["method"], scope["path"])
                known = EngineError("internal error in the gateway; see its log")
            if exchange_of(scope).status is not None:
                raise  # the status has been sent: uvicorn closes the connection
            await send_error(send, known, more_headers=_allowed_methods(error))

    def _check(self, scope: Scope) -> None:
        check_host_header(scope)
        if scope["path"] not in _PATHS_WITHOUT_KEY:
            self._keys.authenticate(scope)
            self._pages.check(scope)


def _known(error: Exception) -> KvistError | None:
    if isinstance(error, KvistError):
        return error
    if isinstance(error, HTTPException):
        messages = {404: "unknown path", 405: "this path does not support that method"}
        refusal = RequestError(messages.get(error.status_code, error.detail))
        refusal.http_status = error.status_code
        return refusal
    return None


def _allowed_methods(error: Exception) -> list[tuple[bytes, bytes]]:
    """Return the Allow header, which HTTP requires of a 405."""
    allow = (error.headers or {}).get("Allow") if isinstance(error, HTTPException) else None
    return [] if allow is None else [(b"allow", allow.encode())]


def _request_id(scope: Scope) -> bytes:
    """Return the client's own id when that is safe to send back, else a new id."""
    given = header(scope, b"x-request-id")
    if given and len(given) <= _MAX_REQUEST_ID_CHARS and all(0x21 <= byte < 0x7F for byte in given):
        return given
    return uuid.uuid4().hex.encode()

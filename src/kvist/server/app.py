"""The gateway's HTTP application: its routes, within the layers of middleware.py.

    TrafficMiddleware → CORS (with --allowed-origins) → GuardMiddleware → routes

`build_app` composes the layers; nothing here keeps state. Endpoints are raw ASGI callables, because a response object
for each token would be too slow.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from prometheus_client.core import Metric
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from kvist.checking.sampling import MAX_SEED
from kvist.clock import Clock, MonotonicClock
from kvist.flight.config import FlightOptions
from kvist.flight.flight_log import FlightLog
from kvist.grammar.config import GrammarOptions
from kvist.http.traffic import Traffic
from kvist.http.work import BodyBudget, WorkPool
from kvist.metrics import GatewayMetrics
from kvist.request import Role
from kvist.server.admin import Admin
from kvist.server.admission import Admission
from kvist.server.config import ServerConfig
from kvist.server.constraints import gateway_compiler, grammar_families
from kvist.server.gateway import GatewayContext
from kvist.server.generation import EngineClient
from kvist.server.generation_endpoint import generation_endpoint
from kvist.server.lifecycle import Lifecycle
from kvist.server.middleware import Background, Endpoint, ErrorBody, GuardMiddleware, RawEndpoint, TrafficMiddleware
from kvist.server.model_endpoints import ModelEndpoints
from kvist.server.native import native_job
from kvist.server.not_served import NOT_SERVED, NotServed
from kvist.server.openai import chat_job, completion_job
from kvist.server.operations import Operations
from kvist.server.worker_metrics import member_families, worker_families
from kvist.server.workers import Workers, WorkerSet
from kvist.text import PromptEncoder, SamplingDefaults, Tokenizer
from kvist.wire import EngineHealth, EngineSpec

_CORS_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
_CORS_HEADERS = ("x-request-id", "x-kvist-ignored", "retry-after")  # response headers that scripts of a page may read
_FREE_BODY_BYTES = 64 << 10  # about what uvicorn reads before the application does


RouteRow = tuple[str, Endpoint, Sequence[str]]  # path, endpoint, methods


@dataclass(frozen=True, slots=True, kw_only=True)
class MountedApi:
    """The endpoints of an API that a room above this one adds to the gateway."""

    routes: Sequence[RouteRow]
    error_bodies: Mapping[str, ErrorBody] = field(default_factory=dict)  # by prefix of the path; others are OpenAI's
    families: Callable[[], Iterable[Metric]] = tuple  # metrics of the API, read at each scrape
    paths_without_key: Collection[str] = ()  # that have no state: everybody may read them
    polled: Collection[str] = ()  # paths that clients read again and again: logged at DEBUG
    background: Sequence[Background] = ()  # run while the server accepts connections


MountApi = Callable[[GatewayContext], MountedApi]


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
    grammar: GrammarOptions | None = None,
    apis: Sequence[MountApi] = (),
    own_role: Role | None = None,
    own_engine: Callable[[], EngineSpec | None] = no_engine,
    own_health: Callable[[], EngineHealth | None] = no_engine,
    lifecycle: Lifecycle | None = None,
    flights: FlightLog | None = None,
    instance_id: str | None = None,
    clock: Clock | None = None,
    draw_seed: Callable[[], int] = lambda: secrets.randbelow(MAX_SEED),
) -> TrafficMiddleware:
    """Build the ASGI application. `members` are the workers of a router; None on the HTTP port of a worker. `apis` add
    their endpoints to those of this room.

    `instance_id` is shown by /health and /ready. On the HTTP port of a worker, `own_role` is the role of its engine: a
    prefill or decode worker needs no tokenizer, and refuses generation with an error that names the router. Clients on
    this host may read the tokenizer from `model_path`. `own_engine` and `own_health` return the values of `engine` and
    `engine_health` in /server_info."""
    clock, grammar = clock or MonotonicClock(), grammar or GrammarOptions()
    grammars = None if tokenizer is None else gateway_compiler(grammar.grammar_backend, tokenizer)
    work = WorkPool(num_threads=config.tokenizer_threads, max_waiting=config.max_concurrent_requests)
    bodies = BodyBudget(limit_bytes=config.max_total_body_bytes, free_bytes=_FREE_BODY_BYTES)
    mounted: list[MountedApi] = []
    gateway_metrics = GatewayMetrics(
        of_workers=lambda: chain(
            grammar_families(grammars),
            worker_families(dispatcher.snapshot()),
            () if members is None else member_families(members.counts()),
            *(api.families() for api in mounted),
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
        admission=Admission(
            limit=config.max_concurrent_requests,
            limit_per_key=config.max_inflight_per_key,
            metrics=gateway_metrics,
            clock=clock,
        ),
        work=work,
        sampling_defaults=sampling_defaults or SamplingDefaults(),
        lifecycle=lifecycle or Lifecycle(),
        flights=flights or FlightLog(FlightOptions().request_log_size),
        grammars=grammars,
        grammar_timeout_s=grammar.grammar_compile_timeout_s,
        bodies=bodies,
    )
    mounted += [mount(gateway) for mount in apis]
    rows = [*_rows(gateway, model_path, Workers(gateway, members)), *(row for api in mounted for row in api.routes)]
    routes = [Route(path, RawEndpoint(endpoint), methods=list(methods)) for path, endpoint, methods in rows]
    routes += [Route(path, NotServed(instead)) for path, instead in NOT_SERVED.items()]
    error_bodies = {prefix: body for api in mounted for prefix, body in api.error_bodies.items()}
    guarded: ASGIApp = GuardMiddleware(
        Router(routes),
        config,
        gateway.lifecycle,
        error_bodies,
        paths_without_key=[path for api in mounted for path in api.paths_without_key],
    )
    if config.allowed_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=config.allowed_origins,
            allow_methods=_CORS_METHODS,
            allow_headers=("*",),
            expose_headers=_CORS_HEADERS,
        )
    paths = [route.path.replace(":path", "") for route in routes]
    polled = [path for api in mounted for path in api.polled]
    return TrafficMiddleware(
        guarded,
        Traffic(gateway.metrics, gateway.clock, paths=paths, polled=polled, access_log=config.access_log),
        background=[run for api in mounted for run in api.background],
    )


def _rows(gateway: GatewayContext, model_path: str | None, workers: Workers) -> list[RouteRow]:
    admin, model, operations = Admin(gateway), ModelEndpoints(gateway, model_path), Operations(gateway)
    get, post = ["GET"], ["POST"]
    return [
        ("/v1/chat/completions", generation_endpoint(gateway, chat_job), post),
        ("/v1/completions", generation_endpoint(gateway, completion_job), post),
        ("/generate", generation_endpoint(gateway, native_job), post),
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
        ("/role", operations.role, post),
        ("/drain", operations.drain, post),
        ("/workers", workers.all, ["GET", "POST"]),
        ("/workers/{worker:path}", workers.one, ["GET", "DELETE"]),
    ]

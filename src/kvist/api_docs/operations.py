"""The endpoints of a gateway, with the schemas of their bodies. A test holds the list equal to the routes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kvist.api import chat_objects, messages, response_objects, responses, schemas


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    methods: Sequence[str]
    path: str
    text: str  # the purpose, in a few words
    request: type[msgspec.Struct] | None = None
    response: Any = None  # type of the whole response; None: a JSON object
    event: Any = None  # type of the data of a stream's events


def _get(path: str, text: str, **more: Any) -> Operation:
    return Operation(methods=("GET",), path=path, text=text, **more)


def _post(path: str, text: str, **more: Any) -> Operation:
    return Operation(methods=("POST",), path=path, text=text, **more)


OPERATIONS: Sequence[Operation] = (
    _post(
        "/v1/chat/completions",
        "OpenAI's chat completions",
        request=schemas.ChatRequest,
        response=chat_objects.ChatCompletion,
        event=chat_objects.ChatChunk,
    ),
    _post(
        "/v1/completions",
        "OpenAI's completions",
        request=schemas.CompletionRequest,
        response=chat_objects.Completion,
        event=chat_objects.Completion,
    ),
    _post(
        "/v1/responses",
        "OpenAI's Responses API",
        request=responses.ResponsesRequest,
        response=response_objects.ResponseObject,
        event=response_objects.ResponseEvent,
    ),
    _post(
        "/v1/responses/input_tokens",
        "the number of tokens of the prompt of a response",
        request=responses.ResponsesRequest,
        response=response_objects.InputTokens,
    ),
    _get("/v1/responses/{response_id}", "a stored response", response=response_objects.ResponseObject),
    Operation(
        methods=("DELETE",),
        path="/v1/responses/{response_id}",
        text="deletes a stored response",
        response=response_objects.DeletedResponse,
    ),
    _post(
        "/v1/responses/{response_id}/cancel",
        "cancels a background response",
        response=response_objects.ResponseObject,
    ),
    _get(
        "/v1/responses/{response_id}/input_items",
        "the input of a stored response",
        response=response_objects.ItemList,
    ),
    _post(
        "/v1/messages",
        "Anthropic's Messages API",
        request=messages.MessagesRequest,
        response=messages.Message,
        event=messages.MessagesEvent,
    ),
    _post(
        "/v1/messages/count_tokens",
        "the number of tokens of the prompt of a message",
        request=messages.MessagesRequest,
        response=messages.TokenCount,
    ),
    _post("/generate", "SGLang's API", request=schemas.NativeRequest),
    _post(
        "/v1/continuations/score",
        "logprobs of texts that may follow a prompt",
        request=schemas.ScoreRequest,
    ),
    _post("/v1/prefill", "computes a prompt, so that its pages are cached", request=schemas.PrefillRequest),
    _post("/v1/leases", "pins the pages of a prompt for a limited time", request=schemas.LeaseRequest),
    _get("/v1/leases", "the leases of this API key"),
    Operation(methods=("GET", "DELETE"), path="/v1/leases/{lease}", text="shows or ends a lease"),
    _post("/v1/leases/{lease}/renew", "extends a lease"),
    _post("/tokenize", "text to token ids", request=schemas.TokenizeRequest),
    _post("/v1/tokenize", "text to token ids", request=schemas.TokenizeRequest),
    _post("/detokenize", "token ids to text", request=schemas.DetokenizeRequest),
    _post("/v1/detokenize", "token ids to text", request=schemas.DetokenizeRequest),
    _get("/v1/models", "the served model"),
    _get("/v1/models/{model}", "the served model"),
    _get("/model_info", "the model in SGLang's format"),
    _get("/get_model_info", "the model in SGLang's format"),
    _get("/tokenizer_info", "chat template, special tokens and vocabulary size"),
    _get("/", "name of the server, and its main paths"),
    _get("/health", "200 while this process answers"),
    _get("/ready", "200 when a token can be generated now, else 503"),
    _get("/health_generate", "generates two tokens"),
    _get("/server_info", "the state of the workers"),
    _get("/get_server_info", "the state of the workers"),
    _get("/requests", "the stages of the last requests: where their time went"),
    _get("/requests/{request}", "the stages of one request"),
    _get("/metrics", "metrics in Prometheus' format"),
    _get("/openapi.json", "this description"),
    _get("/docs", "this description as a page"),
    _get("/dashboard", "the state of this server and its workers, as a page"),
    _get("/dashboard/static/{name}", "a file of that page"),
    _get("/dashboard/snapshot", "the state of this server and its workers"),
    _get("/dashboard/events", "the same once a second, as server-sent events"),
    _post("/flush_cache", "drops the cached pages that no request uses"),
    _post("/reset_prefix_cache", "drops the cached pages that no request uses"),
    Operation(
        methods=("GET", "PUT", "DELETE"),
        path="/hicache/storage-backend",
        text="shows, attaches or detaches the store of the storage tier",
    ),
    _post("/role", "switches a worker to another role", request=schemas.RoleRequest),
    _post("/drain", "stops this server after its open requests"),
    _get("/workers", "the workers of this router"),
    _post("/workers", "adds a worker", request=schemas.WorkerRequest),
    Operation(methods=("GET", "DELETE"), path="/workers/{worker}", text="shows or removes a worker"),
)

"""Paths of OpenAI, vLLM and SGLang that Kvist does not serve: each is a 404 that names an alternative."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Receive, Scope, Send

from kvist.errors import RequestError

_CHAT = "use /v1/chat/completions"
_TEXT_ONLY = "only text is generated; use /v1/chat/completions or /v1/completions"
_SCORES = "texts are not compared with each other; /v1/continuations/score gives the logprobs of continuations"
_ONE_MODEL = "adapters and weights cannot change while the server runs; restart it with another --model-path"
_RUNNING = "a server cannot be paused or put to sleep; stop it and start it again"

# {rest} matches the rest of a path.
NOT_SERVED: Mapping[str, str] = {
    "/v1/responses/compact": "conversations are not compacted; send to /v1/responses the items that matter",
    "/v1/messages/batches{rest:path}": "batches are not stored; send each request separately to /v1/messages",
    "/v1/complete": "use /v1/completions or /v1/messages",
    "/v1/conversations{rest:path}": f"conversations are not stored; {_CHAT} with all messages",
    "/v1/assistants{rest:path}": f"the Assistants API is not served; {_CHAT}",
    "/v1/threads{rest:path}": f"the Assistants API is not served; {_CHAT}",
    "/v1/embeddings": _TEXT_ONLY,
    "/v1/moderations": _TEXT_ONLY,
    "/v1/audio/{rest:path}": _TEXT_ONLY,
    "/v1/images/{rest:path}": _TEXT_ONLY,
    "/v1/realtime{rest:path}": _TEXT_ONLY,
    "/v1/rerank": _TEXT_ONLY,
    "/v2/rerank": _TEXT_ONLY,
    "/rerank": _TEXT_ONLY,
    "/v1/score": _SCORES,
    "/score": _SCORES,
    "/pooling": _TEXT_ONLY,
    "/classify": _TEXT_ONLY,
    "/encode": _TEXT_ONLY,
    "/v1/files{rest:path}": "files are not stored; send each request separately",
    "/v1/batches{rest:path}": "batches are not stored; send each request separately",
    "/v1/fine_tuning/{rest:path}": "models are not trained here",
    "/inference/v1/generate": "use /v1/completions with token ids, or /generate",
    "/invocations": f"{_CHAT} or /v1/completions",
    "/ping": "use /health",
    "/load": "use /server_info",
    "/get_load": "use /server_info",
    "/version": "use /server_info",
    "/abort_request": "close the connection of the request, which aborts the request at every worker",
    "/start_profile": "profiling is not offered over HTTP; see docs/performance.md",
    "/stop_profile": "profiling is not offered over HTTP; see docs/performance.md",
    "/v1/load_lora_adapter": _ONE_MODEL,
    "/v1/unload_lora_adapter": _ONE_MODEL,
    "/load_lora_adapter": _ONE_MODEL,
    "/unload_lora_adapter": _ONE_MODEL,
    "/update_weights{rest:path}": _ONE_MODEL,
    "/update_weights_from_disk": _ONE_MODEL,
    "/sleep": _RUNNING,
    "/wake_up": _RUNNING,
    "/pause": _RUNNING,
    "/resume": _RUNNING,
    "/pause_generation": _RUNNING,
    "/continue_generation": _RUNNING,
    "/open_session": "send the whole prompt each time: a cached prefix is not computed again",
    "/close_session": "send the whole prompt each time: a cached prefix is not computed again",
    "/set_internal_state": "options cannot change while the server runs; /server_info shows the state",
    "/configure_logging": "options cannot change while the server runs; restart it with --log-level",
}


class NotServed:
    def __init__(self, instead: str) -> None:
        self._instead = instead

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive, send
        error = RequestError(f"{scope['path']} is not served here: {self._instead}")
        error.http_status = 404
        raise error

"""Paths of OpenAI, vLLM and SGLang that Kvist does not serve: a 404 that says what works instead."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Receive, Scope, Send

from kvist.errors import RequestError

_CHAT = "use /v1/chat/completions"
_TEXT_ONLY = "only text is generated: use /v1/chat/completions or /v1/completions"
_ONE_MODEL = "adapters and weights are those of the start: restart the server with another --model-path"
_RUNNING = "a server is not paused or put to sleep: stop it and start it again"

# {rest} stands for what may follow.
NOT_SERVED: Mapping[str, str] = {
    "/v1/responses{rest:path}": f"the Responses API is not served yet; {_CHAT}",
    "/v1/messages{rest:path}": f"the Messages API is not served yet; {_CHAT}, and /tokenize to count tokens",
    "/v1/conversations{rest:path}": f"conversations are not kept; {_CHAT} with all messages",
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
    "/v1/score": _TEXT_ONLY,
    "/score": _TEXT_ONLY,
    "/pooling": _TEXT_ONLY,
    "/classify": _TEXT_ONLY,
    "/encode": _TEXT_ONLY,
    "/v1/files{rest:path}": "files are not kept; send each request by itself",
    "/v1/batches{rest:path}": "batches are not kept; send each request by itself",
    "/v1/fine_tuning/{rest:path}": "models are not trained here",
    "/inference/v1/generate": "use /v1/completions with token ids, or /generate",
    "/invocations": f"{_CHAT} or /v1/completions",
    "/ping": "use /health",
    "/load": "use /server_info",
    "/get_load": "use /server_info",
    "/version": "/server_info says it",
    "/abort_request": "close the request's connection: that ends it everywhere",
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
    "/open_session": "send the whole prompt each time: its cached prefix costs nothing",
    "/close_session": "send the whole prompt each time: its cached prefix costs nothing",
    "/set_internal_state": "options are those of the start; /server_info shows the state",
    "/configure_logging": "options are those of the start: --log-level",
}


class NotServed:
    def __init__(self, instead: str) -> None:
        self._instead = instead

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive, send
        error = RequestError(f"{scope['path']} is not served here: {self._instead}")
        error.http_status = 404
        raise error

"""The context that all endpoints share: the dispatcher, the tokenizer, the limits, the clock. Built once by app.py.

The parts bound the work in progress: `admission` bounds generations, `work` other work, `bodies` the bytes of bodies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from starlette.types import Receive, Scope

from kvist.api.schemas import ChatMessage, ChatRequest, PromptRequest, TokenizeRequest
from kvist.checking.messages import continues_text, num_chars_of, plain_messages, template_options
from kvist.checking.tools import OfferedTools
from kvist.clock import Clock
from kvist.errors import PromptTooLong, RequestError, Timeout, Unavailable, UnknownModel
from kvist.fit import Limit, limit_text
from kvist.flight.flight_log import FlightLog
from kvist.grammar.compiler import GrammarCompiler
from kvist.http.asgi import cancel_on_disconnect, read_body
from kvist.http.caller import Caller, caller_of
from kvist.http.traffic import exchange_of
from kvist.http.work import INLINE_BYTES, BodyBudget, WorkPool
from kvist.metrics import GatewayMetrics
from kvist.request import PRIORITY, Role
from kvist.server.admission import Admission
from kvist.server.config import TENANT_API_KEY, ServerConfig
from kvist.server.generation import EngineClient
from kvist.server.lifecycle import Lifecycle
from kvist.text import PromptEncoder, SamplingDefaults, Tokenizer, encode_up_to
from kvist.wire import EngineHealth, EngineSpec

T = TypeVar("T")

MAX_CHARS_PER_TOKEN = 256  # no supported vocabulary has longer tokens; a far too long text is refused untokenised
_MAX_TOKENS_SHOWN = 1 << 18  # a model with a larger context raises this limit
_MAX_JOB_TOKENS = 1 << 20  # prompt tokens that one request may send to engines, counted once for each answer


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayContext:
    dispatcher: EngineClient
    tokenizer: Tokenizer | None  # set if `generates`
    encoder: PromptEncoder | None  # of the tokenizer
    own_role: Role | None  # of the engine behind this HTTP port; None on a router, which uses workers of all roles
    config: ServerConfig
    model_name: str
    instance_id: str | None  # in /health and /ready
    metrics: GatewayMetrics
    clock: Clock
    draw_seed: Callable[[], int]
    own_engine: Callable[[], EngineSpec | None]
    own_health: Callable[[], EngineHealth | None]
    sampling_defaults: SamplingDefaults  # of OpenAI's endpoints
    admission: Admission
    work: WorkPool
    bodies: BodyBudget
    lifecycle: Lifecycle
    flights: FlightLog
    grammars: GrammarCompiler | None  # set if `generates`
    grammar_timeout_s: float

    @property
    def generates(self) -> bool:
        """Whether this HTTP port generates answers: that of a prefill or decode worker does not."""
        return self.own_role is None or self.own_role.serves_alone

    def require_tokenizer(self) -> Tokenizer:
        if not self.generates:
            raise RequestError(
                "this worker computes only one phase of a request (prefill or decode): send requests to the router "
                "(kvist router), which knows all workers"
            )
        assert self.tokenizer is not None
        return self.tokenizer

    async def prepare(self, scope: Scope, receive: Receive, make: Callable[[bytes], T]) -> T:
        """Read the body and return `make(body)`; a long body is processed on a thread.

        The body is released before the request waits for anything else. `make` must not touch state of the event loop.
        Raises what `read_body` and `make` raise, `Overloaded`, and `Timeout` when no thread was free in time."""
        with self.bodies.open() as share:
            body = await read_body(scope, receive, share, self.config.body_limits())
            exchange_of(scope).body_read_s = self.clock.now_s()
            return await self.compute(scope, receive, len(body), partial(make, body))

    async def compute(self, scope: Scope, receive: Receive, num_bytes: int, make: Callable[[], T]) -> T:
        """Return `make()`, which processes `num_bytes` bytes of JSON: on a thread if they are many. `make` must not
        touch state of the event loop."""
        if num_bytes <= INLINE_BYTES:
            return make()
        caller = caller_of(scope).path
        self.admission.check(caller, 1)
        try:
            async with asyncio.timeout(self.config.request_timeout_s), cancel_on_disconnect(receive):
                return await self.work.run(caller, make)
        except TimeoutError as error:
            raise Timeout("no thread was free to tokenise the prompt within --request-timeout-s") from error

    def limit(self) -> Limit:
        """Return the largest request that the best route of the fleet can hold."""
        spec = self._spec()
        away = (each.spec for each in self.dispatcher.snapshot().workers if not each.alive)
        return Limit(
            num_tokens=spec.max_model_len,
            text=limit_text(spec.max_model_len, spec.num_pages, spec.page_size),
            num_tokens_offline=max((each.max_model_len for each in away if each is not None), default=0),
        )

    def honours_priority(self) -> bool:
        """Return whether the workers serve requests with a lower `priority` first."""
        return self._spec().scheduling_policy == PRIORITY

    def max_tokens_shown(self) -> int:
        """Return the limit of /tokenize and /detokenize. A client can also measure a text that is too long for the
        model."""
        spec = self.dispatcher.model()
        return max(_MAX_TOKENS_SHOWN, spec.max_model_len if spec is not None else 0)

    def vocab_size(self) -> int:
        """Return the model's vocabulary size, which may be padded beyond the tokenizer's. The model may generate a
        padding id."""
        return self._spec().vocab_size

    def _spec(self) -> EngineSpec:
        spec = self.dispatcher.model()
        if spec is None:
            raise Unavailable("no worker is ready: workers may still be loading the model; see /server_info")
        return spec

    def ready(self) -> bool:
        """Return whether a token can be generated now. A prefill or decode worker is ready when its engine is."""
        if self.lifecycle.stopping:
            return False
        if self.generates:
            return self.dispatcher.ready()
        return self.own_engine() is not None and all(worker.alive for worker in self.dispatcher.snapshot().workers)

    def tenant(self, caller: Caller) -> str:
        """Return the tenant whose cached pages the caller may use; "" when all callers share pages."""
        return (caller.key_id or "") if self.config.tenant_by == TENANT_API_KEY else ""

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise UnknownModel(f"the model `{name}` is not served here; `{self.model_name}` is", param="model")

    def encode(
        self, text: str, *, add_special_tokens: bool, param: str, salt: str, any_length: bool = False
    ) -> list[int]:
        """Return the token ids of a prompt. Only prompts with an equal `salt` save each other time. Tokenising stops
        once the text is known to be too long. With `any_length` it may be longer than the model's context, up to
        `max_tokens_shown`. Raises `PromptTooLong`, and then `RequestError`."""
        if any_length:
            return self.encode_to_show([text], add_special_tokens=add_special_tokens, param=param)[0]
        return self._encode_within(self.limit(), text, add_special_tokens=add_special_tokens, param=param, salt=salt)

    def _encode_within(self, limit: Limit, text: str, *, add_special_tokens: bool, param: str, salt: str) -> list[int]:
        ids = self._encode_up_to(text, limit.most, add_special_tokens, salt)
        if ids is None:
            raise PromptTooLong(
                f"the prompt of {len(text)} characters has over {limit.most} tokens; this server holds {limit.text}",
                param=param,
            )
        return ids

    def encode_all(self, texts: Sequence[str], *, add_special_tokens: bool, param: str, salt: str) -> list[list[int]]:
        """Return the token ids of several prompts of one request. Raises `PromptTooLong` and `RequestError`."""
        found: list[list[int]] = []
        limit, num_tokens = self.limit(), 0
        for text in texts:
            ids = self._encode_within(limit, text, add_special_tokens=add_special_tokens, param=param, salt=salt)
            found.append(ids)
            num_tokens += len(found[-1])
            _check_job_tokens(num_tokens, limit, param)
        return found

    def encode_to_show(self, texts: Sequence[str], *, add_special_tokens: bool, param: str) -> list[list[int]]:
        """Return token ids for /tokenize, where a text may be longer than the model's context. Raises `RequestError`
        for texts over `max_tokens_shown`."""
        found: list[list[int]] = []
        limit = room = self.max_tokens_shown()
        for text in texts:
            ids = self._encode_up_to(text, room, add_special_tokens, None)
            room -= 0 if ids is None else len(ids)
            if ids is None or room < 0:
                raise RequestError(f"`{param}` has over {limit} tokens, which is the limit", param=param)
            found.append(ids)
        return found

    def _encode_up_to(self, text: str, max_tokens: int, add_special_tokens: bool, salt: str | None) -> list[int] | None:
        """Tokenise a text; with None as `salt`, nothing of it is looked up or remembered."""
        if len(text) > max_tokens * MAX_CHARS_PER_TOKEN:
            return None
        tokenizer = self.require_tokenizer()
        if salt is None or self.encoder is None:
            return encode_up_to(tokenizer, text, max_tokens, add_special_tokens=add_special_tokens)
        return self.encoder.encode_up_to(text, max_tokens, add_special_tokens=add_special_tokens, salt=salt)

    def check_job_tokens(self, num_tokens: int, param: str) -> None:
        """Raise `RequestError` when the prompts of one request, counted once for each answer, have too many tokens."""
        _check_job_tokens(num_tokens, self.limit(), param)

    def chat_prompt(
        self,
        messages: Sequence[ChatMessage],
        request: ChatRequest | TokenizeRequest | PromptRequest,
        tools: OfferedTools,
    ) -> str:
        """Render the messages and tools with the model's chat template and the template fields of the request. Raises
        `RequestError` that names the faulty message, and `PromptTooLong`."""
        options = template_options(request)
        if tools.for_template:
            options["tools"] = list(tools.for_template)
        tokenizer = self.require_tokenizer()
        template = tokenizer.chat_template
        if template is None:
            raise RequestError(tokenizer.no_chat_template_reason, param="messages")
        if not messages:
            raise RequestError("`messages` is empty", param="messages")
        limit = self.limit()
        max_chars = limit.most * MAX_CHARS_PER_TOKEN
        num_chars = sum(map(num_chars_of, messages))
        if num_chars > max_chars:
            raise PromptTooLong(
                f"the messages have {num_chars} characters; this server holds {limit.text}", param="messages"
            )
        plain = plain_messages(messages, tokenizer)
        continues = continues_text(request, messages[-1])
        return template.render(
            plain,
            add_generation_prompt=request.add_generation_prompt is not False and not continues,
            continue_final_message=continues,
            options=options,
            max_chars=max_chars,
        )


def _check_job_tokens(num_tokens: int, limit: Limit, param: str) -> None:
    most = max(_MAX_JOB_TOKENS, limit.most)
    if num_tokens > most:
        raise RequestError(
            f"the prompts of this request, counted once for each answer, have over {most} tokens: ask for fewer "
            "answers in one request",
            param=param,
        )

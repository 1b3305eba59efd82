"""Turns requests of /v1/chat/completions and /v1/completions into jobs (openai_format.py writes the responses)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from kvist.api.decoding import BodyDecoder
from kvist.api.schemas import ChatRequest, CompletionRequest
from kvist.checking.chat_constraint import after_reasoning, thinking_budget, with_calls
from kvist.checking.constraints import RequestedConstraint, requested_constraint
from kvist.checking.messages import unread_options
from kvist.checking.requested_logprobs import RequestedLogprobs, of_chat, of_completion
from kvist.checking.sampling import (
    FieldNames,
    check_seed,
    check_token_ids,
    num_choices,
    output_limit,
    shows_stop,
    token_lists,
)
from kvist.checking.tools import OfferedTools, offered_tools
from kvist.checking.truncation import check_truncation, truncated
from kvist.errors import RequestError
from kvist.fit import Limit
from kvist.http.asgi import Headers
from kvist.http.caller import Caller
from kvist.server.answer_parts import AnswerParsing
from kvist.server.gateway import GatewayContext
from kvist.server.generation import ChoiceState
from kvist.server.jobs import JobSpec, TokenizedPrompt, make_choices, new_job_id
from kvist.server.openai_format import AnswerFields, ChatFormat, CompletionFormat, Envelope
from kvist.server.respond import Job
from kvist.server.routing_fields import Routing, checked_routing, with_ignored
from kvist.text import Tokenizer

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_CHAT = BodyDecoder(ChatRequest)
_COMPLETION = BodyDecoder(CompletionRequest)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRun:
    """A chat that is ready to run: its answers, and how their texts are divided into parts."""

    job_id: str
    choices: Sequence[ChoiceState]
    parsing: AnswerParsing | None  # None: the whole text is content
    constraint: RequestedConstraint | None
    headers: Headers  # of the response


def chat_job(gateway: GatewayContext, caller: Caller, body: bytes) -> Job:
    """Build the job of a chat completion. Raises `RequestError` for an invalid field."""
    gateway.require_tokenizer()
    request, headers = _CHAT.decode(body)
    run = chat_run(gateway, caller, request, headers, new_job_id("chatcmpl"))
    envelope = Envelope.of(gateway, request, run.job_id, "chat.completion")
    fields = _answer_fields(request, logprobs=bool(request.logprobs))
    form = ChatFormat(envelope, gateway.require_tokenizer(), fields, parsing=run.parsing)
    stream = bool(request.stream)
    return Job(choices=run.choices, format=form, stream=stream, headers=run.headers, constraint=run.constraint)


def chat_run(
    gateway: GatewayContext,
    caller: Caller,
    request: ChatRequest,
    headers: Headers,
    job_id: str,
    *,
    fits_context: bool = False,
    named: Callable[[str], str] = str,
) -> ChatRun:
    """Render, tokenise and check a chat: the door for every API that is expressed as a chat. Each API writes the
    answers in its own form (`respond.Format`). With `fits_context` the answer is as long as `max_tokens` and the
    context allow; without, a `max_tokens` over the context is an error. `named` gives the client's name of a field to
    the header that names fields without effect. Raises `RequestError` for an invalid field."""
    tokenizer = gateway.require_tokenizer()
    gateway.check_model(request.model)
    logprobs = of_chat(request, gateway.vocab_size())
    tools = offered_tools(request, tokenizer)
    text = gateway.chat_prompt(request.messages, request, tools)
    parsing = AnswerParsing.of(request, tools, tokenizer, text)
    constraint = _chat_constraint(request, tools, tokenizer, text)
    routing, headers = checked_routing(gateway, caller, request, headers)
    assert tokenizer.chat_template is not None, "the prompt is rendered"
    headers = with_ignored(headers, [named(name) for name in unread_options(request, tokenizer.chat_template)])
    check_truncation(request)
    prompt_ids = gateway.encode(
        text,
        add_special_tokens=bool(request.add_special_tokens),
        param="messages",
        salt=routing.salt,
        any_length=request.truncate_prompt_tokens is not None,
    )
    default = gateway.sampling_defaults.max_new_tokens
    prompts = [_prompt(gateway.limit(), request, prompt_ids, default=default, fits_context=fits_context)]
    shown = parsing.formats.special_among(tokenizer.special_tokens) if parsing is not None else ()
    choices = _choices(gateway, request, caller, prompts, job_id, logprobs, routing, constraint, shown)
    return ChatRun(job_id=job_id, choices=choices, parsing=parsing, constraint=constraint, headers=headers)


def _chat_constraint(
    request: ChatRequest, tools: OfferedTools, tokenizer: Tokenizer, prompt: str
) -> RequestedConstraint | None:
    template = tokenizer.chat_template
    assert template is not None, "the prompt is rendered"
    constraint = requested_constraint(request, "")
    if tools.wanted is not None:
        constraint = with_calls(constraint, tools.wanted)
    return after_reasoning(constraint, template.formats.reasoning, prompt, thinking_budget(request, template.source))


def completion_job(gateway: GatewayContext, caller: Caller, body: bytes) -> Job:
    """Build the job of a completion. Raises `RequestError` for an invalid field."""
    tokenizer = gateway.require_tokenizer()
    request, headers = _COMPLETION.decode(body)
    gateway.check_model(request.model)
    logprobs = of_completion(request, gateway.vocab_size())
    constraint = requested_constraint(request, "")
    routing, headers = checked_routing(gateway, caller, request, headers)
    prompt_ids, limit = _prompt_token_ids(gateway, request, routing.salt), gateway.limit()
    prompts = [_prompt(limit, request, token_ids, default=_DEFAULT_COMPLETION_TOKENS) for token_ids in prompt_ids]
    job_id = new_job_id("cmpl")
    choices = _choices(gateway, request, caller, prompts, job_id, logprobs, routing, constraint)
    envelope = Envelope.of(gateway, request, job_id, "text_completion")
    fields = _answer_fields(request, logprobs=request.logprobs is not None)
    form = CompletionFormat(envelope, tokenizer, fields, echoes=_echoes(request, tokenizer, choices))
    return Job(choices=choices, format=form, stream=bool(request.stream), headers=headers, constraint=constraint)


def _answer_fields(request: ChatRequest | CompletionRequest, *, logprobs: bool) -> AnswerFields:
    token_ids, num_prompt_logprobs = bool(request.return_token_ids), request.prompt_logprobs
    return AnswerFields(logprobs=logprobs, token_ids=token_ids, num_prompt_logprobs=num_prompt_logprobs)


def _echoes(request: CompletionRequest, tokenizer: Tokenizer, choices: Sequence[ChoiceState]) -> list[str]:
    """Return the prompt of each choice as text, or [] when `echo` is off."""
    if not request.echo:
        return []
    texts = (
        [request.prompt] if isinstance(request.prompt, str) else [one for one in request.prompt if isinstance(one, str)]
    )
    if not texts:
        skip = request.skip_special_tokens is not False
        return [tokenizer.decode(choice.request.prompt_token_ids, skip_special_tokens=skip) for choice in choices]
    return [texts[choice.index * len(texts) // len(choices)] for choice in choices]


def _prompt_token_ids(gateway: GatewayContext, request: CompletionRequest, salt: str) -> list[list[int]]:
    """Return the token ids of every prompt. `prompt` is a text, a list of texts, token ids, or a list of lists of
    token ids; a mixture raises `RequestError`."""
    prompt, add_special_tokens = request.prompt, request.add_special_tokens is not False
    check_truncation(request)
    any_length = request.truncate_prompt_tokens is not None
    if any_length and request.echo:
        raise RequestError("`echo` shows the whole prompt: omit `truncate_prompt_tokens`", param="echo")
    encode = partial(gateway.encode, add_special_tokens=add_special_tokens, param="prompt", salt=salt)
    if isinstance(prompt, str):
        return [encode(prompt, any_length=any_length)]
    if not prompt:
        raise RequestError("`prompt` is an empty list", param="prompt")
    num_prompts = 1 if isinstance(prompt[0], int) else len(prompt)
    num_choices(request.n, num_prompts, gateway.config.max_choices, FieldNames(prompt="prompt"))
    found = token_lists(prompt)
    if found is None:
        texts = [item for item in prompt if isinstance(item, str)]
        if len(texts) < len(prompt):
            raise RequestError("`prompt` mixes texts, token ids and lists of token ids; use one kind", param="prompt")
        if any_length:
            return [encode(text, any_length=True) for text in texts]
        return gateway.encode_all(texts, add_special_tokens=add_special_tokens, param="prompt", salt=salt)
    vocab_size = gateway.vocab_size()
    for one in found:
        check_token_ids(one, vocab_size, "prompt")
    return found


def _prompt(
    limit: Limit,
    request: ChatRequest | CompletionRequest,
    token_ids: list[int],
    *,
    default: int | None,
    fits_context: bool = False,
) -> TokenizedPrompt:
    is_chat = isinstance(request, ChatRequest)
    asked, param = request.max_tokens, "max_tokens"
    if request.max_completion_tokens is not None:
        if asked is not None and asked != request.max_completion_tokens:
            raise RequestError("`max_tokens` and `max_completion_tokens` differ; set only one", param="max_tokens")
        asked, param = request.max_completion_tokens, "max_completion_tokens"
    token_ids = truncated(token_ids, request, limit.num_tokens - max(1 if asked is None else asked, 0))
    if fits_context and asked is not None:
        asked = min(asked, max(1, limit.num_tokens - len(token_ids)))
    max_tokens = output_limit(
        len(token_ids),
        limit,
        asked=asked,
        default=default,
        param=param,
        prompt="messages" if is_chat else "prompt",
        least=1 if is_chat else 0,
    )
    return TokenizedPrompt(token_ids=tuple(token_ids), max_tokens=max_tokens)


def _choices(
    gateway: GatewayContext,
    request: ChatRequest | CompletionRequest,
    caller: Caller,
    prompts: list[TokenizedPrompt],
    job_id: str,
    logprobs: RequestedLogprobs,
    routing: Routing,
    constraint: RequestedConstraint | None,
    shown_special: Collection[str] = (),
) -> list[ChoiceState]:
    asked = request.stream_options
    if asked is not None and not request.stream and (asked.include_usage or asked.continuous_usage_stats):
        raise RequestError("`stream_options` needs `stream` to be true", param="stream_options")
    spec = JobSpec(
        caller=caller,
        job_id=job_id,
        prompts=prompts,
        fields=request,
        names=FieldNames(prompt="messages" if isinstance(request, ChatRequest) else "prompt"),
        seed=check_seed(request.seed),
        routing=routing,
        min_tokens=request.min_tokens,
        logprobs=logprobs,
        constraint=constraint,
        defaults=gateway.sampling_defaults,
        keeps_logprobs=not request.stream,
        skip_special_tokens=request.skip_special_tokens is not False,
        include_stop_str_in_output=shows_stop(request),
        shown_special=shown_special,
    )
    return make_choices(gateway, spec)

"""SGLang's /generate: one or several prompts, as `text` or as `input_ids`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvist.api.decoding import BodyDecoder
from kvist.api.schemas import NativeRequest, NativeSampling
from kvist.checking.constraints import requested_constraint
from kvist.checking.requested_logprobs import of_native
from kvist.checking.sampling import (
    FieldNames,
    check_seed,
    check_shown_id,
    check_token_ids,
    num_choices,
    output_limit,
    shows_stop,
    token_lists,
)
from kvist.errors import KvistError, RequestError
from kvist.fit import Limit
from kvist.http.asgi import error_event
from kvist.http.caller import Caller
from kvist.request import TokenLogprobs
from kvist.server.config import StreamForm
from kvist.server.gateway import GatewayContext
from kvist.server.generation import ChoiceState, Delta
from kvist.server.jobs import JobSpec, TokenizedPrompt, make_choices, new_job_id
from kvist.server.logprobs import LogprobEntries
from kvist.server.reporting import kvist_field
from kvist.server.respond import Job
from kvist.server.routing_fields import checked_routing
from kvist.text import SamplingDefaults, Tokenizer

_DEFAULT_NEW_TOKENS = 128  # SGLang's
_NATIVE = BodyDecoder(NativeRequest)
_WHERE = "sampling_params."
_json = msgspec.json.Encoder().encode


def native_job(gateway: GatewayContext, caller: Caller, body: bytes) -> Job:
    """Build the job of a /generate request. Raises `RequestError` for an invalid field."""
    tokenizer = gateway.require_tokenizer()
    request, headers = _NATIVE.decode(body)
    gateway.check_model(request.model)
    fields = request.sampling_params or NativeSampling()
    routing, headers = checked_routing(gateway, caller, request, headers)
    token_lists, batched, param = _prompts(gateway, request, fields, routing.salt)
    limit = gateway.limit()
    prompts = [_limited(limit, fields, token_ids, param) for token_ids in token_lists]
    constraint = requested_constraint(fields, _WHERE)
    spec = JobSpec(
        caller=caller,
        job_id=new_job_id("gen"),
        prompts=prompts,
        fields=fields,
        names=_names(param),
        seed=check_seed(fields.sampling_seed, _WHERE + "sampling_seed"),
        routing=routing,
        min_tokens=fields.min_new_tokens,
        keeps_logprobs=not request.stream or gateway.config.stream_form is not StreamForm.INCREMENTAL,
        constraint=constraint,
        logprobs=of_native(request, token_lists, gateway.vocab_size()),
        defaults=SamplingDefaults(),  # as in SGLang: the model's defaults are for chats and completions only
        skip_special_tokens=fields.skip_special_tokens is not False,
        include_stop_str_in_output=shows_stop(fields, "sampling_params."),
    )
    choices = make_choices(gateway, spec)
    form = NativeFormat(
        several=batched or len(choices) > 1,
        logprobs=_logprob_entries(request, tokenizer),
        with_report=request.kvist is not None and bool(request.kvist.report),
        stream_form=gateway.config.stream_form,
        rid=check_shown_id(request.rid, "rid"),
    )
    return Job(choices=choices, format=form, stream=bool(request.stream), headers=headers, constraint=constraint)


def _logprob_entries(request: NativeRequest, tokenizer: Tokenizer) -> LogprobEntries | None:
    if not request.return_logprob:
        return None
    return LogprobEntries(tokenizer if request.return_text_in_logprobs else None)


def _prompts(
    gateway: GatewayContext, request: NativeRequest, fields: NativeSampling, salt: str
) -> tuple[list[list[int]], bool, str]:
    """Return the token ids of every prompt, whether the prompts came as a batch, and the name of their field."""
    if (request.text is None) == (request.input_ids is None):
        raise RequestError("set exactly one of `text` and `input_ids`", param="text")
    if request.text is not None:
        texts = [request.text] if isinstance(request.text, str) else request.text
        _require_some(texts, "text")
        num_choices(fields.n, len(texts), gateway.config.max_choices, _names("text"))
        return (
            gateway.encode_all(texts, add_special_tokens=True, param="text", salt=salt),
            not isinstance(request.text, str),
            "text",
        )
    ids = request.input_ids or []
    _require_some(ids, "input_ids")
    found = token_lists(ids)
    if found is None:
        raise RequestError("`input_ids` mixes token ids and lists of token ids", param="input_ids")
    num_choices(fields.n, len(found), gateway.config.max_choices, _names("input_ids"))
    vocab_size = gateway.vocab_size()
    for one in found:
        check_token_ids(one, vocab_size, "input_ids")
    return found, isinstance(ids[0], list), "input_ids"


def _names(prompt: str) -> FieldNames:
    return FieldNames(prompt=prompt, inside=_WHERE, max_tokens="max_new_tokens", min_tokens="min_new_tokens")


def _require_some(values: Sequence[object], param: str) -> None:
    if not values:
        raise RequestError(f"`{param}` is empty", param=param)


def _limited(limit: Limit, fields: NativeSampling, token_ids: list[int], param: str) -> TokenizedPrompt:
    max_tokens = output_limit(
        len(token_ids),
        limit,
        asked=fields.max_new_tokens,
        default=_DEFAULT_NEW_TOKENS,
        param=_WHERE + "max_new_tokens",
        prompt=param,
        least=0,
    )
    return TokenizedPrompt(token_ids=tuple(token_ids), max_tokens=max_tokens)


class NativeFormat:
    """Writes responses in SGLang's format.

    Each event has the whole text and all ids so far, as SGLang's clients expect. Logprobs are far larger, and repeating
    them would make the stream grow with the square of its length: an event has the logprobs of its new tokens, the
    first event those of the prompt, and the last event of a choice has all logprobs."""

    def __init__(
        self,
        *,
        several: bool,
        logprobs: LogprobEntries | None,
        with_report: bool,
        stream_form: StreamForm,
        rid: str | None,
    ):
        self._several = several
        self._logprobs = logprobs
        self._with_report = with_report
        self._stream_form = stream_form
        self._rid = rid
        self._begun: set[int] = set()  # choices that have an event already

    def event(self, choice: ChoiceState, delta: Delta) -> bytes:
        form, finished = self._stream_form, delta.finished
        first = choice.index not in self._begun
        self._begun.add(choice.index)
        if form is StreamForm.INCREMENTAL:
            answer = self._answer(
                choice, delta.text, delta.token_ids, delta.logprobs, finished=finished, with_input=first
            )
        else:
            is_all = form is StreamForm.CUMULATIVE or finished
            logprobs = choice.logprobs if is_all else delta.logprobs
            answer = self._answer(
                choice, choice.text, choice.token_ids, logprobs, finished=finished, with_input=first or is_all
            )
        return b"data: " + _json(answer) + b"\n\n"

    def closing(self, choices: Sequence[ChoiceState]) -> bytes:
        del choices  # the last event of each choice is complete
        return b"data: [DONE]\n\n"

    def failure(self, error: KvistError) -> bytes:
        return error_event(error)

    def whole(self, choices: Sequence[ChoiceState]) -> bytes:
        answers = [
            self._answer(one, one.text, one.token_ids, one.logprobs, finished=True, with_input=True) for one in choices
        ]
        return _json(answers if self._several else answers[0])

    def _answer(
        self,
        choice: ChoiceState,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        *,
        finished: bool,
        with_input: bool,
    ) -> dict[str, object]:
        """`logprobs` belong to the last tokens of `token_ids`. `finished` marks the last event of the choice. With
        several choices, a choice may be ahead of its events."""
        meta: dict[str, object] = {
            "id": self._id(choice),
            "finish_reason": _finish_reason(choice) if finished else None,
            "prompt_tokens": choice.request.num_prompt_tokens,
            "completion_tokens": len(choice.token_ids),
            "cached_tokens": choice.num_cached_tokens,
            "cached_tokens_details": choice.cached_by_tier,
        }
        if self._logprobs is not None:
            scored_ids = token_ids[len(token_ids) - len(logprobs) :]
            meta |= self._logprobs.input(choice) if with_input else {}
            meta |= self._logprobs.output(scored_ids, logprobs, choice.request.sampling)
        answer: dict[str, object] = {"text": text, "output_ids": token_ids, "meta_info": meta}
        if self._several:
            answer["index"] = choice.index
        if finished:
            answer |= kvist_field([choice], include_report=self._with_report)
        return answer

    def _id(self, choice: ChoiceState) -> str:
        if self._rid is None:
            return choice.request.request_id
        return f"{self._rid}_{choice.index}" if self._several else self._rid


def _finish_reason(choice: ChoiceState) -> dict[str, object]:
    if choice.matched is not None:
        return {"type": choice.finish_reason, "matched": choice.matched}
    return {"type": choice.finish_reason, "length": len(choice.token_ids)}

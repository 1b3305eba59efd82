"""Every request field of OpenAI, vLLM and SGLang that Kvist knows, each in one of three classes.

The class of a field is part of its type, and is declared nowhere else:

    Honoured   has the effect that its name promises
    Advisory   accepted without effect, and named in the response header `x-kvist-ignored`
    Refused    would change the answer and cannot be honoured: a 400 that names an alternative

`KnownFields` has the names of all endpoints, so that null is accepted for each of them everywhere. A request
(schemas.py) declares again, with a type, the fields that its endpoint honours. scripts/api_fields.py writes the table
in docs/api.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, get_args, get_type_hints

import msgspec


@dataclass(frozen=True, slots=True)
class Honoured:
    effect: str


@dataclass(frozen=True, slots=True)
class Advisory:
    reason: str
    neutral: tuple[object, ...] = ()  # values that, like null, have no effect and are not named in the header


@dataclass(frozen=True, slots=True)
class Refused:
    instead: str
    neutral: tuple[object, ...] = ()  # values that, like null, have no effect and are accepted


FieldClass = Honoured | Advisory | Refused

_BOTH, _OFF, _ON = (True, False), (False,), (True,)
_EMPTY: tuple[object, ...] = ([], {}, "")

# Alternatives to refused fields.
_TOOLS = "a field of /v1/chat/completions"
_OLD_TOOLS = "use `tools` and `tool_choice` of /v1/chat/completions"
_FORMAT = "a field of requests that generate; in /generate it is part of `sampling_params`"
_V1_FORMAT = "a field of /v1; in /generate use `json_schema`, `regex`, `ebnf` or `structural_tag` of `sampling_params`"
_NATIVE_FORMAT = 'in /v1 use `response_format` with the type "json_schema", or `structured_outputs`'
_WHOLE_ANSWER = "a constraint applies to the whole answer; omit this field"
_TEXT = "only text is supported; omit this field"
_BEAM = "beam search is not supported; `n` gives several sampled answers"
_LOGPROBS = "use `logprobs` and `prompt_logprobs` in /v1, `return_logprob` and `logprob_start_len` in /generate"
_LORA = "adapters are not supported yet; serve the merged model"
_TOKENS = "in /v1, `return_token_ids` returns token ids; /generate always returns them"
_ROUTING = "Kvist chooses prefill and decode workers itself; omit this field"
_INTERNAL = "the internal values of the model are not available; omit this field"
_PROCESSOR = (
    "logits processors are not supported; use `logit_bias`, penalties, or in /v1 `allowed_token_ids` and `bad_words`"
)
_THINKING = 'models that support it read `chat_template_kwargs`, often {"enable_thinking": false}'
_V1 = "a field of /v1/chat/completions and /v1/completions"
_SAMPLING = "a field of requests that generate; in /generate it is part of `sampling_params`"
_LIMIT = "use `max_tokens` in /v1, `sampling_params.max_new_tokens` in /generate"
_LEAST = "use `min_tokens` in /v1, `sampling_params.min_new_tokens` in /generate"
_SEED = "use `seed` in /v1, `sampling_params.sampling_seed` in /generate"

_MESSAGES = "a field of /v1/messages"
_RESPONSES = "a field of /v1/responses"

# Reasons why a field has no effect.
_LOCAL = "no records are kept"
_CACHING = "prefixes are always cached; `cache_salt` keeps callers apart"
_ROUTED = "the router assigns requests by cache and load"
_LOGGING = "options of the server control logging and metrics"


class KnownFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """All names. Type `object` accepts any JSON value; the class of the field decides its treatment."""

    model: Annotated[str | None, Honoured("must be the served model, or absent")] = None

    # -------- without effect on the answer
    user: Annotated[object, Advisory(_LOCAL)] = None
    metadata: Annotated[object, Advisory(_LOCAL, _EMPTY)] = None
    store: Annotated[object, Advisory(_LOCAL, _OFF)] = None
    safety_identifier: Annotated[object, Advisory(_LOCAL)] = None
    service_tier: Annotated[object, Advisory("there is one tier", ("default",))] = None
    moderation: Annotated[object, Advisory("nothing is moderated")] = None
    verbosity: Annotated[object, Advisory("no model served here has this setting", ("medium",))] = None
    prediction: Annotated[object, Advisory("a prediction would not change the answer")] = None
    prompt_cache_key: Annotated[object, Advisory(_CACHING)] = None
    prompt_cache_retention: Annotated[object, Advisory(_CACHING)] = None
    prompt_cache_options: Annotated[object, Advisory(_CACHING)] = None
    kv_hints: Annotated[object, Advisory(_CACHING, _EMPTY)] = None
    priority: Annotated[object, Advisory("a field of requests that generate", (0,))] = None
    session_id: Annotated[object, Advisory(_ROUTED)] = None
    conversation_id: Annotated[object, Advisory(_ROUTED)] = None
    routing_key: Annotated[object, Advisory(_ROUTED)] = None
    data_parallel_rank: Annotated[object, Advisory(_ROUTED)] = None
    routed_dp_rank: Annotated[object, Advisory(_ROUTED)] = None
    stream_interval: Annotated[object, Advisory("tokens are sent as they are generated", (1,))] = None
    log_metrics: Annotated[object, Advisory(_LOGGING, _ON)] = None
    no_logs: Annotated[object, Advisory(_LOGGING, _OFF)] = None
    custom_labels: Annotated[object, Advisory(_LOGGING, _EMPTY)] = None
    external_trace_header: Annotated[object, Advisory(_LOGGING, _EMPTY)] = None
    received_time: Annotated[object, Advisory(_LOGGING)] = None
    return_token_offsets: Annotated[object, Advisory("only a rendering endpoint would return this", _OFF)] = None
    return_mm_kwargs: Annotated[object, Advisory("only a rendering endpoint would return this", _BOTH)] = None
    spaces_between_special_tokens: Annotated[object, Advisory("no spaces are inserted between tokens", _BOTH)] = None
    guided_decoding_backend: Annotated[object, Advisory("the server's `--grammar-backend` is used")] = None
    truncation_side: Annotated[object, Advisory("this prompt is not truncated", ("left", "right"))] = None

    cache_control: Annotated[object, Advisory(_CACHING)] = None
    diagnostics: Annotated[object, Advisory(_LOCAL)] = None
    inference_geo: Annotated[object, Advisory("there is one place", ("global",))] = None
    speed: Annotated[object, Advisory("there is one speed", ("standard",))] = None
    user_profile_id: Annotated[object, Advisory(_LOCAL)] = None
    workspace_id: Annotated[object, Advisory(_LOCAL)] = None
    access_programs: Annotated[object, Advisory(_LOCAL)] = None
    fallbacks: Annotated[object, Advisory("one model is served", ([], {}))] = None
    fallback_credit_token: Annotated[object, Advisory("one model is served")] = None
    billing_policy: Annotated[object, Advisory("nothing is billed")] = None
    context_management: Annotated[object, Advisory("conversations are used as they are sent", ([], {}))] = None
    compaction: Annotated[object, Advisory("conversations are used as they are sent", ({},))] = None
    background_options: Annotated[object, Advisory("responses in the background have no options", ({},))] = None
    max_tool_calls: Annotated[object, Advisory("no tools run in the server")] = None

    # -------- tools
    tools: Annotated[object, Refused(_TOOLS, ([],))] = None
    tool_choice: Annotated[object, Refused(_TOOLS, ("none", "auto"))] = None
    parallel_tool_calls: Annotated[object, Refused(_TOOLS, _BOTH)] = None
    functions: Annotated[object, Refused(_OLD_TOOLS, ([],))] = None
    function_call: Annotated[object, Refused(_OLD_TOOLS, ("none", "auto"))] = None
    mcp_servers: Annotated[object, Refused("no tools run in the server; send them as `tools`", ([],))] = None
    container: Annotated[object, Refused("no code runs in the server; omit this field")] = None
    web_search_options: Annotated[object, Refused("web search is not supported; omit this field")] = None

    # -------- the form of the answer
    response_format: Annotated[object, Refused(_V1_FORMAT, ({"type": "text"},))] = None
    structured_outputs: Annotated[object, Refused(_V1_FORMAT, ({},))] = None
    guided_json: Annotated[object, Refused(_V1_FORMAT)] = None
    guided_regex: Annotated[object, Refused(_V1_FORMAT, _EMPTY)] = None
    guided_choice: Annotated[object, Refused(_V1_FORMAT, ([],))] = None
    guided_grammar: Annotated[object, Refused(_V1_FORMAT, _EMPTY)] = None
    guided_whitespace_pattern: Annotated[object, Refused(_V1_FORMAT, _EMPTY)] = None
    output_config: Annotated[object, Refused(_MESSAGES, ({},))] = None
    output_format: Annotated[object, Refused("use `output_config.format` of /v1/messages", ({},))] = None
    json_schema: Annotated[object, Refused(_NATIVE_FORMAT, ("",))] = None
    regex: Annotated[object, Refused(_FORMAT, _EMPTY)] = None
    ebnf: Annotated[object, Refused(_FORMAT, _EMPTY)] = None
    ebnf_full_assistant: Annotated[object, Refused(_WHOLE_ANSWER, _OFF)] = None
    structural_tag: Annotated[object, Refused(_FORMAT, _EMPTY)] = None

    # -------- how tokens are chosen
    frequency_penalty: Annotated[object, Refused(_SAMPLING, (0,))] = None
    presence_penalty: Annotated[object, Refused(_SAMPLING, (0,))] = None
    repetition_penalty: Annotated[object, Refused(_SAMPLING, (1,))] = None
    repetition_detection: Annotated[object, Refused("`max_tokens` bounds an answer that repeats itself", ({},))] = None
    logit_bias: Annotated[object, Refused(_SAMPLING, ({},))] = None
    allowed_token_ids: Annotated[object, Refused(_V1)] = None
    bad_words: Annotated[object, Refused(_V1, ([],))] = None
    logits_processors: Annotated[object, Refused(_PROCESSOR, ([],))] = None
    custom_logit_processor: Annotated[object, Refused(_PROCESSOR, ("",))] = None
    custom_params: Annotated[object, Refused(_PROCESSOR, ({},))] = None
    vllm_xargs: Annotated[object, Refused(_PROCESSOR, ({},))] = None
    watermark: Annotated[object, Refused("answers are not watermarked; omit this field", (False, {}))] = None
    watermarking: Annotated[object, Refused("answers are not watermarked; omit this field", _OFF)] = None
    use_beam_search: Annotated[object, Refused(_BEAM, _OFF)] = None
    beam_width: Annotated[object, Refused(_BEAM, (1,))] = None
    best_of: Annotated[object, Refused(_BEAM, (1,))] = None
    length_penalty: Annotated[object, Refused(_BEAM, (1,))] = None
    early_stopping: Annotated[object, Refused(_BEAM, _OFF)] = None
    stop_regex: Annotated[object, Refused("`stop` takes strings, `stop_token_ids` tokens", _EMPTY)] = None

    # -------- reasoning
    reasoning_effort: Annotated[object, Refused("a field of requests with `messages`")] = None
    thinking: Annotated[object, Refused(_THINKING, ({},))] = None
    thinking_token_budget: Annotated[object, Refused(_TOOLS, (-1,))] = None
    thinking_budget: Annotated[object, Refused(_TOOLS, (-1,))] = None
    max_thinking_tokens: Annotated[object, Refused(_TOOLS, (-1,))] = None
    include_reasoning: Annotated[object, Refused("reasoning is part of the text here", _ON)] = None
    separate_reasoning: Annotated[object, Advisory("reasoning is part of the text here", _BOTH)] = None
    stream_reasoning: Annotated[object, Advisory("reasoning is streamed as it is generated", _ON)] = None
    require_reasoning: Annotated[object, Refused(_WHOLE_ANSWER, _OFF)] = None

    # -------- the prompt
    suffix: Annotated[object, Refused("write the prompt with the model's own fill-in-the-middle tokens", ("",))] = None
    documents: Annotated[object, Refused("write the documents into the messages", ([],))] = None
    task: Annotated[object, Refused("write the task into the messages")] = None
    chat_template: Annotated[object, Refused("the server's template is used: `kvist serve --chat-template`")] = None
    truncate_prompt_tokens: Annotated[object, Refused(_V1)] = None
    session_params: Annotated[
        object, Refused("send the whole prompt; a cached prefix is not computed again", ({},))
    ] = None
    extra_key: Annotated[object, Refused("`cache_salt` keeps cached prefixes apart", ("",))] = None
    input_embeds: Annotated[object, Refused("send a text or token ids", ([],))] = None
    prompt_embeds: Annotated[object, Refused("send a text or token ids", ([], ""))] = None
    positional_embed_overrides: Annotated[object, Refused("send a text or token ids", ([],))] = None
    multi_item_delimiter_indices: Annotated[object, Refused("send one request for each item", ([],))] = None
    token_indices_to_pool: Annotated[object, Refused(_INTERNAL, ([],))] = None

    thread: Annotated[object, Refused("threads are not stored; send all messages")] = None
    conversation: Annotated[
        object, Refused("conversations are not stored; `previous_response_id` of /v1/responses continues a response")
    ] = None

    # -------- other media
    modalities: Annotated[object, Refused(_TEXT, (["text"], []))] = None
    audio: Annotated[object, Refused(_TEXT)] = None
    image: Annotated[object, Refused(_TEXT)] = None
    image_data: Annotated[object, Refused(_TEXT, ([],))] = None
    audio_data: Annotated[object, Refused(_TEXT, ([],))] = None
    video_data: Annotated[object, Refused(_TEXT, ([],))] = None
    mm_hashes: Annotated[object, Refused(_TEXT, ([],))] = None
    mm_content_hashes: Annotated[object, Refused(_TEXT, ([],))] = None
    mm_processor_kwargs: Annotated[object, Refused(_TEXT, ({},))] = None
    media_io_kwargs: Annotated[object, Refused(_TEXT, ({},))] = None
    images_config: Annotated[object, Refused(_TEXT, ({},))] = None
    video_config: Annotated[object, Refused(_TEXT, ({},))] = None
    use_audio_in_video: Annotated[object, Refused(_TEXT, _OFF)] = None
    max_dynamic_patch: Annotated[object, Refused(_TEXT)] = None
    min_dynamic_patch: Annotated[object, Refused(_TEXT)] = None
    image_max_dynamic_patch: Annotated[object, Refused(_TEXT)] = None
    video_max_dynamic_patch: Annotated[object, Refused(_TEXT)] = None
    need_wait_for_mm_inputs: Annotated[object, Refused(_TEXT, _OFF)] = None
    num_items_assigned: Annotated[object, Refused(_TEXT, ({},))] = None
    encoder_urls: Annotated[object, Refused(_TEXT, ([],))] = None

    # -------- more in the response
    prompt_logprobs: Annotated[object, Refused(_LOGPROBS)] = None
    logprob_start_len: Annotated[object, Refused(_LOGPROBS, (-1,))] = None
    logprob_token_ids: Annotated[object, Refused(_LOGPROBS, ([],))] = None
    token_ids_logprob: Annotated[object, Refused(_LOGPROBS, ([],))] = None
    return_tokens_as_token_ids: Annotated[object, Refused(_TOKENS, _OFF)] = None
    return_text_in_logprobs: Annotated[object, Refused("logprobs have texts already", _OFF)] = None
    return_prompt_token_ids: Annotated[object, Refused(_TOKENS, _OFF)] = None
    return_input_ids_in_sglext: Annotated[object, Refused(_TOKENS, _OFF)] = None
    return_output_ids_in_sglext: Annotated[object, Refused(_TOKENS, _OFF)] = None
    return_prompt_text: Annotated[object, Refused("/tokenize and /detokenize show the rendered prompt", _OFF)] = None
    return_meta_info: Annotated[object, Refused("`kvist.report` reports how a request was served", _OFF)] = None
    return_cached_tokens_details: Annotated[object, Refused("`kvist.usage` adds the details", _OFF)] = None
    return_spec_tokens_details: Annotated[object, Refused(_INTERNAL, _OFF)] = None
    return_hidden_states: Annotated[object, Refused(_INTERNAL, _OFF)] = None
    return_routed_experts: Annotated[object, Refused(_INTERNAL, _OFF)] = None
    routed_experts_start_len: Annotated[object, Refused(_INTERNAL, (0,))] = None
    routed_experts_prompt_start: Annotated[object, Refused(_INTERNAL, (0,))] = None
    return_indexer_topk: Annotated[object, Refused(_INTERNAL, _OFF)] = None
    return_sampling_mask: Annotated[object, Refused(_INTERNAL, _OFF)] = None
    sampling_logprobs_mode: Annotated[object, Refused(_INTERNAL)] = None
    return_entropy: Annotated[object, Refused(_INTERNAL, _OFF)] = None
    return_flat_raw_top_logprobs: Annotated[object, Refused(_LOGPROBS, _OFF)] = None
    return_flat_raw_output_top_logprobs: Annotated[object, Refused(_LOGPROBS, _OFF)] = None
    return_flat_raw_top_logprobs_b64: Annotated[object, Refused(_LOGPROBS, _BOTH)] = None
    return_bytes: Annotated[object, Refused("responses are JSON; omit this field", _OFF)] = None
    detokenize: Annotated[object, Refused("the text is always returned; omit this field", _ON)] = None
    background: Annotated[object, Refused("wait for the answer, or stream it", _OFF)] = None

    # -------- adapters, routing
    lora_path: Annotated[object, Refused(_LORA, ([], ""))] = None
    lora_id: Annotated[object, Refused(_LORA, ([], ""))] = None
    kv_transfer_params: Annotated[object, Refused(_ROUTING, ({},))] = None
    ec_transfer_params: Annotated[object, Refused(_ROUTING, ({},))] = None
    bootstrap_host: Annotated[object, Refused(_ROUTING)] = None
    bootstrap_port: Annotated[object, Refused(_ROUTING)] = None
    bootstrap_room: Annotated[object, Refused(_ROUTING)] = None
    bootstrap_pair_key: Annotated[object, Refused(_ROUTING)] = None
    decode_tp_size: Annotated[object, Refused(_ROUTING)] = None
    disagg_prefill_dp_rank: Annotated[object, Refused(_ROUTING)] = None
    http_worker_ipc: Annotated[object, Refused(_ROUTING)] = None

    # -------- honoured at some endpoints (schemas.py), refused at the others
    messages: Annotated[object, Refused("a field of /v1/chat/completions and /v1/messages")] = None
    system: Annotated[object, Refused(f"{_MESSAGES}; in chats it is a message with the role system", ("", []))] = None
    input: Annotated[object, Refused(_RESPONSES)] = None
    instructions: Annotated[object, Refused(f"{_RESPONSES}; in chats it is a message with the role system")] = None
    previous_response_id: Annotated[object, Refused(f"{_RESPONSES}; elsewhere, send all messages")] = None
    reasoning: Annotated[object, Refused(f"{_RESPONSES}; chats have `reasoning_effort`", ({},))] = None
    include: Annotated[object, Refused(_RESPONSES, ([],))] = None
    truncation: Annotated[object, Refused("shorten the prompt; /tokenize counts its tokens", ("disabled",))] = None
    prompt: Annotated[object, Refused("a field of requests that take one as it is; a chat has `messages`")] = None
    text: Annotated[object, Refused("a field of /generate; the prompt is `prompt` or `messages` here")] = None
    input_ids: Annotated[object, Refused("a field of /generate; /v1/completions takes ids as `prompt`")] = None
    tokens: Annotated[object, Refused("a field of /detokenize")] = None
    sampling_params: Annotated[object, Refused("put its fields directly into the body", ({},))] = None
    n: Annotated[object, Refused(_SAMPLING, (1,))] = None
    temperature: Annotated[object, Refused(_SAMPLING)] = None
    top_p: Annotated[object, Refused(_SAMPLING)] = None
    top_k: Annotated[object, Refused(_SAMPLING)] = None
    min_p: Annotated[object, Refused(_SAMPLING)] = None
    stop: Annotated[object, Refused(_SAMPLING, ([],))] = None
    stop_sequences: Annotated[object, Refused(f"{_MESSAGES}; elsewhere, use `stop`", ([],))] = None
    stop_token_ids: Annotated[object, Refused(_SAMPLING, ([],))] = None
    ignore_eos: Annotated[object, Refused(_SAMPLING, _OFF)] = None
    skip_special_tokens: Annotated[object, Refused(_SAMPLING, _ON)] = None
    include_stop_str_in_output: Annotated[object, Refused(_SAMPLING, _OFF)] = None
    no_stop_trim: Annotated[object, Refused(_SAMPLING, _OFF)] = None
    max_tokens: Annotated[object, Refused(_LIMIT)] = None
    max_completion_tokens: Annotated[object, Refused(_LIMIT)] = None
    max_new_tokens: Annotated[object, Refused(_LIMIT)] = None
    max_output_tokens: Annotated[object, Refused(f"{_RESPONSES}; {_LIMIT}")] = None
    min_tokens: Annotated[object, Refused(_LEAST, (0,))] = None
    min_new_tokens: Annotated[object, Refused(_LEAST, (0,))] = None
    seed: Annotated[object, Refused(_SEED)] = None
    sampling_seed: Annotated[object, Refused(_SEED)] = None
    stream: Annotated[object, Refused("nothing is streamed here", _OFF)] = None
    stream_options: Annotated[object, Refused(_V1, ({},))] = None
    logprobs: Annotated[object, Refused(_LOGPROBS, _OFF)] = None
    top_logprobs: Annotated[object, Refused("a field of chats; /v1/completions has `logprobs`", (0,))] = None
    return_logprob: Annotated[object, Refused(_LOGPROBS, _OFF)] = None
    top_logprobs_num: Annotated[object, Refused(_LOGPROBS, (0,))] = None
    return_token_ids: Annotated[object, Refused(_TOKENS, _OFF)] = None
    echo: Annotated[object, Refused("a field of /v1/completions", _OFF)] = None
    rid: Annotated[object, Refused("a field of requests that generate")] = None
    request_id: Annotated[object, Refused("a field of requests that generate")] = None
    cache_salt: Annotated[object, Refused("a field of requests that compute a prompt", ("",))] = None
    kvist: Annotated[object, Refused("a field of requests that compute a prompt", ({},))] = None
    continuations: Annotated[object, Refused("a field of /v1/continuations/score")] = None
    unconditional: Annotated[object, Refused("a field of /v1/continuations/score", _OFF)] = None
    ttl_s: Annotated[object, Refused("a field of /v1/leases")] = None
    chat_template_kwargs: Annotated[object, Refused("a field of requests with `messages`", ({},))] = None
    add_generation_prompt: Annotated[object, Refused("a field of requests with `messages`", _ON)] = None
    continue_final_message: Annotated[object, Refused("a field of requests with `messages`", _OFF)] = None
    add_special_tokens: Annotated[object, Refused("a field of requests with `prompt` or `messages`")] = None
    return_token_strs: Annotated[object, Refused("a field of /tokenize", _OFF)] = None


def field_class(annotation: object) -> FieldClass | None:
    return next((note for note in get_args(annotation)[1:] if isinstance(note, FieldClass)), None)


@cache
def classes_of(struct: type[msgspec.Struct]) -> dict[str, FieldClass]:
    """Return the class of each field, in the struct's order. A test checks that every field has a class."""
    hints = get_type_hints(struct, include_extras=True)
    found = {name: field_class(hints[name]) for name in struct.__struct_fields__}
    return {name: given for name, given in found.items() if given is not None}


class UnmetFieldFinder:
    """Finds the fields of a request that are set and not honoured. Built once for each struct."""

    def __init__(self, struct: type[msgspec.Struct]) -> None:
        self._not_honoured = [(name, cls) for name, cls in classes_of(struct).items() if not isinstance(cls, Honoured)]
        self._absent = (None,) * len(self._not_honoured)
        names = [name for name, _ in self._not_honoured]
        self._values: Any = attrgetter(*names) if len(names) > 1 else None

    def find(self, value: msgspec.Struct) -> list[tuple[str, Advisory | Refused]]:
        """Return the fields of `value` that ask for an effect and do not get it."""
        if self._values is None:
            values: tuple[object, ...] = tuple(getattr(value, name) for name, _ in self._not_honoured)
        else:
            values = self._values(value)
        if values == self._absent:  # the usual case
            return []
        pairs = zip(self._not_honoured, values, strict=True)
        return [
            (name, cls)
            for (name, cls), given in pairs
            if given is not None and _without_nulls(given) not in cls.neutral
        ]


def _without_nulls(given: object) -> object:
    """Drop null fields of an object: clients send null for the fields that they do not set."""
    if not isinstance(given, dict):
        return given
    return {name: value for name, value in given.items() if value is not None}

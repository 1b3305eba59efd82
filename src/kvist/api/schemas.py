"""Requests, endpoint by endpoint: the fields that each endpoint honours, with their types.

Names are OpenAI's, then vLLM's and SGLang's where OpenAI has none. Every request knows all names of fields.py; a field
that a request does not declare here is advisory or refused as fields.py says. Null is always the same as absent.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvist.api.fields import Advisory, Honoured, KnownFields, Refused
from kvist.request import MAX_BAD_WORDS, MAX_LOGIT_BIAS

StopTokenIds = Annotated[list[int], msgspec.Meta(max_length=256)]  # each id is compared with every token
TokenIds = Annotated[list[int], msgspec.Meta(max_length=1024)]  # each token of an answer has a logprob of each of them
TemplateNames = Annotated[dict[str, object], msgspec.Meta(max_length=64)]
TemplateOptions = Annotated[TemplateNames | None, Honoured("variables for the chat template; any JSON")]
AddGenerationPrompt = Annotated[bool | None, Honoured("default true: the assistant's turn is opened")]
ContinueFinalMessage = Annotated[bool | None, Honoured("the answer continues the last message")]
Salt = Annotated[str | None, Honoured("prompts with different salts share no cached page; at most 256 bytes")]
Session = Annotated[
    str | int | None,
    Honoured(
        "names requests with a common prefix: of workers that are about equal, the router prefers the one that served "
        "the last of them; `session_id` comes before `prompt_cache_key`, and both come before the headers "
        "`X-Session-Id` and `X-SMG-Routing-Key`; at most 256 bytes"
    ),
]
Priority = Annotated[
    int | None,
    Honoured(
        "a lower value is served earlier, and negative ones are allowed; default 0. Without effect, and named in the "
        "header, unless the workers have `--scheduling-policy priority`"
    ),
]
MAX_CONTINUATION_TOKENS = 4096
Continuations = Annotated[list[str | list[int]], msgspec.Meta(min_length=1)]
_USE_TOOLS = "use `tools` of the request, `tool_calls` of messages, and messages with the role tool"
_NO_MEDIA = "only text is supported"
_LITELLM = "LiteLLM adds this; OpenAI's fields are used"


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    include_usage: Annotated[bool | None, Honoured("one more event with the usage of the whole request")] = None
    continuous_usage_stats: Annotated[bool | None, Honoured("every event has the usage so far")] = None
    include_obfuscation: Annotated[object, Advisory("events are not padded", (False,))] = None


class PlaceOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`kvist` of requests that generate nothing."""

    worker: Annotated[
        str | None,
        Honoured(
            "URL or id of the worker that serves the request; while it cannot, another worker does. The header "
            "`x-kvist-ignored` names the field if there is no such worker"
        ),
    ] = None
    role: Annotated[
        str | None,
        Honoured(
            '"prefill", "decode" or "unified": only workers of this role serve the request (decode: alone; prefill: '
            "with a decode worker that writes the answer, or alone where the answer is short and that costs less); "
            "while none can, other workers do"
        ),
    ] = None


class KvistOptions(PlaceOptions, forbid_unknown_fields=True, kw_only=True):
    report: Annotated[bool | None, Honoured("report the workers that served the request, and the handoff")] = None
    usage: Annotated[
        bool | None, Honoured("report in `usage` which tiers the cached tokens came from; /generate always does")
    ] = None


class JsonSchemaFormat(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[str | None, Advisory("the name is not shown to the model")] = None
    description: Annotated[str | None, Advisory("the description is not shown to the model")] = None
    schema: Annotated[object, Honoured("the JSON schema that the answer satisfies; absent: any JSON object")] = None
    strict: Annotated[
        bool | None,
        Honoured("true: a schema that cannot be enforced completely is refused; else such parts are ignored"),
    ] = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Annotated[str, Honoured('"text", "json_object", "json_schema" or "structural_tag"')]
    json_schema: Annotated[JsonSchemaFormat | None, Honoured("see `response_format.json_schema.*`")] = None
    structures: Annotated[list[object] | None, Honoured("of a structural tag: begin, schema and end of each")] = None
    triggers: Annotated[list[str] | None, Honoured("of a structural tag: the texts with which tags begin")] = None
    format: Annotated[object, Honoured("of a structural tag, in its newer form")] = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """vLLM's `structured_outputs`: one of the first six."""

    json: Annotated[object, Honoured("a JSON schema, as an object or as text")] = None
    regex: Annotated[str | None, Honoured("a regular expression that the whole answer matches")] = None
    choice: Annotated[list[str] | None, Honoured("the answer is one of these texts")] = None
    grammar: Annotated[str | None, Honoured("a grammar in Lark's notation, or EBNF with `root ::=`")] = None
    json_object: Annotated[bool | None, Honoured("any JSON object")] = None
    structural_tag: Annotated[object, Honoured("a structural tag, as an object or as text")] = None
    disable_any_whitespace: Annotated[bool | None, Honoured("JSON without blanks between its tokens")] = None
    whitespace_pattern: Annotated[
        str | None, Honoured("regular expression of the blanks between the tokens of JSON")
    ] = None
    disable_fallback: Annotated[object, Advisory("there is no fallback", (False, True))] = None
    disable_additional_properties: Annotated[
        object, Refused("set `additionalProperties` to false in the schema", (False,))
    ] = None


class ContentPart(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Annotated[str, Honoured('"text"')]
    text: Annotated[str | None, Honoured("several parts are joined with newlines")] = None
    cache_control: Annotated[object, Advisory("prefixes are always cached")] = None
    prompt_cache_breakpoint: Annotated[object, Advisory("prefixes are always cached")] = None
    annotations: Annotated[object, Advisory("only the text is used", ([],))] = None
    image_url: Annotated[object, Refused(_NO_MEDIA)] = None
    input_audio: Annotated[object, Refused(_NO_MEDIA)] = None
    audio_url: Annotated[object, Refused(_NO_MEDIA)] = None
    video_url: Annotated[object, Refused(_NO_MEDIA)] = None
    file: Annotated[object, Refused(_NO_MEDIA)] = None
    refusal: Annotated[object, Refused("write it as text")] = None


class CalledFunction(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[str, Honoured("passed to the chat template")]
    arguments: Annotated[str, Honoured("a JSON object, written as a text; passed to the chat template")]
    parsed_arguments: Annotated[object, Advisory("OpenAI's client adds this; `arguments` is used")] = None
    provider_specific_fields: Annotated[object, Advisory(_LITELLM)] = None


class ToolCall(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    id: Annotated[str, Honoured("names the call for its result")]
    type: Annotated[str, Honoured('"function"')] = "function"
    function: Annotated[CalledFunction, Honoured("see `messages[].tool_calls[].function.*`")]
    index: Annotated[object, Advisory("calls are numbered by their order")] = None
    provider_specific_fields: Annotated[object, Advisory(_LITELLM)] = None


Strict = Annotated[
    bool | None,
    Honoured("true: the arguments of every call satisfy the schema, and a schema that cannot be enforced is refused"),
]


class ToolFunction(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[str, Honoured("names the function; no two tools have one name")]
    description: Annotated[str | None, Honoured("passed to the chat template")] = None
    parameters: Annotated[
        dict[str, object] | None, Honoured("JSON Schema, passed to the chat template; gives arguments their types")
    ] = None
    strict: Strict = None


class Tool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Annotated[str, Honoured('"function"')]
    function: Annotated[ToolFunction | None, Honoured("see `tools[].function.*`")] = None
    cache_control: Annotated[object, Advisory("prefixes are always cached")] = None
    custom: Annotated[object, Refused('only tools of the type "function" are supported')] = None


Tools = Annotated[
    Annotated[list[Tool], msgspec.Meta(max_length=1024)] | None,
    Honoured("functions that the answer may call, up to 1024; see `tools[].*` and [tools](tools.md)"),
]
ToolChoice = Annotated[
    object,
    Honoured(
        '"auto" (default with tools); "none": the model sees no tools; "required": the answer consists of calls; a '
        "function: it calls this one; `allowed_tools`: it calls only these, with the mode auto or required"
    ),
]


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    role: Annotated[str, Honoured("system, developer (as system), user, assistant or tool")]
    content: Annotated[
        str | list[ContentPart] | None,
        Honoured("text, or a list of text parts; null is an empty text, for assistants only"),
    ] = None
    name: Annotated[str | None, Honoured("passed to the chat template")] = None
    reasoning: Annotated[str | None, Honoured("passed to the chat template, also as `reasoning_content`")] = None
    reasoning_content: Annotated[str | None, Honoured("passed to the chat template, also as `reasoning`")] = None
    annotations: Annotated[object, Advisory("only the text is used", ([],))] = None
    cache_control: Annotated[object, Advisory("prefixes are always cached")] = None
    parsed: Annotated[object, Advisory("OpenAI's client adds this; `content` is used")] = None
    provider_specific_fields: Annotated[object, Advisory(_LITELLM)] = None
    thinking_blocks: Annotated[object, Advisory("LiteLLM adds this; `reasoning_content` is used", ([],))] = None
    phase: Annotated[object, Advisory("no model served here has phases")] = None
    tool_calls: Annotated[list[ToolCall] | None, Honoured("calls of an assistant; see `messages[].tool_calls[].*`")] = (
        None
    )
    tool_call_id: Annotated[str | None, Honoured("with the role tool: the call that has this result")] = None
    tools: Annotated[object, Refused(_USE_TOOLS, ([],))] = None
    function_call: Annotated[object, Refused(_USE_TOOLS)] = None
    refusal: Annotated[object, Refused("write it as `content`", ("",))] = None
    audio: Annotated[object, Refused(_NO_MEDIA)] = None
    prefix: Annotated[object, Refused("use `continue_final_message` of the request", (False,))] = None


# The time of a template may grow with the square of the number of messages.
Messages = Annotated[list[ChatMessage], msgspec.Meta(max_length=4096)]


class Randomness(KnownFields, forbid_unknown_fields=True, kw_only=True):
    """The fields of every API that generates: how a token is drawn."""

    temperature: Annotated[float | None, Honoured("below 0.00001: greedy; over 2 is allowed")] = None
    top_p: Annotated[float | None, Honoured("0: the likeliest token alone")] = None
    top_k: Annotated[int | None, Honoured("0 and -1: off")] = None
    min_p: Annotated[float | None, Honoured("0: off")] = None


class SamplingFields(Randomness, forbid_unknown_fields=True, kw_only=True):
    """The fields that OpenAI's requests and SGLang's `sampling_params` have in common."""

    n: Annotated[int | None, Honoured("number of answers to each prompt; each answer has the next seed")] = None
    stop: Annotated[str | list[str] | None, Honoured("up to 16 strings")] = None
    stop_token_ids: Annotated[StopTokenIds | None, Honoured("tokens that end the answer, up to 256")] = None
    ignore_eos: Annotated[bool | None, Honoured("end-of-sequence tokens do not end the answer")] = None
    skip_special_tokens: Annotated[bool | None, Honoured("false: the text shows special tokens")] = None
    include_stop_str_in_output: Annotated[bool | None, Honoured("the text ends with the stop string or stop token")] = (
        None
    )
    no_stop_trim: Annotated[bool | None, Honoured("the same as `include_stop_str_in_output`")] = None
    frequency_penalty: Annotated[
        float | None, Honoured("-2 to 2: subtracted from a token's logit for each time that the answer has the token")
    ] = None
    presence_penalty: Annotated[
        float | None, Honoured("-2 to 2: subtracted once from the logit of each token that the answer has")
    ] = None
    repetition_penalty: Annotated[
        float | None, Honoured("0.01 to 100, 1 is off: over 1 makes tokens of the prompt and of the answer less likely")
    ] = None
    logit_bias: Annotated[
        dict[str, float] | None,
        Honoured(f"token id (as a string) to -100 to 100, added to its logit; up to {MAX_LOGIT_BIAS} ids"),
    ] = None


class Constraints(KnownFields, forbid_unknown_fields=True, kw_only=True):
    """SGLang's constraints, of which a request has one."""

    regex: Annotated[str | None, Honoured("a regular expression that the whole answer matches")] = None
    ebnf: Annotated[str | None, Honoured("a grammar of the answer: EBNF with `root ::=`, or Lark's notation")] = None
    structural_tag: Annotated[object, Honoured("a structural tag, as an object or as text")] = None


class Generation(SamplingFields, Constraints, forbid_unknown_fields=True, kw_only=True):
    """The fields that both OpenAI endpoints share."""

    max_tokens: Annotated[
        int | None, Honoured("maximum number of tokens of the answer; in completions 0 computes the prompt alone")
    ] = None
    max_completion_tokens: Annotated[int | None, Honoured("the same as `max_tokens`")] = None
    min_tokens: Annotated[int | None, Honoured("minimum number of tokens before the answer may end")] = None
    allowed_token_ids: Annotated[list[int] | None, Honoured("only these tokens are sampled")] = None
    bad_words: Annotated[
        list[str] | None,
        Honoured(f"up to {MAX_BAD_WORDS // 2} words that the answer does not have, at its start or after a space"),
    ] = None
    prompt_logprobs: Annotated[
        int | None,
        Honoured("logprobs of the prompt's tokens, and 0 to 20 of the likeliest; without `stream`"),
    ] = None
    logprob_token_ids: Annotated[
        TokenIds | None, Honoured("up to 1024 tokens that are listed, too, beside the likeliest of each token")
    ] = None
    response_format: Annotated[ResponseFormat | None, Honoured("see `response_format.*`")] = None
    structured_outputs: Annotated[StructuredOutputs | None, Honoured("see `structured_outputs.*`")] = None
    guided_json: Annotated[object, Honoured("the same as `structured_outputs.json`")] = None
    guided_regex: Annotated[str | None, Honoured("the same as `structured_outputs.regex`")] = None
    guided_choice: Annotated[list[str] | None, Honoured("the same as `structured_outputs.choice`")] = None
    guided_grammar: Annotated[str | None, Honoured("the same as `structured_outputs.grammar`")] = None
    guided_whitespace_pattern: Annotated[
        str | None, Honoured("the same as `structured_outputs.whitespace_pattern`")
    ] = None
    seed: Annotated[int | None, Honoured("the same seed gives the same answer; -1 or absent: drawn at random")] = None
    stream: Annotated[bool | None, Honoured("server-sent events")] = None
    stream_options: Annotated[StreamOptions | None, Honoured("see `stream_options.*`")] = None
    return_token_ids: Annotated[bool | None, Honoured("token ids beside the text; the prompt's in the first event")] = (
        None
    )
    add_special_tokens: Annotated[
        bool | None, Honoured("whether the tokenizer puts its own tokens around the prompt")
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None, Honoured("number of tokens of the prompt that are kept, the last ones; -1: as many as fit")
    ] = None
    truncation_side: Annotated[str | None, Honoured('"left" (default) or "right": where the prompt is cut')] = None
    request_id: Annotated[str | None, Honoured("the response's id, after `chatcmpl-` or `cmpl-`")] = None
    rid: Annotated[str | None, Honoured("the response's id")] = None
    cache_salt: Salt = None
    session_id: Session = None
    prompt_cache_key: Session = None
    priority: Priority = None
    kvist: Annotated[KvistOptions | None, Honoured("see `kvist.*`")] = None


class ChatRequest(Generation, forbid_unknown_fields=True, kw_only=True):
    messages: Annotated[Messages, Honoured("see `messages[].*`")]
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: Annotated[bool | None, Honoured("false: an answer has one call at most")] = None
    include_reasoning: Annotated[bool | None, Honoured("false: the response lacks the reasoning")] = None
    separate_reasoning: Annotated[bool | None, Honoured("false: reasoning is part of `content`")] = None
    thinking_token_budget: Annotated[
        int | None, Honoured("most tokens of the reasoning, which is then ended; -1: no limit")
    ] = None
    thinking_budget: Annotated[int | None, Honoured("the same as `thinking_token_budget`")] = None
    max_thinking_tokens: Annotated[int | None, Honoured("the same as `thinking_token_budget`")] = None
    logprobs: Annotated[bool | None, Honoured("logprobs of the output tokens")] = None
    top_logprobs: Annotated[int | None, Honoured("0 to 20 of the likeliest tokens beside each")] = None
    add_generation_prompt: AddGenerationPrompt = None
    continue_final_message: ContinueFinalMessage = None
    chat_template_kwargs: TemplateOptions = None
    reasoning_effort: Annotated[
        str | None,
        Honoured("passed to the chat template with `enable_thinking`, or a budget; see [tools](tools.md#reasoning)"),
    ] = None


class CompletionRequest(Generation, forbid_unknown_fields=True, kw_only=True):
    prompt: Annotated[
        str | list[str | int | list[int]], Honoured("a text, several, token ids, or several lists of them")
    ]
    logprobs: Annotated[int | None, Honoured("logprobs of the output tokens, and 0 to 20 of the likeliest")] = None
    echo: Annotated[bool | None, Honoured("the text begins with the prompt, and so do `logprobs`")] = None


class NativeSampling(SamplingFields, Constraints, forbid_unknown_fields=True, kw_only=True):
    """SGLang's `sampling_params`."""

    max_new_tokens: Annotated[
        int | None, Honoured("maximum number of tokens of the answer; default 128; 0 computes the prompt alone")
    ] = None
    min_new_tokens: Annotated[int | None, Honoured("minimum number of tokens before the answer may end")] = None
    json_schema: Annotated[object, Honoured("a JSON schema of the answer, as text or as an object")] = None
    sampling_seed: Annotated[
        int | None, Honoured("the same seed gives the same answer; -1 or absent: drawn at random")
    ] = None


class NativeRequest(KnownFields, forbid_unknown_fields=True, kw_only=True):
    """SGLang's `/generate`: one of `text` and `input_ids`."""

    text: Annotated[str | list[str] | None, Honoured("a prompt, or several")] = None
    input_ids: Annotated[list[int | list[int]] | None, Honoured("a prompt's token ids, or several lists")] = None
    sampling_params: Annotated[NativeSampling | None, Honoured("see `sampling_params.*`")] = None
    stream: Annotated[bool | None, Honoured("server-sent events; the text is cumulative")] = None
    return_logprob: Annotated[bool | None, Honoured("logprobs of the output tokens")] = None
    top_logprobs_num: Annotated[int | None, Honoured("0 to 20 of the likeliest tokens beside each")] = None
    logprob_start_len: Annotated[
        int | None,
        Honoured("first token of the prompt's logprobs, whose own logprob is null; -1: only the prompt's last token"),
    ] = None
    token_ids_logprob: Annotated[TokenIds | None, Honoured("up to 1024 tokens with logprobs at every position")] = None
    return_text_in_logprobs: Annotated[bool | None, Honoured("logprobs have the text of their token")] = None
    rid: Annotated[str | None, Honoured("the response's id; with several answers, `_` and the index follow")] = None
    cache_salt: Salt = None
    session_id: Session = None
    prompt_cache_key: Session = None
    priority: Priority = None
    kvist: Annotated[KvistOptions | None, Honoured("see `kvist.*`")] = None


class TokenizeRequest(KnownFields, forbid_unknown_fields=True, kw_only=True):
    """One of `prompt` and `messages`."""

    prompt: Annotated[str | list[str] | None, Honoured("a text, or several")] = None
    messages: Annotated[Messages | None, Honoured("see `messages[].*`")] = None
    add_special_tokens: Annotated[
        bool | None, Honoured("whether the tokenizer puts its own tokens around the prompt")
    ] = None
    add_generation_prompt: AddGenerationPrompt = None
    continue_final_message: ContinueFinalMessage = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    return_token_strs: Annotated[bool | None, Honoured("return the texts of the tokens too")] = None
    chat_template_kwargs: TemplateOptions = None
    reasoning_effort: Annotated[
        str | None, Honoured("passed to the chat template, and `enable_thinking` derived from it")
    ] = None


class PromptRequest(KnownFields, forbid_unknown_fields=True, kw_only=True):
    """A prompt that is computed and not answered: one of `prompt` and `messages`."""

    prompt: Annotated[str | list[int] | None, Honoured("one text, or its token ids")] = None
    messages: Annotated[Messages | None, Honoured("see `messages[].*`")] = None
    add_special_tokens: Annotated[
        bool | None, Honoured("whether the tokenizer puts its own tokens around the prompt")
    ] = None
    add_generation_prompt: AddGenerationPrompt = None
    continue_final_message: ContinueFinalMessage = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    chat_template_kwargs: TemplateOptions = None
    reasoning_effort: Annotated[
        str | None, Honoured("passed to the chat template, and `enable_thinking` derived from it")
    ] = None
    cache_salt: Salt = None
    session_id: Session = None
    prompt_cache_key: Session = None
    priority: Priority = None
    kvist: Annotated[PlaceOptions | None, Honoured("only `kvist.worker` and `kvist.role`")] = None


class ScoreRequest(PromptRequest, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/continuations/score."""

    continuations: Annotated[
        Continuations,
        Honoured(
            "texts, or lists of token ids, that may follow the prompt: at most --max-choices, each of 1 to "
            f"{MAX_CONTINUATION_TOKENS} tokens"
        ),
    ]
    unconditional: Annotated[
        bool | None, Honoured("also score each continuation without the prompt, after the model's start token")
    ] = None


class PrefillRequest(PromptRequest, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/prefill."""

    priority: Annotated[
        int | None,
        Honoured(
            "as in requests that generate; absent: the prompt is computed after all other work, under every "
            "--scheduling-policy"
        ),
    ] = None


class LeaseRequest(PromptRequest, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/leases."""

    ttl_s: Annotated[float | None, Honoured("seconds for which the pages stay, 1 to 600; default 60")] = None


class RenewRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/leases/ID/renew."""

    ttl_s: Annotated[float | None, Honoured("seconds from now on, 1 to 600; default 60")] = None


class DetokenizeRequest(KnownFields, forbid_unknown_fields=True, kw_only=True):
    tokens: Annotated[list[int | list[int]], Honoured("token ids, or several lists")]
    skip_special_tokens: Annotated[bool | None, Honoured("true: the text omits special tokens")] = None


class RoleRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /role."""

    role: Annotated[str, Honoured("prefill, decode or unified: the role of the worker from now on")]
    worker: Annotated[
        str | None, Honoured("URL or id of the worker, as in GET /workers; on a worker's own port it may be left out")
    ] = None


class WorkerRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /workers. With `instance`, the worker announces itself."""

    url: Annotated[str, Honoured("http://HOST:PORT of the worker's HTTP server")]
    worker_type: Annotated[
        str | None, Honoured("prefill, decode, or regular: the role that the worker was started with")
    ] = None
    api_key: Annotated[
        str | None, Honoured("sent to the worker; by default the API key of this request, if there is one")
    ] = None
    instance: Annotated[str | None, Honoured("names the process that announces itself")] = None
    interval_s: Annotated[float | None, Honoured("seconds until the next announcement")] = None
    model_id: Annotated[str | None, Advisory("the worker reports its model itself")] = None
    priority: Annotated[int | None, Advisory("workers are chosen by cached pages and load")] = None
    cost: Annotated[float | None, Advisory("workers are chosen by cached pages and load")] = None
    labels: Annotated[dict[str, str] | None, Advisory("workers have no labels")] = None
    bootstrap_port: Annotated[int | None, Advisory("the worker reports its engine's address itself")] = None

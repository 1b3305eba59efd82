"""What clients send, field by field. OpenAI's names, then vLLM's and SGLang's where OpenAI has none.

Fields typed `object` belong to the API but cannot be honoured; `NEUTRAL` gives the values of some that ask for nothing.
`user` is accepted and has no effect by its definition (it identifies an end user to the provider).
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    include_usage: bool = False


class KvistOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    report: bool = False  # say which workers answered and what their handoff moved
    usage: bool = False  # say in `usage` which tiers the cached tokens came from; /generate always says it


class ContentPart(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Only parts of type "text" are accepted; the others' fields are here so that they can be refused by type."""

    type: str
    text: str | None = None
    image_url: object = None
    input_audio: object = None
    audio_url: object = None
    video_url: object = None
    file: object = None
    refusal: object = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: object = None
    tool_call_id: object = None
    function_call: object = None
    refusal: object = None
    audio: object = None
    annotations: object = None


class SamplingFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What OpenAI's requests and SGLang's `sampling_params` have in common."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    # known, not supported
    frequency_penalty: object = None
    presence_penalty: object = None
    repetition_penalty: object = None
    logit_bias: object = None


class _Generation(SamplingFields, forbid_unknown_fields=True, kw_only=True):
    """What both OpenAI endpoints share."""

    model: str | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # vLLM's and SGLang's
    min_tokens: int | None = None
    cache_salt: str | None = None
    # ours
    kvist: KvistOptions | None = None
    # known, not supported
    metadata: object = None
    store: object = None
    service_tier: object = None


class ChatRequest(_Generation, forbid_unknown_fields=True, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None
    # known, not supported
    tools: object = None
    tool_choice: object = None
    parallel_tool_calls: object = None
    functions: object = None
    function_call: object = None
    response_format: object = None
    modalities: object = None
    audio: object = None
    prediction: object = None
    reasoning_effort: object = None
    verbosity: object = None
    web_search_options: object = None


class CompletionRequest(_Generation, forbid_unknown_fields=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    max_completion_tokens: int | None = None
    logprobs: int | None = None
    return_token_ids: bool | None = None  # vLLM's and SGLang's: ids beside the text, the prompt's in the first event
    # known, not supported
    suffix: object = None
    best_of: object = None
    echo: object = None
    response_format: object = None


class NativeSampling(SamplingFields, forbid_unknown_fields=True, kw_only=True):
    """SGLang's `sampling_params`."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    sampling_seed: int | None = None
    skip_special_tokens: bool = True
    # known, not supported
    json_schema: object = None
    regex: object = None
    ebnf: object = None
    structural_tag: object = None
    custom_params: object = None
    no_stop_trim: object = None
    spaces_between_special_tokens: object = None
    stop_regex: object = None


class NativeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """SGLang's `/generate`: one of `text` and `input_ids`."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: NativeSampling | None = None
    stream: bool = False
    return_logprob: bool = False
    top_logprobs_num: int = 0
    cache_salt: str | None = None
    kvist: KvistOptions | None = None
    # known, not supported
    rid: object = None
    image_data: object = None
    audio_data: object = None
    video_data: object = None
    lora_path: object = None
    logprob_start_len: object = None
    token_ids_logprob: object = None
    return_text_in_logprobs: object = None
    return_hidden_states: object = None
    return_routed_experts: object = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """vLLM's `/tokenize`: one of `prompt` and `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None  # default: true for a prompt, false for messages
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str | None = None
    tokens: list[int]


NEUTRAL: Mapping[str, tuple[object, ...]] = {  # a field means the same wherever it stands
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "metadata": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "best_of": (1,),
    "echo": (False,),
    "custom_params": ({},),
    "no_stop_trim": (False,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": ([], ""),
    "image_data": ([],),
    "audio_data": ([],),
    "video_data": ([],),
    "logprob_start_len": (-1,),  # logprobs of the output alone
    "return_text_in_logprobs": (False,),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
}

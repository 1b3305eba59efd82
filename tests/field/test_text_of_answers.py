"""Stop strings, logprobs and text offsets that the gateway makes of tokens, in every API that has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from kvist.request import TokenLogprobs
from kvist.testing.gateway_bench import events_of, gateway_bench
from kvist.testing.scripted_dispatcher import ScriptedDispatcher
from kvist.testing.tokenizers import END, byte_tokenizer
from kvist.text.tokenizer import Tokenizer


def model_of(answer: str, tokens_per_part: int = 1, logprobs: Sequence[TokenLogprobs] = ()) -> ScriptedDispatcher:
    """Return a model that answers exactly this, with these logprobs of its tokens."""
    return ScriptedDispatcher(
        byte_tokenizer(special_tokens=(END, "<|turn|>"), chat_template="{{ messages[0].content }}"),
        answer=answer,
        ends=False,
        tokens_per_part=tokens_per_part,
        logprobs_at=lambda _request, position, token_id: logprobs[position] if logprobs else only(token_id),
    )


def only(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(logprob=-0.5, top_token_ids=(token_id,), top_logprobs=(-0.5,))


PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": "p"}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "p"}]}),
    "native": ("/generate", {"text": "p"}),
}


def body_for(api: str, *, stream: bool, **fields: Any) -> dict[str, Any]:
    """Return the fields under the endpoint's names; /generate has its own names for two of OpenAI's fields."""
    body: dict[str, Any] = {**PATHS[api][1], "stream": stream}
    if api != "native":
        return {**body, **fields}
    renamed = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
    return {**body, "sampling_params": {renamed.get(name, name): value for name, value in fields.items()}}


async def post(model: ScriptedDispatcher, path: str, body: dict[str, Any]) -> httpx.Response:
    bench = gateway_bench(dispatcher=model)
    async with bench.client:
        response = await bench.post(path, body)
    assert response.status_code == 200, response.text
    return response


def events(response: httpx.Response) -> list[Any]:
    return [event for event in events_of(response) if event != "[DONE]"]


@dataclass(frozen=True)
class Result:
    text: str
    num_tokens: int
    finish: str


async def answers(api: str, model: ScriptedDispatcher, *, stream: bool, **fields: Any) -> list[Result]:
    """Return the answer of each choice, streamed or not."""
    num_choices = fields.get("n", 1)
    extra = {"stream_options": {"include_usage": True}} if stream and api != "native" else {}
    response = await post(model, PATHS[api][0], {**body_for(api, stream=stream, **fields), **extra})
    bodies = events(response) if stream else [response.json()]
    if api == "native":
        whole = bodies if stream else (bodies[0] if isinstance(bodies[0], list) else bodies)
        last = {one.get("index", 0): one for one in whole}
        return [
            Result(one["text"], one["meta_info"]["completion_tokens"], one["meta_info"]["finish_reason"]["type"])
            for _, one in sorted(last.items())
        ]
    texts, finishes = dict.fromkeys(range(num_choices), ""), dict.fromkeys(range(num_choices), "")
    for choice in (choice for one in bodies for choice in one["choices"]):
        piece = choice["text"] if api == "completions" else choice.get("delta", choice.get("message")).get("content")
        texts[choice["index"]] += piece or ""
        finishes[choice["index"]] = choice["finish_reason"] or finishes[choice["index"]]
    num_tokens = bodies[-1]["usage"]["completion_tokens"] // num_choices
    return [Result(texts[index], num_tokens, finishes[index]) for index in range(num_choices)]


each_api = pytest.mark.parametrize("api", list(PATHS))
each_way = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
each_cut = pytest.mark.parametrize("tokens_per_part", [1, 3, 50])


@pytest.mark.case("min-tokens-stop")
@each_api
@each_way
@each_cut
@pytest.mark.parametrize("n", [1, 2])
async def test_stop_strings_take_effect_after_min_tokens_only(
    api: str, stream: bool, tokens_per_part: int, n: int
) -> None:
    model = model_of("DEFGHIJKLGHIMN", tokens_per_part)
    fields: dict[str, Any] = {"stop": "GHI", "max_tokens": 14, "n": n, "stream": stream}
    for min_tokens, text, num_tokens, finish in [
        (0, "DEF", 6, "stop"),
        (5, "DEF", 6, "stop"),  # the stop string begins before min_tokens, and ends after
        (6, "DEFGHIJKL", 12, "stop"),
        (12, "DEFGHIJKLGHIMN", 14, "length"),
        (14, "DEFGHIJKLGHIMN", 14, "length"),
    ]:
        expected = [Result(text, num_tokens, finish)] * n
        assert await answers(api, model, min_tokens=min_tokens, **fields) == expected, min_tokens


@pytest.mark.case("special-token-as-stop")
@each_api
@each_way
@each_cut
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("<|turn|>", Result("Hi", 3, "stop")),
        (["x", "<|turn|>"], Result("Hi", 3, "stop")),
        ("\n<|end|>", Result("Hiho", 7, "stop")),  # mixed with text, and the model's own end token
        ("ho\n<|end|>\n", Result("Hi", 8, "stop")),
        ("i<|turn|>h", Result("H", 4, "stop")),
        ("o<|turn|>", Result("Hiho\n\nyou", 11, "length")),
    ],
)
async def test_a_stop_string_may_spell_special_tokens(
    api: str, stream: bool, tokens_per_part: int, stop: str | list[str], expected: Result
) -> None:
    model = model_of("Hi<|turn|>ho\n<|end|>\nyou", tokens_per_part)
    assert await answers(api, model, stream=stream, stop=stop, ignore_eos=True, max_tokens=60) == [expected]


async def offsets_of(model: ScriptedDispatcher, *, stream: bool, **fields: Any) -> tuple[str, list[str], list[int]]:
    """Return the text, its tokens and their offsets from /v1/completions."""
    body = {"prompt": "p", "max_tokens": 20, "logprobs": 1, "stream": stream, **fields}
    response = await post(model, "/v1/completions", body)
    bodies = events(response) if stream else [response.json()]
    choices = [one["choices"][0] for one in bodies if one["choices"]]
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    return "".join(choice["text"] for choice in choices), tokens, offsets


@pytest.mark.case("text-offset")
@each_way
@each_cut
@pytest.mark.parametrize(
    ("answer", "fields", "text", "offsets"),
    [
        ("aéb", {}, "aéb", [0, 1, 1, 2]),  # é has two tokens
        ("🦙 🦙", {"max_tokens": 6}, "🦙 \ufffd", [0, 0, 0, 0, 1, 2]),  # ends inside a character
        ("a<|turn|>b<|end|>", {}, "ab", [0, 1, 1, 2]),  # special tokens have no text
        (
            "ab--cd",
            {"stop": "--c"},
            "ab",
            [0, 1, 2, 2, 2],
        ),  # tokens of the stop string have the offset of the text's end
        ("ab--dd", {"stop": "--c"}, "ab--dd", [0, 1, 2, 3, 4, 5]),  # withheld until the match fails
    ],
)
async def test_text_offsets_are_positions_in_the_returned_text(
    stream: bool, tokens_per_part: int, answer: str, fields: dict[str, Any], text: str, offsets: list[int]
) -> None:
    model = model_of(answer, tokens_per_part)
    returned_text, tokens, returned_offsets = await offsets_of(model, stream=stream, **fields)
    assert (returned_text, returned_offsets) == (text, offsets)
    assert len(tokens) == len(offsets)


def ids(tokenizer: Tokenizer, raw: bytes) -> list[int]:
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in range(256)}
    return [by_bytes[bytes([byte])] for byte in raw]


@pytest.mark.case("top-logprobs-collapse")
async def test_logprobs_by_text_keep_the_chosen_token_and_distinguish_partial_characters() -> None:
    model = model_of("中")
    tokenizer = model.tokenizer
    first, second, third, letter = ids(tokenizer, "中".encode() + b"x")
    chosen_outside = TokenLogprobs(logprob=-7.0, top_token_ids=(second, third), top_logprobs=(-0.1, -3.0))
    # two ids without a token, and therefore without text
    equal_texts = TokenLogprobs(logprob=-0.25, top_token_ids=(second, 298, 299), top_logprobs=(-0.25, -2.0, -6.5))
    chosen_of_equals = TokenLogprobs(
        logprob=-4.0, top_token_ids=(third, letter, first), top_logprobs=(-4.0, -5.0, float("-inf"))
    )
    logprobs_of_tokens = [chosen_outside, equal_texts, chosen_of_equals]
    model.logprobs_at = lambda _request, position, _token_id: logprobs_of_tokens[position]
    body = {"prompt": "p", "max_tokens": 3, "logprobs": 3}
    logprobs = (await post(model, "/v1/completions", body)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [r"bytes:\xe4", r"bytes:\xb8", r"bytes:\xad"]
    assert logprobs["top_logprobs"] == [
        {r"bytes:\xb8": -0.1, r"bytes:\xad": -3.0, r"bytes:\xe4": -7.0},
        {r"bytes:\xb8": -0.25, "": -2.0},
        {r"bytes:\xad": -4.0, "x": -5.0, r"bytes:\xe4": -9999.0},
    ]
    assert logprobs["token_logprobs"] == [-7.0, -0.25, -4.0]


@pytest.mark.case("nan-logits")
@each_api
async def test_logprobs_in_json_are_always_finite_numbers(api: str) -> None:
    nan = float("nan")
    found = TokenLogprobs(logprob=nan, top_token_ids=(0, 1), top_logprobs=(nan, float("-inf")))
    fields_by_api: dict[str, dict[str, Any]] = {
        "completions": {"logprobs": 2},
        "chat": {"logprobs": True, "top_logprobs": 2},
        "native": {"return_logprob": True, "top_logprobs_num": 2},
    }
    path, body = PATHS[api]
    response = await post(model_of("a", logprobs=[found]), path, {**body, **fields_by_api[api]})
    assert "-9999.0" in response.text
    assert 'logprob":null' not in response.text
    assert "null,0" not in response.text
    assert "[null" not in response.text.split('"output_token_logprobs"')[-1]  # a prompt's first token has no logprob

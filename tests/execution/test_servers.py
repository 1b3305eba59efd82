"""Servers over HTTP: the requests that they get, and what becomes of their answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from kvist.errors import EngineError, KvistError, Overloaded, PromptTooLong, RequestError, Unavailable
from kvist.execution.backend import GenerateRequest, Hints, Leased, ScoreRequest, prefix_fields, prompt_fields
from kvist.execution.kvist_server import KvistServer
from kvist.execution.openai_server import OpenAIServer
from kvist.execution.results import Served
from kvist.execution.sampling import Sampling
from kvist.http_client import HttpFailure, HttpReply, OnBody
from kvist.planning.fleet import Native, Role
from kvist.planning.prompt import Prompt

CHAT = Prompt().with_open("user").with_text("Why?").with_close("user").with_open("assistant")
USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
ANSWER = {
    "choices": [
        {"index": 1, "message": {"content": "second"}, "finish_reason": "stop"},
        {"index": 0, "message": {"content": "first"}, "finish_reason": "length"},
    ],
    "usage": USAGE,
    "kvist": {"prefill_worker": "p", "decode_worker": "d"},
}
HANDOFFS = {
    "handoffs_received": 10,
    "handoff_seconds": 50.0,  # most of it while prefill computes
    "handoff_last_copy_seconds": 0.2,
    "handoff_verify_seconds": 0.2,
    "handoff_admission_seconds": 0.1,
}
INFO = {
    "version": "1",
    "pairs": [],
    "workers": [
        {
            "worker_id": "127.0.0.1:1",
            "alive": True,
            "capacity": {
                "role": "prefill",
                "page_size": 32,
                "max_running_requests": 8,
                "prefill_tokens_per_s": 500.0,
                "decode_step_ms": None,
                "queue_ms": 1500.0,
                "pages": {"device": {"total": 100, "leasable": 25}},
            },
            "load": {"num_running": 2, "totals": {}},
        },
        {
            "worker_id": "127.0.0.1:2",
            "alive": True,
            "capacity": {"role": "decode", "page_size": 16, "decode_step_ms": 20.0, "pages": {"device": {"total": 9}}},
            "load": {"num_running": 0, "totals": HANDOFFS},
        },
        {"worker_id": "127.0.0.1:3", "alive": False, "capacity": None, "load": None},
    ],
}


@dataclass(frozen=True)
class Response:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Recorded:
    """Connections that keep the requests and answer by path; bodies come in two pieces."""

    def __init__(self, answers: Mapping[str, object]) -> None:
        self.bodies: list[tuple[str, Any]] = []
        self.methods: list[str] = []
        self._answers = answers

    async def request(self, method: str, path: str, body: bytes, on_body: OnBody) -> HttpReply:
        self.methods.append(method)
        self.bodies.append((path, json.loads(body) if body else None))
        answer = self._answers.get(path, Response(404, b'{"detail": "Not Found"}'))
        if isinstance(answer, Exception):
            raise answer
        found = answer if isinstance(answer, Response) else Response(200, json.dumps(answer).encode())
        middle = len(found.body) // 2
        for piece in (found.body[:middle], found.body[middle:]):
            on_body(found.status, piece)
        return HttpReply(status=found.status, retried=False, headers=found.headers)

    def close(self) -> None:
        pass

    def openai(self) -> OpenAIServer:
        return OpenAIServer("http://server/v1", model="m", http=self)

    async def kvist(self) -> KvistServer:
        server = KvistServer("http://server", http=self)
        await server.fleet()
        self.bodies.clear()
        return server


def _events(*events: object) -> Response:
    lines = [f"data: {json.dumps(each)}\n\n" for each in events]
    return Response(200, "".join([*lines, "data: [DONE]\n\n"]).encode())


def _piece(text: str, reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


async def test_a_chat_goes_to_the_chat_endpoint_with_its_parameters() -> None:
    recorded = Recorded({"/v1/chat/completions": ANSWER})
    sampling = Sampling(max_tokens=5, n=2, stop="\n", temperature=0.5, seed=3, return_logprob=True, top_logprobs_num=1)
    answer = await recorded.openai().generate(GenerateRequest(prompt=CHAT, sampling=sampling), None)
    ((path, body),) = recorded.bodies
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Why?"}],
        "add_generation_prompt": True,
        "max_tokens": 5,
        "n": 2,
        "stop": ["\n"],
        "temperature": 0.5,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 1,
    }
    assert answer.texts == ("first", "second")
    assert answer.meta["finish_reason"] == "length"
    assert answer.served.num_computed_tokens == 5
    assert (answer.served.prefill_worker, answer.served.decode_worker) == ("p", "d")


@pytest.mark.parametrize(
    ("prompt", "path", "fields"),
    [
        (Prompt("Once"), "/v1/completions", {"prompt": "Once"}),
        (
            CHAT.with_text("Well, "),
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Well, "}],
                "add_generation_prompt": False,
                "continue_final_message": True,
            },
        ),
    ],
)
async def test_an_open_message_is_continued_and_a_plain_text_is_completed(
    prompt: Prompt, path: str, fields: dict[str, object]
) -> None:
    whole = {"choices": [{"index": 0, "text": "x", "finish_reason": "stop"}], "usage": USAGE}
    recorded = Recorded({"/v1/chat/completions": ANSWER, "/v1/completions": whole})
    await recorded.openai().generate(GenerateRequest(prompt=prompt, sampling=Sampling(max_tokens=1)), None)
    assert recorded.bodies == [(path, {"model": "m", "max_tokens": 1, **fields})]


async def test_forms_of_answers_are_sent_as_constraints() -> None:
    recorded = Recorded({"/v1/chat/completions": ANSWER})
    server = recorded.openai()
    await server.generate(GenerateRequest(prompt=CHAT, sampling=Sampling(), form="regex", form_source="a+"), None)
    schema = GenerateRequest(prompt=CHAT, sampling=Sampling(), form="json_schema", form_source='{"type": "object"}')
    await server.generate(schema, None)
    assert recorded.bodies[0][1]["structured_outputs"] == {"regex": "a+"}
    assert recorded.bodies[1][1]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": {"type": "object"}},
    }


async def test_a_stream_is_passed_on_in_pieces() -> None:
    events = _events(_piece("Be"), _piece("cause", "stop"), {"choices": [], "usage": USAGE})
    recorded = Recorded({"/v1/chat/completions": events})
    pieces: list[str] = []
    answer = await recorded.openai().generate(GenerateRequest(prompt=CHAT, sampling=Sampling()), pieces.append)
    assert pieces == ["Be", "cause"]
    assert answer.texts == ("Because",)
    assert answer.served.num_output_tokens == 2
    assert recorded.bodies[0][1]["stream"] is True


@pytest.mark.parametrize("cuts", [[2, 4], [1, 2, 3, 4, 5, 6], [9]])
async def test_a_stop_pattern_ends_the_answer_at_its_first_match_however_it_is_cut(cuts: list[int]) -> None:
    text = "abc12d345"
    ends = [0, *cuts, len(text)]
    pieces = [_piece(text[start:end]) for start, end in pairwise(ends)]
    recorded = Recorded({"/v1/chat/completions": _events(*pieces)})
    request = GenerateRequest(prompt=CHAT, sampling=Sampling(stop_regex=[r"\d\d", "z"]))
    answer = await recorded.openai().generate(request, None)
    assert answer.texts == ("abc",)
    assert answer.meta["finish_reason"] == "stop"


async def test_prompt_logprobs_are_cut_to_the_asked_start() -> None:
    scored = [None, {"1": {"logprob": -1.0}}, {"2": {"logprob": -2.0}}]
    recorded = Recorded({"/v1/chat/completions": {**ANSWER, "prompt_logprobs": scored}})
    sampling = Sampling(return_logprob=True, logprob_start_len=2)
    answer = await recorded.openai().generate(GenerateRequest(prompt=CHAT, sampling=sampling), print)
    assert answer.meta["input_token_logprobs"] == scored[2:]
    assert "stream" not in recorded.bodies[0][1]


async def test_a_select_without_native_scores_is_one_request_for_each_choice() -> None:
    def entry(token_id: int, text: str, logprob: float) -> dict[str, object]:
        return {str(token_id): {"logprob": logprob, "decoded_token": text}}

    scored = [None, entry(5, "Why?", -1.0), entry(7, "a", -0.5), entry(8, " b", -0.25)]
    recorded = Recorded({"/v1/chat/completions": {**ANSWER, "prompt_logprobs": scored}})
    found = await recorded.openai().score(ScoreRequest(prompt=CHAT, choices=("a b", " b")))
    assert [each.token_ids for each in found.choices] == [(7, 8), (8,)]
    assert found.choices[0].logprobs == (-0.5, -0.25)
    assert found.served.num_requests == 2
    assert [body["messages"][-1]["content"] for _, body in recorded.bodies] == ["a b", " b"]
    assert all(body["prompt_logprobs"] == 0 for _, body in recorded.bodies)


async def test_a_server_without_prompt_logprobs_is_an_error_with_a_remedy() -> None:
    recorded = Recorded({"/v1/chat/completions": ANSWER})
    with pytest.raises(RequestError, match="use gen\\(\\) with a `regex`"):
        await recorded.openai().score(ScoreRequest(prompt=CHAT, choices=("a",)))


@pytest.mark.parametrize(
    ("response", "kind", "retry_after_s"),
    [
        (Response(429, b'{"error": {"message": "full"}}', {"retry-after": "2"}), Overloaded, 2.0),
        (Response(503, b"down"), Unavailable, None),
        (Response(400, b'{"error": {"message": "x", "code": "context_length_exceeded"}}'), PromptTooLong, None),
        (Response(422, b'{"error": {"message": "x", "code": "odd"}}'), RequestError, None),
        (Response(500, b'{"error": "boom"}'), EngineError, None),
        (Response(200, b"<html>"), EngineError, None),
    ],
)
async def test_errors_of_a_server_become_errors_of_their_kind(
    response: Response, kind: type[KvistError], retry_after_s: float | None
) -> None:
    recorded = Recorded({"/v1/chat/completions": response})
    with pytest.raises(kind) as raised:
        await recorded.openai().generate(GenerateRequest(prompt=CHAT, sampling=Sampling()), None)
    assert raised.value.retry_after_s == retry_after_s
    with pytest.raises(KvistError):
        await recorded.openai().generate(GenerateRequest(prompt=CHAT, sampling=Sampling()), print)


def _refusal(message: str, param: str) -> Response:
    error = {"message": message, "param": param, "code": "invalid_request"}
    return Response(400, json.dumps({"error": error}).encode())


SCHEMA = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("form", "argument", "top", "message", "param", "expected"),
    [
        ("json_schema", "json_schema", None, f"`{SCHEMA}`: no type foo", SCHEMA, "`json_schema`: no type foo"),
        ("json_schema", "type", None, f"`{SCHEMA}`: no type foo", SCHEMA, "`type`: no type foo"),
        ("json_schema", "type", None, "no type foo", "response_format", "`type`: no type foo"),
        ("regex", "regex", None, "`structured_outputs.regex`: a(", "structured_outputs.regex", "`regex`: a("),
        ("regex", "dtype", None, "`structured_outputs.regex`: a(", "structured_outputs.regex", "`dtype`: a("),
        ("", "", 21, "`top_logprobs` must be 0 to 20", "top_logprobs", "`top_logprobs_num` must be 0 to 20"),
        ("", "", 21, "`logprobs` must be 0 to 20", "logprobs", "`top_logprobs_num` must be 0 to 20"),
        ("", "", None, "`logprobs` is off here", "logprobs", "`return_logprob` is off here"),
        ("", "", None, "`stop` has 17 strings", "stop", "`stop` has 17 strings"),
    ],
)
async def test_a_refusal_names_the_argument_of_the_program(
    form: str, argument: str, top: int | None, message: str, param: str, expected: str
) -> None:
    recorded = Recorded({"/v1/chat/completions": _refusal(message, param)})
    sampling = Sampling(return_logprob=True, top_logprobs_num=top)
    request = GenerateRequest(prompt=CHAT, sampling=sampling, form=form, form_source="{}", form_argument=argument)
    for push in (None, print):
        with pytest.raises(RequestError) as raised:
            await recorded.openai().generate(request, push)
        assert (raised.value.message, str(raised.value)) == (expected, expected)
        assert f"`{raised.value.param}`" in expected


async def test_a_refused_choice_is_named_by_its_number() -> None:
    refusal = _refusal("`continuations[1]` must have 1 to 4096 tokens", "continuations[1]")
    server = await Recorded({"/server_info": INFO, "/v1/continuations/score": refusal}).kvist()
    with pytest.raises(RequestError, match=r"^`choices\[1\]` must have 1 to 4096 tokens$") as raised:
        await server.score(ScoreRequest(prompt=CHAT, choices=("a", "b")))
    assert raised.value.param == "choices"


async def test_a_server_that_does_not_answer_is_unavailable_and_may_be_asked_again() -> None:
    refused = HttpFailure("connect", "cannot connect to server:80: refused")
    server = OpenAIServer("http://server", http=Recorded({"/v1/chat/completions": refused}))
    with pytest.raises(Unavailable, match="does not answer") as raised:
        await server.generate(GenerateRequest(prompt=CHAT, sampling=Sampling()), None)
    assert raised.value.retryable
    await server.close()


async def test_a_server_that_sends_nothing_is_unavailable_after_the_timeout() -> None:
    class Silent(Recorded):
        async def request(self, method: str, path: str, body: bytes, on_body: OnBody) -> HttpReply:
            reply = await super().request(method, path, body, on_body)
            await asyncio.sleep(60)
            return reply

    server = OpenAIServer("http://server", timeout_s=0.01, http=Silent({"/v1/chat/completions": ANSWER}))
    with pytest.raises(Unavailable, match=r"sent nothing for 0\.01 s"):
        await server.generate(GenerateRequest(prompt=CHAT, sampling=Sampling()), None)


async def test_the_fleet_of_a_kvist_server_has_roles_and_measured_rates() -> None:
    fleet = await KvistServer("http://server", http=Recorded({"/server_info": INFO})).fleet()
    prefill, decode = fleet.workers
    assert (prefill.name, prefill.role, decode.role) == ("127.0.0.1:1", Role.PREFILL, Role.DECODE)
    assert prefill.prefill_tokens_per_s == 500.0
    assert decode.prefill_tokens_per_s == 500.0, "its own rate of 4000 is assumed"
    assert (prefill.queue_s, prefill.num_running) == (1.5, 2)
    assert (prefill.max_running, prefill.num_cache_tokens) == (8, 3200)
    assert (decode.decode_tokens_per_s, decode.handoff_s) == (50.0, 0.05)
    assert (fleet.page_size, fleet.num_lease_tokens) == (32, 800)
    assert fleet.native == frozenset(Native)


async def test_a_server_that_is_not_kvist_gets_no_field_of_kvist() -> None:
    recorded = Recorded({"/v1/chat/completions": ANSWER})
    server = await recorded.kvist()
    assert not (await server.fleet()).native
    hints = Hints(worker="w", role=Role.PREFILL, session="s")
    await server.generate(GenerateRequest(prompt=CHAT, sampling=Sampling(), hints=hints), None)
    assert set(recorded.bodies[-1][1]) == {"messages", "add_generation_prompt"}


async def test_a_kvist_server_gets_the_hints_of_the_plan_and_native_requests() -> None:
    results = [{"token_ids": [7], "logprobs": [-0.5]}, {"token_ids": [8, 9], "logprobs": [-0.5, None]}]
    scored = {"results": results, "worker": "w", "cached_tokens": {"device": 8, "host": 1}, "computed_tokens": 3}
    paths = {"/server_info": INFO, "/v1/chat/completions": ANSWER, "/v1/continuations/score": scored}
    recorded = Recorded(paths | {"/v1/prefill": scored})
    server = await recorded.kvist()
    hints = Hints(worker="w", role=Role.PREFILL, session="s")
    await server.generate(GenerateRequest(prompt=CHAT, sampling=Sampling(), hints=hints), None)
    request = ScoreRequest(prompt=CHAT.with_text("It is "), choices=("a", "b c"), unconditional=True, hints=hints)
    found = await server.score(request)
    served = await server.prefill(CHAT, Hints(worker="w"))
    await server.prefill(CHAT, Hints(role=Role.DECODE, worker="w", in_background=True))
    generated, first, second, third, fourth = (body for _, body in recorded.bodies)
    assert generated["kvist"] == {"report": True, "worker": "w", "role": "prefill"}
    assert generated["session_id"] == "s"
    assert first["continuations"] == ["a", "b c"]
    assert first["continue_final_message"] is True
    assert second["prompt"] == "\n"
    assert found.choices[1].logprobs == (-0.5, float("-inf"))
    assert (found.served.num_prompt_tokens, found.served.num_cached_tokens) == (24, 18)
    assert served.prefill_worker == "w"
    assert (third["priority"], third["kvist"]) == (0, {"worker": "w"})
    assert "priority" not in fourth
    assert fourth["kvist"] == {"worker": "w", "role": "decode"}


async def test_a_lease_is_taken_renewed_taken_again_after_its_end_and_ended() -> None:
    gone = Response(404, b'{"error": {"message": "ended", "code": "lease_not_found"}}')
    lease = {"id": "lease-1", "worker": "w", "cached_tokens": {"device": 16}, "computed_tokens": 3}
    recorded = Recorded({"/v1/leases": lease, "/v1/leases/lease-1/renew": lease, "/v1/leases/lease-0/renew": gone})
    server = await recorded.kvist()
    hints = Hints(worker="w")
    taken = await server.lease(CHAT, None, 30, hints)
    assert taken == Leased(
        lease_id="lease-1", served=Served(num_prompt_tokens=19, num_cached_tokens=16, prefill_worker="w")
    )
    assert await server.lease(CHAT, "lease-1", 30, hints) == Leased(lease_id="lease-1")
    assert await server.lease(CHAT, "lease-0", 30, hints) == taken
    assert await server.lease(CHAT, "lease-1", 0, hints) is None
    paths = [path.removeprefix("/v1/leases") for path, _ in recorded.bodies]
    assert paths == ["", "/lease-1/renew", "/lease-0/renew", "", "/lease-1"]
    assert recorded.methods[-2:] == ["POST", "DELETE"]
    assert recorded.bodies[0][1]["kvist"] == {"worker": "w"}
    assert recorded.bodies[0][1]["ttl_s"] == 30


async def test_a_server_without_room_gives_no_lease() -> None:
    for status in (429, 400):
        recorded = Recorded({"/v1/leases": Response(status, b'{"error": {"message": "no room"}}')})
        assert await (await recorded.kvist()).lease(CHAT, None, 30, Hints()) is None


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        (Prompt("Once"), {"prompt": "Once"}),
        (CHAT, {"messages": [{"role": "user", "content": "Why?"}], "add_generation_prompt": True}),
        (
            Prompt().with_open("system").with_text("Be kind.").with_close("system").with_open("user"),
            {"messages": [{"role": "system", "content": "Be kind."}], "add_generation_prompt": False},
        ),
        (
            Prompt().with_open("system").with_text("Be"),
            {
                "messages": [{"role": "system", "content": "Be"}],
                "add_generation_prompt": False,
                "continue_final_message": True,
            },
        ),
    ],
)
def test_a_prefix_ends_with_a_whole_or_an_open_message(prompt: Prompt, fields: dict[str, object]) -> None:
    assert prefix_fields(prompt) == fields


def test_a_generation_in_a_message_without_text_is_an_error_unless_it_is_the_assistants() -> None:
    assert prompt_fields(CHAT)["add_generation_prompt"] is True
    with pytest.raises(RequestError, match="needs some text before gen"):
        prompt_fields(Prompt().with_open("system").with_text("a").with_close("system").with_open("user"))

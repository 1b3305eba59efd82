"""Over HTTP, answers have the form that the request names, for one worker and for a pair."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema_rs
import pytest

from tests.e2e.conftest import Cluster

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
COMPACT = {"json": PERSON, "disable_any_whitespace": True}


def chat(url: str, **fields: object) -> list[dict[str, Any]]:
    body = {"messages": [{"role": "user", "content": "Describe a person."}], "max_tokens": 120, "seed": 4, **fields}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return list(response.json()["choices"])


def is_person(text: str) -> bool:
    return bool(jsonschema_rs.validator_for(PERSON).is_valid(json.loads(text)))


QUESTIONS: dict[str, dict[str, Any]] = {
    **{
        f"temperature {temperature}": {
            "temperature": temperature,
            "n": 2,
            "response_format": FORMAT,
            "return_token_ids": True,
        }
        for temperature in (0.0, 1.5)
    },
    "with penalties": {
        "structured_outputs": COMPACT,
        "temperature": 1.0,
        "logprobs": True,
        "top_logprobs": 2,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "bad_words": ["2"],
    },
    "whole": {"response_format": FORMAT, "temperature": 0.9},
    "stopped": {"structured_outputs": COMPACT, "stop": ['"age"'], "temperature": 0.0},
    "chosen": {"guided_choice": ["red", "green"], "min_tokens": 30},
}
ALONE = [name for name in QUESTIONS if name.startswith("temperature")]  # asked of the unified worker, too
Answers = dict[tuple[str, str], list[dict[str, Any]]]  # the choices, by "router" or "unified" and question


@pytest.fixture(scope="module")
def answers(cluster: Cluster) -> Answers:
    """The answers to all questions, asked at once, which takes little longer than one."""
    cluster.wait_ready()
    asked = [("router", name) for name in QUESTIONS] + [("unified", name) for name in ALONE]
    with ThreadPoolExecutor(len(asked)) as pool:
        futures = {key: pool.submit(chat, getattr(cluster, key[0]), **QUESTIONS[key[1]]) for key in asked}
        return {key: future.result() for key, future in futures.items()}


@pytest.mark.parametrize("name", ALONE)
def test_answers_of_one_worker_and_of_a_pair_are_equal_and_valid(settled: Cluster, answers: Answers, name: str) -> None:
    del settled
    alone, pair = answers["unified", name], answers["router", name]
    assert len(alone) == 2
    assert [each["token_ids"] for each in pair] == [each["token_ids"] for each in alone]
    for choice in alone:
        assert choice["finish_reason"] == "stop"
        assert is_person(choice["message"]["content"])


def test_penalties_logprobs_and_bad_words_go_with_a_schema(settled: Cluster, answers: Answers) -> None:
    del settled
    [choice] = answers["router", "with penalties"]
    text = choice["message"]["content"]
    assert is_person(text)
    assert "2" not in text
    assert " " not in re.sub(r'"[^"]*"', "", text)
    shown = choice["logprobs"]["content"]
    assert "".join(each["token"] for each in shown).startswith(text)
    assert all(len(each["top_logprobs"]) == 2 for each in shown)


def test_a_stream_has_the_text_of_the_whole_answer(settled: Cluster, answers: Answers) -> None:
    [whole] = answers["router", "whole"]
    body = {
        "messages": [{"role": "user", "content": "Describe a person."}],
        "max_tokens": 120,
        "seed": 4,
        "temperature": 0.9,
        "response_format": FORMAT,
        "stream": True,
    }
    text = ""
    with httpx.stream("POST", f"{settled.router}/v1/chat/completions", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    assert text == whole["message"]["content"]


def test_a_stop_string_ends_a_constrained_answer_and_min_tokens_does_not_prolong_it(
    settled: Cluster, answers: Answers
) -> None:
    del settled
    [stopped] = answers["router", "stopped"]
    assert stopped["message"]["content"].endswith(",")
    [chosen] = answers["router", "chosen"]
    assert chosen["message"]["content"] in ("red", "green")
    assert chosen["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("sampling", "form"),
    [
        ({"regex": r"\d{3}-[a-z]{2,5}"}, r"\d{3}-[a-z]{2,5}"),
        ({"ebnf": 'root ::= ("ab" | "c")+ "!"'}, r"(ab|c)+!"),
        ({"json_schema": json.dumps({"enum": ["x", 1]})}, r'"x"|1'),
    ],
)
def test_generate_takes_the_constraints_of_sglang(settled: Cluster, sampling: dict[str, Any], form: str) -> None:
    params = {"max_new_tokens": 200, "temperature": 0.7, "sampling_seed": 1, **sampling}

    def generate(url: str) -> str:
        answer = httpx.post(f"{url}/generate", json={"text": "x", "sampling_params": params}, timeout=120)
        return str(answer.json()["text"])

    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(generate, (settled.unified, settled.router)))
    assert texts[0] == texts[1]
    assert re.fullmatch(form, texts[0])


def test_a_worker_of_its_own_reports_what_it_compiled(settled: Cluster) -> None:
    assert settled.metric("kvist:worker_grammars_compiled_total", url=settled.unified) >= 1
    assert settled.metric("kvist:gateway_grammars_compiled_total", url=settled.router) >= 1

"""Over HTTP, penalties, bias, allowed tokens and bad words do what they promise, for one worker and for a pair."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from kvist.checkpoint import find_checkpoint
from kvist.text import load_tokenizer
from tests.e2e.conftest import Cluster

PROMPT = "Once upon a time, in a small village by the sea, there lived"
ALL: dict[str, Any] = {
    "frequency_penalty": 0.6,
    "presence_penalty": -0.4,
    "repetition_penalty": 1.15,
    "logit_bias": {"253": 9.0, "284": -3.0, "30": 1.0},
    "bad_words": ["sea", "the"],
}
SAMPLING: dict[str, dict[str, Any]] = {"greedy": {}, "seeded": {"temperature": 0.9, "top_p": 0.9, "seed": 3}}
NAMES = [*ALL, "all"]
REPEATING: dict[str, Any] = {"prompt": "a b c a b c a b c a b c a b c", "max_tokens": 30}
ALLOWED = [284, 253, 30, 451, 4649]
QUESTIONS: dict[str, dict[str, Any]] = {
    **{
        f"{name} {how}": {**(ALL if name == "all" else {name: ALL[name]}), **sampling}
        for name in NAMES
        for how, sampling in SAMPLING.items()
    },
    "plain greedy": {"max_tokens": 48},
    "allowed": {"allowed_token_ids": ALLOWED, "temperature": 1.0, "seed": 1},
    "forced": {"logit_bias": {"451": 100}, "max_tokens": 4},
    "repeating": REPEATING,
    "penalised": {**REPEATING, "frequency_penalty": 2},
}


def complete(url: str, **fields: object) -> dict[str, Any]:
    body = {
        "prompt": PROMPT,
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return dict(choice)


def ask_all(url: str, questions: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Ask all questions at once, which takes little longer than one: they share the steps of the engine."""
    with ThreadPoolExecutor(len(questions)) as pool:
        asked = {name: pool.submit(complete, url, **fields) for name, fields in questions.items()}
        return {name: answer.result() for name, answer in asked.items()}


@dataclass(frozen=True)
class Answers:
    """The answers to `QUESTIONS`."""

    alone: dict[str, dict[str, Any]]  # of one worker
    pair: dict[str, dict[str, Any]]
    pair_again: dict[str, dict[str, Any]]  # with both caches filled

    def token_ids(self, name: str) -> list[list[int]]:
        return [list(answers[name]["token_ids"]) for answers in (self.alone, self.pair)]


@pytest.fixture(scope="module")
def answers(cluster: Cluster) -> Answers:
    cluster.wait_ready()
    return Answers(*(ask_all(url, QUESTIONS) for url in (cluster.unified, cluster.router, cluster.router)))


@pytest.mark.parametrize("how", SAMPLING)
@pytest.mark.parametrize("name", NAMES)
def test_the_pair_and_one_worker_shape_tokens_alike(settled: Cluster, answers: Answers, name: str, how: str) -> None:
    del settled
    question = f"{name} {how}"
    alone = answers.alone[question]["token_ids"]
    assert len(alone) == 24
    assert answers.pair[question]["token_ids"] == alone
    assert answers.pair_again[question]["token_ids"] == alone
    if how == "greedy" and name != "bad_words":
        assert answers.alone["plain greedy"]["token_ids"][:24] != alone


def test_only_allowed_tokens_are_sampled(settled: Cluster, answers: Answers) -> None:
    del settled
    for found in answers.token_ids("allowed"):
        assert len(found) == 24
        assert len(set(found)) > 1
        assert set(found) <= set(ALLOWED)


def test_a_bias_of_100_forces_a_token_and_minus_100_excludes_one(settled: Cluster, answers: Answers) -> None:
    assert answers.token_ids("forced") == [[451] * 4] * 2
    first = answers.alone["plain greedy"]["token_ids"][0]
    for url in (settled.unified, settled.router):
        assert first not in complete(url, logit_bias={str(first): -100})["token_ids"]


def test_a_bad_word_is_never_completed_in_either_spelling(settled: Cluster, answers: Answers) -> None:
    words = [word for word in answers.alone["plain greedy"]["text"].split() if word.isalpha()]
    word = max(words, key=words.count)
    tokenizer = load_tokenizer(find_checkpoint(None))
    sequences = [tokenizer.encode(spelling, add_special_tokens=False) for spelling in (word, " " + word)]
    for url in (settled.unified, settled.router):
        found = complete(url, bad_words=[word], max_tokens=48)["token_ids"]
        for sequence in sequences:
            places = range(len(found) - len(sequence) + 1)
            assert not any(found[place : place + len(sequence)] == sequence for place in places)


def test_a_high_frequency_penalty_breaks_a_repetition(settled: Cluster, answers: Answers) -> None:
    del settled
    for plain, penalised in zip(answers.token_ids("repeating"), answers.token_ids("penalised"), strict=True):
        assert len(set(penalised)) > len(set(plain))


def test_logprobs_are_those_of_the_model_before_any_change(settled: Cluster) -> None:
    plain = complete(settled.unified, logprobs=1, max_tokens=1)
    forced = complete(settled.unified, logprobs=1, max_tokens=1, logit_bias={"451": 100})
    assert forced["token_ids"] == [451]
    (found,) = forced["logprobs"]["top_logprobs"]
    (before,) = plain["logprobs"]["top_logprobs"]
    assert max(found.values()) == pytest.approx(max(before.values()), abs=2e-3)
    assert forced["logprobs"]["token_logprobs"][0] < max(found.values())


def test_generate_has_the_same_penalties_inside_sampling_params(settled: Cluster) -> None:
    shaped = {name: value for name, value in ALL.items() if name != "bad_words"}
    ids = load_tokenizer(find_checkpoint(None)).encode(PROMPT)
    params = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True, **shaped}

    def generate(url: str) -> list[int]:
        answer = httpx.post(f"{url}/generate", json={"input_ids": ids, "sampling_params": params}, timeout=120)
        return list(answer.json()["output_ids"])

    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(generate, url) for url in (settled.unified, settled.router)]
        expected = complete(settled.unified, prompt=ids, **shaped)["token_ids"]
    assert [answer.result() for answer in found] == [expected, expected]


def test_allowed_tokens_that_all_end_the_answer_contradict_min_tokens(settled: Cluster) -> None:
    fields = {"allowed_token_ids": [2], "min_tokens": 1, "ignore_eos": False}
    for url in (settled.unified, settled.router):
        body = {"prompt": PROMPT, "max_tokens": 4, **fields}
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        assert response.status_code == 400
        assert "leaves no token" in response.json()["error"]["message"]

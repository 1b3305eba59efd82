"""Over HTTP, penalties, bias, allowed tokens and bad words do what they promise, for one worker and for a pair."""

from __future__ import annotations

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
    "logit_bias": {"253": 2.5, "284": -3.0, "30": 1.0},
    "bad_words": ["sea", "the"],
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


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("name", [*ALL, "all"])
def test_the_pair_and_one_worker_shape_tokens_alike(settled: Cluster, name: str, sampling: dict[str, Any]) -> None:
    fields = ALL if name == "all" else {name: ALL[name]}
    alone = complete(settled.unified, **fields, **sampling)["token_ids"]
    assert len(alone) == 24
    for _ in range(2):  # the second time with both caches filled
        assert complete(settled.router, **fields, **sampling)["token_ids"] == alone
    if not sampling and name != "bad_words":
        assert complete(settled.unified, **sampling)["token_ids"] != alone


def test_only_allowed_tokens_are_sampled(settled: Cluster) -> None:
    allowed = [284, 253, 30, 451, 4649]
    for url in (settled.unified, settled.router):
        found = complete(url, allowed_token_ids=allowed, temperature=1.0, seed=1)["token_ids"]
        assert len(set(found)) > 1
        assert set(found) <= set(allowed)


def test_a_bias_of_100_forces_a_token_and_minus_100_excludes_one(settled: Cluster) -> None:
    plain = complete(settled.unified)["token_ids"]
    for url in (settled.unified, settled.router):
        assert complete(url, logit_bias={"451": 100}, max_tokens=4)["token_ids"] == [451] * 4
        assert plain[0] not in complete(url, logit_bias={str(plain[0]): -100})["token_ids"]


def test_a_bad_word_is_never_completed_in_either_spelling(settled: Cluster) -> None:
    text = complete(settled.unified, max_tokens=48)["text"]
    words = [word for word in text.split() if word.isalpha()]
    word = max(words, key=words.count)
    tokenizer = load_tokenizer(find_checkpoint(None))
    sequences = [tokenizer.encode(spelling, add_special_tokens=False) for spelling in (word, " " + word)]
    for url in (settled.unified, settled.router):
        found = complete(url, bad_words=[word], max_tokens=48)["token_ids"]
        for sequence in sequences:
            places = range(len(found) - len(sequence) + 1)
            assert not any(found[place : place + len(sequence)] == sequence for place in places)


def test_a_high_frequency_penalty_breaks_a_repetition(settled: Cluster) -> None:
    body = {"prompt": "a b c a b c a b c a b c a b c", "max_tokens": 30}
    for url in (settled.unified, settled.router):
        plain, penalised = (complete(url, **body, frequency_penalty=value)["token_ids"] for value in (0, 2))
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
    expected = complete(settled.unified, prompt=ids, **shaped)["token_ids"]
    for url in (settled.unified, settled.router):
        params = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True, **shaped}
        answer = httpx.post(f"{url}/generate", json={"input_ids": ids, "sampling_params": params}, timeout=120)
        assert answer.json()["output_ids"] == expected


def test_allowed_tokens_that_all_end_the_answer_contradict_min_tokens(settled: Cluster) -> None:
    fields = {"allowed_token_ids": [2], "min_tokens": 1, "ignore_eos": False}
    for url in (settled.unified, settled.router):
        body = {"prompt": PROMPT, "max_tokens": 4, **fields}
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        assert response.status_code == 400
        assert "leaves no token" in response.json()["error"]["message"]

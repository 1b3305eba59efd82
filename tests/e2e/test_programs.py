"""A program of kvist.lang on the real model: with a plan, without one, and with requests of OpenAI's API alone."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

import kvist.lang as kv
from tests.e2e.conftest import Cluster

ESSAY = "Trees give shade and fruit. They clean the air. Birds live in them. "


@kv.function
def review(s: kv.State, essay: str) -> None:
    s += kv.system("You judge essays.")
    s += kv.user("Essay: " + essay)
    forks = s.fork(2)
    forks += [kv.user(f"Is the essay {criterion}?") for criterion in ("clear", "short")]
    forks += kv.assistant("I say:" + kv.select("verdict", ["yes", "no", "perhaps"]))
    forks += kv.user("Why?") + kv.assistant(kv.gen("reason", max_tokens=5, temperature=0.8))
    forks.join()
    s += kv.user(f"{forks[0].ref('reason')} and {forks[1].ref('reason')}. A grade?")
    s += kv.assistant("Grade: " + kv.gen("grade", regex="[A-F]"))


@pytest.fixture
def endpoint(settled: Cluster) -> Iterator[kv.Endpoint]:
    found = kv.RuntimeEndpoint(settled.router)
    yield found
    found.close()


def test_a_program_gives_the_same_tokens_however_it_is_sent(endpoint: kv.Endpoint, settled: Cluster) -> None:
    planned = review.run(essay=ESSAY, backend=endpoint, seed=11)
    plain = review.run(essay=ESSAY, backend=endpoint, seed=11, plan=False)
    openai = kv.OpenAI("SmolLM2-135M-Instruct", base_url=settled.router)
    compatible = review.run(essay=ESSAY, backend=openai, seed=11)
    openai.close()
    for other in (plain, compatible):
        assert planned.text() == other.text()
        assert planned["reason"] == other["reason"]
        assert planned["verdict"] == other["verdict"]
    scores = [state._forks[0][0].get_meta_info("verdict")["scores"] for state in (planned, plain, compatible)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert scores[0] == pytest.approx(
        scores[2], abs=1e-3
    )  # no token spans the end of the prompt, so both score the same
    (score, *_) = (row for row in planned.explain().rows if row.what.startswith("Score"))
    assert (score.work, score.worker) == ("prefill", settled.prefill.removeprefix("http://"))
    assert "no /v1/continuations/score" in str(compatible.explain())
    assert httpx.get(f"{settled.router}/v1/leases").json()["data"] == []

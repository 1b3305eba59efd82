"""A program of kvist.lang: with a plan, without one, and with requests of OpenAI's API alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import kvist.lang as kv
from kvist.errors import ProgramError
from kvist.testing.rounds import check_time, in_rounds
from tests.e2e.conftest import MODEL, Cluster
from tests.e2e.test_failover import kill

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
    openai = kv.OpenAI(MODEL, base_url=settled.router)
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


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"json_schema": {"type": "foo"}}, "`json_schema`: "),
        ({"regex": "(?=a)b"}, "`regex`: "),
        ({"return_logprob": True, "top_logprobs_num": 1000}, "`top_logprobs_num` must be 0 to 20"),
        ({"choices": ["word " * 5000, "b"]}, "`choices[0]` must have 1 to "),
        ({"stop": ["a"] * 40}, "`stop` may have at most "),
    ],
)
def test_an_argument_that_the_server_refuses_is_named_with_its_line(
    endpoint: kv.Endpoint, options: dict[str, Any], name: str
) -> None:
    @kv.function
    def ask(s: kv.State) -> None:
        s += kv.user("Q")
        s += kv.assistant(kv.gen("x", max_tokens=4, **options))

    with pytest.raises(ProgramError, match=r"^test_programs\.py:\d+: " + re.escape(name)):
        ask.run(backend=endpoint)


@kv.function
def tales(s: kv.State) -> None:
    s += kv.system("You tell short tales. " * 12)
    forks = s.fork(3)
    forks += [kv.user(f"A tale of the {hero}.") for hero in ("fox", "owl", "mole")]
    forks += kv.assistant(kv.gen("tale", max_tokens=120, ignore_eos=True, temperature=0.8))
    forks += kv.user("Is it sad?") + kv.assistant(kv.select("sad", ["yes", "no"]))
    forks.join()
    s += kv.user(f"The best tale? {forks[0].ref('tale')} Or {forks[2].ref('tale')}")
    s += kv.assistant(kv.gen("best", max_tokens=20, ignore_eos=True))


@in_rounds(3)  # on a busy machine, the program can end before the worker is killed
def test_a_program_whose_worker_is_killed_gives_what_an_undisturbed_run_gives(
    endpoint: kv.Endpoint, settled: Cluster
) -> None:
    settled.wait_ready()
    undisturbed = tales.run(backend=endpoint, seed=5)
    done = settled.metric("kvist:generation_tokens_total")
    state = tales.run(backend=endpoint, seed=5, stream=True)
    with ThreadPoolExecutor(1) as pool:
        pieces = pool.submit(lambda: "".join(state.text_iter()))
        settled.wait_until(lambda: settled.metric("kvist:generation_tokens_total") > done + 20, within_s=60)
        is_early = not pieces.done()
        kill(settled, "decode-0", "worker")
        streamed = pieces.result()
    assert state.error() is None
    assert streamed == "".join(undisturbed.text_iter())
    assert state.text() == undisturbed.text()
    assert [state["tale"], state["sad"]] == [undisturbed["tale"], undisturbed["sad"]]
    settled.wait_ready()
    settled.wait_until(lambda: httpx.get(f"{settled.router}/v1/leases").json()["data"] == [], within_s=40)
    check_time(is_early, "the program ended before the worker was killed")

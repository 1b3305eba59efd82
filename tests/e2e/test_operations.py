"""An operator at work on a real cluster under load: no stream notices."""

from __future__ import annotations

import re
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from kvist import cli
from kvist.cluster.stop_requests import HURRY
from tests.e2e.conftest import Cluster

PROMPTS = [f"{number} is a number, and the next numbers are" for number in range(3)]
NUM_TOKENS = 64
# The first prompt's answers have a form: another worker rebuilds the state of the grammar from the tokens so far.
FORMS = {PROMPTS[0]: {"regex": "([a-z]{2,6} [0-9]{1,3}; )*"}}


def completion(url: str, prompt: str, num_tokens: int = NUM_TOKENS) -> str:
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    body |= FORMS.get(prompt, {})
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == httpx.codes.OK, answer.text
    return str(answer.json()["choices"][0]["text"])


def roles(cluster: Cluster) -> dict[str, str]:
    workers = httpx.get(f"{cluster.router}/workers", timeout=60).json()["workers"]
    return {worker["url"]: worker["role"] for worker in workers}


def wait_for_roles(cluster: Cluster, wanted: dict[str, str]) -> None:
    cluster.wait_until(lambda: wanted.items() <= roles(cluster).items(), within_s=60)


def test_prefill_and_decode_exchange_their_roles_under_load_and_back(settled: Cluster) -> None:
    cluster = settled
    expected = [completion(cluster.unified, prompt) for prompt in PROMPTS]
    assert re.match("[a-z]{2,6} [0-9]{1,3}; [a-z]", expected[0]), expected[0]
    num_failovers = cluster.metric("kvist:failovers_total")
    with ThreadPoolExecutor(2 * len(PROMPTS)) as readers:

        def ask_all() -> list[Future[str]]:
            return [readers.submit(completion, cluster.router, prompt) for prompt in PROMPTS]

        for prefill, decode in ((cluster.decode, cluster.prefill), (cluster.prefill, cluster.decode)):
            before = ask_all()
            cluster.wait_until(lambda: cluster.num_running() >= 2, within_s=60)
            assert cli.main(["role", prefill, "prefill", "--url", cluster.router]) == 0
            assert cli.main(["role", decode, "decode", "--url", cluster.router]) == 0
            during = ask_all()
            wait_for_roles(cluster, {prefill: "prefill", decode: "decode"})
            num_handoffs = cluster.metric("kvist:handoffs_total")
            assert [answer.result() for answer in (*before, *during)] == [*expected, *expected]
            assert completion(cluster.router, PROMPTS[0]) == expected[0]
            assert cluster.metric("kvist:handoffs_total") > num_handoffs, "the new pair hands over"
            of_prefill = {"role": "prefill", "worker": prefill.removeprefix("http://")}
            cluster.wait_until(
                lambda labels=of_prefill: cluster.metric("kvist:worker_prompt_tokens_total", **labels) > 0,  # type: ignore[misc]
                within_s=60,
            )
    assert cluster.metric("kvist:failovers_total") == num_failovers, "no stream needed a second attempt"


def test_a_worker_s_own_port_switches_it_and_a_wrong_name_is_an_error(settled: Cluster) -> None:
    answer = httpx.post(f"{settled.prefill}/role", json={"role": "unified"}, timeout=60)
    assert answer.status_code == httpx.codes.OK, answer.text
    wait_for_roles(settled, {settled.prefill: "unified"})
    assert completion(settled.router, PROMPTS[0])
    httpx.post(f"{settled.prefill}/role", json={"role": "prefill"}, timeout=60).raise_for_status()
    wait_for_roles(settled, {settled.prefill: "prefill"})
    assert cli.main(["role", "nobody", "decode", "--url", settled.router]) == 1


def state_of(cluster: Cluster, url: str) -> str:
    workers = httpx.get(f"{cluster.router}/workers", timeout=60).json()["workers"]
    return next(str(worker["state"]) for worker in workers if worker["url"] == url)


def test_a_drained_worker_ends_with_0_and_what_is_left_at_the_limit_goes_on_elsewhere(settled: Cluster) -> None:
    cluster = settled
    expected = [completion(cluster.unified, prompt, 2 * NUM_TOKENS) for prompt in PROMPTS]
    num_resumed = cluster.metric("kvist:failovers_total")
    with ThreadPoolExecutor(len(PROMPTS)) as readers:
        answers = [readers.submit(completion, cluster.router, prompt, 2 * NUM_TOKENS) for prompt in PROMPTS]
        cluster.wait_until(lambda: cluster.num_running() >= len(PROMPTS), within_s=60)
        drained = httpx.post(f"{cluster.decode}/drain", timeout=60)
        assert drained.status_code == httpx.codes.ACCEPTED, drained.text
        cluster.wait_until(lambda: state_of(cluster, cluster.decode) == "draining", within_s=60)
        cluster.processes.children["decode-0"].send(HURRY)  # the limit is over
        assert [answer.result() for answer in answers] == expected
    assert expected[0].startswith(completion(cluster.router, PROMPTS[0], 8))
    assert cluster.metric("kvist:failovers_total") > num_resumed
    cluster.wait_until(lambda: any("exited with status 0" in line for line in cluster.lines), within_s=60)


def test_the_fleet_is_shown_in_a_terminal(
    settled: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal shortens the roles, depending on the width of the figures
    completion(settled.router, PROMPTS[0], 4)

    def roles_shown() -> list[str]:
        assert cli.main(["top", settled.router, "--once"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"{settled.router}  ready  router ")
        shown = [line.split() for line in lines if " ready " in line][1:]
        return sorted(words[1] for words in shown)

    settled.wait_until(lambda: roles_shown() == ["decode", "prefill"], within_s=60)

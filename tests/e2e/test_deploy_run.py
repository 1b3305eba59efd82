"""A manifest as processes of this machine: every role is Ready, and streams survive an upgrade in place."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvist.deploy.description import ContainerOptions, Deployment, ManifestOptions, RoleCounts
from kvist.deploy.render import manifest_text
from kvist.testing.tiny_model import write_tiny_model
from kvist.testing.tokenizers import write_byte_tokenizer

KEY = "key-of-the-clients"
PROMPTS = [f"Question number {number}: " + "the same words before every question. " * 3 for number in range(6)]
LIMIT_S = 180.0


def manifest(model: Path, tag: str) -> str:
    """Return a manifest without the seconds in which load balancers of a cluster notice an unready pod."""
    text = manifest_text(
        Deployment(
            manifest=ManifestOptions(name="pd"),
            counts=RoleCounts(prefill=1, decode=1),
            container=ContainerOptions(
                image=f"kvist:{tag}",
                model_path="/models",
                model_folder=str(model),
                hicache_size=0.05,
                drain_timeout_s=20.0,
                worker_args=("--load-format=dummy", "--max-total-tokens=4096", "--num-threads=1"),
            ),
        )
    )
    for wait, shorter in (("gracePeriodSeconds: 5", "0"), ("--drain-grace-s=5", "0"), ("minReadySeconds: 5", "3")):
        assert wait in text
        text = text.replace(wait, wait[:-1] + shorter)
    return text


class Running:
    """The process of `kvist deploy run`, and its lines."""

    def __init__(self, file: Path, log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                (sys.executable, "-m", "kvist", "deploy", "run", str(file), f"--api-key={KEY}", "--stop-with-stdin"),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def lines(self) -> list[str]:
        return self._log.read_text(encoding="utf-8", errors="replace").splitlines()

    def until(self, found: Callable[[], Any]) -> Any:
        end_s = time.monotonic() + LIMIT_S
        while not (value := found()):
            assert self.process.poll() is None, "\n".join(self.lines()[-60:])
            assert time.monotonic() < end_s, "\n".join(self.lines()[-60:])
            time.sleep(0.1)
        return value

    def url(self) -> str:
        words = self.until(lambda: next((own for own in self.own() if own.startswith("ready at ")), None))
        return str(words.split()[2])

    def own(self) -> list[str]:
        """Return the lines of `kvist deploy run` itself, without those of the pods."""
        parts = [line.partition(" | ") for line in self.lines()]
        return [text for name, _, text in parts if name.strip() == "kvist"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path, Path]]:
    tmp_path = tmp_path_factory.mktemp("deploy")
    model = tmp_path / "model"
    model.mkdir()
    write_tiny_model(model, vocab_size=write_byte_tokenizer(model), max_model_len=1024)
    file = tmp_path / "cluster.yaml"
    file.write_text(manifest(model, "1.0"), encoding="utf-8")
    started = Running(file, tmp_path / "log")
    try:
        yield started, file, model
    finally:
        assert started.process.stdin is not None
        started.process.stdin.close()
        try:
            assert started.process.wait(LIMIT_S) == 0
        finally:
            started.process.kill()


class Client:
    """Streams of every prompt, again and again; each is compared with the same stream before the upgrade."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.wanted: dict[str, list[int]] = {}
        self.num_compared = 0
        self.longest_pause_s = 0.0
        self.stop = asyncio.Event()

    async def stream(self, http: httpx.AsyncClient, prompt: str) -> list[int]:
        body = {
            "prompt": prompt,
            "max_tokens": 24,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        pieces: list[int] = []
        last_s, ended = time.monotonic(), False
        async with http.stream("POST", f"{self._url}/v1/completions", json=body) as response:
            assert response.status_code == httpx.codes.OK, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    pieces += event["choices"][0]["token_ids"]
                    now_s = time.monotonic()
                    self.longest_pause_s, last_s = max(self.longest_pause_s, now_s - last_s), now_s
                ended = ended or line == "data: [DONE]"
        assert ended
        return pieces

    async def again(self, http: httpx.AsyncClient, prompt: str) -> None:
        while not self.stop.is_set():
            assert await self.stream(http, prompt) == self.wanted[prompt]
            self.num_compared += 1


def test_a_change_that_cannot_be_made_in_place_is_refused_and_the_cluster_runs_on(
    running: tuple[Running, Path, Path],
) -> None:
    process, file, model = running
    url = process.url()
    file.write_text(
        manifest(model, "1.0").replace("--max-total-tokens=4096", "--max-total-tokens=2048"), encoding="utf-8"
    )
    assert "only the images" in process.until(
        lambda: next((one for one in process.own() if "is not applied" in one), None)
    )
    file.write_text("kind: [", encoding="utf-8")
    assert process.until(lambda: next((one for one in process.own() if "is not YAML" in one), None))
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": PROMPTS[0], "max_tokens": 2, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60.0, trust_env=False)
    assert answer.status_code == httpx.codes.OK


async def test_an_upgrade_in_place_costs_no_stream_a_token(running: tuple[Running, Path, Path]) -> None:
    process, file, model = running
    url = await asyncio.to_thread(process.url)
    ready = [line.split()[0] for line in process.own() if " Ready " in line]
    assert ready == ["prefill-0", "decode-0", "router-0"]
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}, timeout=60.0, trust_env=False) as http:
        assert (await http.get(f"{url}/v1/models")).status_code == httpx.codes.OK
        async with httpx.AsyncClient(trust_env=False) as stranger:
            assert (await stranger.get(f"{url}/v1/models")).status_code == httpx.codes.UNAUTHORIZED
        client = Client(url)
        for prompt in PROMPTS:
            client.wanted[prompt] = await client.stream(http, prompt)
        streams = [asyncio.create_task(client.again(http, prompt)) for prompt in PROMPTS]
        file.write_text(manifest(model, "1.1"), encoding="utf-8")
        waiting = asyncio.create_task(asyncio.to_thread(process.until, lambda: "upgraded" in process.own()))
        await asyncio.wait([waiting, *streams], return_when=asyncio.FIRST_COMPLETED)
        client.stop.set()
        await asyncio.gather(waiting, *streams)
        usage = (
            await http.post(
                f"{url}/v1/completions",
                json={"prompt": PROMPTS[0], "max_tokens": 1, "temperature": 0},
            )
        ).json()["usage"]
    replaced = [line.split()[0] for line in process.own() if "runs kvist:1.1" in line]
    assert replaced == ["prefill-0", "decode-0", "router-0"]
    assert client.num_compared > len(PROMPTS)
    assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] / 2, usage
    assert client.longest_pause_s < 20.0, client.longest_pause_s

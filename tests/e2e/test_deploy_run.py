"""A manifest as processes of this machine: all five roles are Ready, and an upgrade in place to another checkout of
Kvist costs no stream a token and no prompt its cached pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import bench_deploy
import kvist
from bench_deploy import Running
from kvist.deploy.description import ContainerOptions, Deployment, ManifestOptions, RoleCounts
from kvist.deploy.render import manifest_text
from kvist.testing.tiny_model import write_tiny_model
from kvist.testing.tokenizers import write_byte_tokenizer

NEW_VERSION = "99.0"
PODS = ["mooncake-master-0", "mooncake-store-0", "prefill-0", "decode-0", "router-0"]
ASKED = {"prompt": "a question", "max_tokens": 2, "temperature": 0}
MAX_PAUSE_S = 20.0  # seconds on an idle machine: 0.3
LINE_S = 30.0


def manifest(model: Path) -> str:
    """Return a manifest without the seconds in which load balancers of a cluster notice an unready pod."""
    text = manifest_text(
        Deployment(
            manifest=ManifestOptions(name="pd"),
            counts=RoleCounts(prefill=1, decode=1, stores=1),
            container=ContainerOptions(
                model_path="/models",
                model_folder=str(model),
                hicache_size=0.05,
                segment_size=0.1,
                ssd_size=0.1,
                hicache_mooncake_replica_num=1,
                drain_timeout_s=10.0,
                worker_args=("--load-format=dummy", "--max-total-tokens=4096", "--num-threads=1"),
            ),
        )
    )
    for wait, shorter in (("gracePeriodSeconds: 5", "0"), ("--drain-grace-s=5", "0"), ("minReadySeconds: 5", "3")):
        assert wait in text
        text = text.replace(wait, wait[:-1] + shorter)
    return bench_deploy.with_tag(text, "old")


def other_checkout(folder: Path) -> Path:
    """Return the folder src of a copy of Kvist with another version."""
    source = Path(kvist.__file__).parent
    shutil.copytree(source, folder / "src" / "kvist")
    begin = folder / "src" / "kvist" / "__init__.py"
    begin.write_text(begin.read_text(encoding="utf-8").replace(kvist.__version__, NEW_VERSION), encoding="utf-8")
    return folder / "src"


@pytest.fixture(scope="module")
def running(mooncake_library: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:  # noqa: ARG001
    folder = tmp_path_factory.mktemp("deploy")
    (folder / "model").mkdir()
    write_tiny_model(folder / "model", vocab_size=write_byte_tokenizer(folder / "model"), max_model_len=1024)
    file = folder / "cluster.yaml"
    file.write_text(manifest(folder / "model"), encoding="utf-8")
    python = bench_deploy.python_of_source(other_checkout(folder), folder / "python")
    started = Running(file, folder / "log", [f"--images=kvist:new={python}"])
    try:
        yield started, file
    finally:
        assert started.stop() == 0


def test_a_change_that_cannot_be_made_in_place_is_refused_and_the_cluster_runs_on(
    running: tuple[Running, Path],
) -> None:
    process, file = running
    url, before = process.url(), file.read_text(encoding="utf-8")
    assert list(process.pods()) == PODS
    for wrong, words in (
        (before.replace("--max-total-tokens=4096", "--max-total-tokens=2048"), "only the images"),
        ("kind: [", "is not YAML"),
    ):
        file.write_text(wrong, encoding="utf-8")
        process.until(lambda lines, words=words: next((line for line in lines if words in line), None), LINE_S)  # type: ignore[misc]
    file.write_text(before, encoding="utf-8")
    headers = {"Authorization": f"Bearer {bench_deploy.KEY}"}
    for sent, status in ((headers, httpx.codes.OK), ({}, httpx.codes.UNAUTHORIZED)):
        answer = httpx.post(f"{url}/v1/completions", json=ASKED, headers=sent, timeout=60.0, trust_env=False)
        assert answer.status_code == status


async def test_an_upgrade_in_place_costs_no_stream_a_token_and_keeps_the_cache(running: tuple[Running, Path]) -> None:
    process, file = running
    outcome = await bench_deploy.upgrade_under_load(
        process,
        file,
        bench_deploy.parse(
            [str(file), "--streams=3", "--pause-s=0.8", "--cases=9", "--max-tokens=16-64", "--upgrade-timeout-s=300"]
        ),
    )
    bench_deploy.show(outcome)
    tally = outcome.disturbance.tally
    assert (tally.errors, tally.wrong) == ([], [])
    assert tally.num_streams >= 10
    assert outcome.replaced == PODS
    hooks = {line.partition(":")[0]: line for line in process.own_lines() if "preStop" in line}
    assert list(hooks) == ["prefill-0", "decode-0"]  # the router leaves its socket to the next one
    assert all(line.endswith("has run") for line in hooks.values()), hooks
    assert outcome.versions == dict.fromkeys(PODS[2:], NEW_VERSION)
    assert outcome.disturbance.longest_pause_s < MAX_PAUSE_S
    assert outcome.hits_before > 0.5
    assert abs(outcome.hits_after - outcome.hits_before) <= bench_deploy.MAX_CHANGE_OF_HITS
    assert outcome.is_clean

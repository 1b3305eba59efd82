"""Does an upgrade in place disturb the users of a manifest?

    python bench/bench_deploy.py deploy/examples/pd-mooncake.yaml
    python bench/bench_deploy.py MANIFEST --old-source ../kvist-before/src     (the old image is another checkout)

Runs a copy of the manifest by `kvist deploy run`, and asks every case twice: the first answer is the twin that later
ones are compared with, the second gives the cache hits before the upgrade. Then streams of every kind are kept open
while all images of the file change, and every case is asked once more, for the cache hits after the upgrade.
Exit status 0: no error, no wrong token, every pod replaced, and cache hits within five points. 1: a finding. 2: the run
could not be made.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from chaos_cluster import ChaosFailure
from chaos_load import Answer
from kvist.http_client import HttpClient, read_whole
from upgrade_load import Disturbance, Result, add_load_options, answers_of, cases_of, report, under_load

T = TypeVar("T")

START_TIMEOUT_S = 400.0
STOP_TIMEOUT_S = 200.0
MAX_CHANGE_OF_HITS = 0.05
KEY = "key-of-the-clients"
UPGRADED = "upgraded"  # the last line of an upgrade
_IMAGE = re.compile(r"(?m)^(\s*(?:- )?image:) .*$")


def with_tag(manifest: str, tag: str) -> str:
    """Return the manifest with `kvist:TAG` as the image of all its containers."""
    return _IMAGE.sub(rf"\1 kvist:{tag}", manifest)


def python_of_source(source: Path, file: Path) -> Path:
    """Write a command that is this Python with another checkout of Kvist, whose package is in the folder `source`."""
    if not (source / "kvist" / "__init__.py").is_file():
        raise ChaosFailure(f"{source} has no package kvist: name the folder src of a checkout")
    file.write_text(f'#!/bin/sh\nPYTHONPATH="{source.resolve()}" exec "{sys.executable}" "$@"\n', encoding="utf-8")
    file.chmod(0o700)
    return file


class Running:
    """A process of `kvist deploy run`, and its lines. Mutable; ended by `stop`."""

    def __init__(self, manifest: Path, log: Path, options: Sequence[str] = ()) -> None:
        self._log = log
        environ = {name: value for name, value in os.environ.items() if not name.startswith("KVIST_")}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                (
                    *(sys.executable, "-m", "kvist", "deploy", "run", str(manifest), f"--api-key={KEY}"),
                    "--stop-with-stdin",
                    *options,
                ),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
            )

    def own_lines(self) -> list[str]:
        """Return the lines of `kvist deploy run` itself, without those of the pods."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        parts = [line.partition(" | ") for line in lines]
        return [text for name, _, text in parts if name.strip() == "kvist"]

    def until(self, found: Callable[[list[str]], T | None], timeout_s: float = START_TIMEOUT_S) -> T:
        """Wait until the function finds something in the lines, and return it. Raises `ChaosFailure`."""
        give_up_s = time.monotonic() + timeout_s
        while (value := found(self.own_lines())) is None:
            if self._process.poll() is not None or time.monotonic() > give_up_s:
                end = self._log.read_text(encoding="utf-8", errors="replace")[-20_000:]
                raise ChaosFailure(f"kvist deploy run did not get there; the end of its output:\n{end}")
            time.sleep(0.1)
        return value

    def url(self) -> str:
        """Return the address of the router, when every pod is ready."""
        line = self.until(lambda lines: next((line for line in lines if line.startswith("ready at ")), None))
        return line.split()[2]

    def pods(self) -> dict[str, str]:
        """Return the address of each pod that was ready."""
        rows = [line.split() for line in self.own_lines() if " Ready " in line]
        return {row[0]: row[2] for row in rows}

    def replaced(self, image: str) -> list[str]:
        """Return the pods that run the image after an upgrade, in the order of the upgrade."""
        return [line.split()[0] for line in self.own_lines() if f" runs {image}," in line]

    def stop(self) -> int:
        """Stop all pods, and return the exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        finally:
            self._process.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    disturbance: Disturbance
    hits_before: float  # share of the prompt tokens that were cached
    hits_after: float
    versions: dict[str, str]  # after the upgrade, of the pods that serve requests
    num_pods: int
    replaced: list[str]

    @property
    def is_clean(self) -> bool:
        return (
            self.disturbance.is_clean
            and len(self.replaced) == self.num_pods
            and abs(self.hits_after - self.hits_before) <= MAX_CHANGE_OF_HITS
        )


def hit_rate(answers: Sequence[Answer]) -> float:
    return sum(answer.num_cached_tokens for answer in answers) / sum(
        answer.num_prompt_tokens or 0 for answer in answers
    )


def _end_of_upgrade(lines: Sequence[str]) -> str | None:
    """Return the line that ends an upgrade; None if there is none yet."""
    begun = next((number for number, line in enumerate(lines) if line.startswith("upgrading ")), len(lines))
    return next((line for line in lines[begun:] if line == UPGRADED or "is not applied" in line), None)


async def version_at(url: str) -> str:
    client = HttpClient(url, api_key=KEY)
    try:
        _, body = await read_whole(client, "/server_info", timeout_s=30.0)
    finally:
        client.close()
    return str(json.loads(body).get("version"))


async def upgrade_under_load(running: Running, manifest: Path, args: argparse.Namespace) -> Outcome:
    """Change the images of the running manifest to kvist:new while streams are open. Raises `ChaosFailure`."""
    url = await asyncio.to_thread(running.url)
    cases = cases_of(args)
    twins = await answers_of(url, cases, KEY)
    before = hit_rate(await answers_of(url, cases, KEY))
    pairs = list(zip(cases, twins, strict=True))

    async def upgrade() -> None:
        manifest.write_text(with_tag(manifest.read_text(encoding="utf-8"), "new"), encoding="utf-8")
        ended = await asyncio.to_thread(running.until, _end_of_upgrade, timeout_s=args.upgrade_timeout_s)
        if ended != UPGRADED:
            raise ChaosFailure(ended)

    _, disturbance = await under_load(url, pairs, args, upgrade, timeout_s=args.upgrade_timeout_s, api_key=KEY)
    after = hit_rate(await answers_of(url, cases, KEY))
    pods = running.pods()
    served = {name: where for name, where in pods.items() if not name.startswith("mooncake-")}
    return Outcome(
        disturbance=disturbance,
        hits_before=before,
        hits_after=after,
        versions={name: await version_at(where) for name, where in served.items()},
        num_pods=len(pods),
        replaced=running.replaced("kvist:new"),
    )


def run(args: argparse.Namespace, folder: Path) -> Outcome:
    manifest = folder / "cluster.yaml"
    manifest.write_text(with_tag(args.manifest.read_text(encoding="utf-8"), "old"), encoding="utf-8")
    options = []
    for tag, source in (("old", args.old_source), ("new", args.new_source)):
        if source is not None:
            options.append(f"--images=kvist:{tag}={python_of_source(source, folder / f'python-{tag}')}")
    running = Running(manifest, folder / "log", [*options, *args.run_args])
    try:
        return asyncio.run(upgrade_under_load(running, manifest, args))
    finally:
        running.stop()


def show(outcome: Outcome) -> None:
    upgrade_s, num_replaced = outcome.disturbance.upgrade_s, len(outcome.replaced)
    print(f"upgrade           {upgrade_s:.0f} s, {num_replaced} of {outcome.num_pods} pods replaced:")
    print(f"                  {', '.join(outcome.replaced)}")
    print(f"versions          {', '.join(f'{name} {version}' for name, version in outcome.versions.items())}")
    outcome.disturbance.show()
    print(f"cache hits        {outcome.hits_before:.1%} before, {outcome.hits_after:.1%} after")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument(
        "--old-source", type=Path, help="folder src of the checkout that runs first; by default this one"
    )
    parser.add_argument(
        "--new-source", type=Path, help="folder src of the checkout of the upgrade; by default this one"
    )
    parser.add_argument("--run-args", nargs="*", default=[], help="further options of kvist deploy run")
    parser.add_argument("--upgrade-timeout-s", type=float, default=1200.0)
    add_load_options(parser, streams=4, cases=27, max_tokens="16-96")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)

    def result(folder: Path) -> Result:
        outcome = run(args, folder)
        show(outcome)
        about = {
            "replaced": outcome.replaced,
            "versions": outcome.versions,
            "hits_before": outcome.hits_before,
            "hits_after": outcome.hits_after,
        }
        return Result(is_clean=outcome.is_clean, figures={**about, **outcome.disturbance.figures()})

    return report("bench_deploy", args, result, kept=["log"])


if __name__ == "__main__":
    sys.exit(main())

"""Streams that stay open during an upgrade, and the report on them: shared by bench_upgrade.py and bench_deploy.py.

Every answer is compared with its twin, the answer to the same case before the upgrade.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

from chaos import Load, Tally
from chaos_cluster import ChaosFailure
from chaos_load import Answer, Case, Comparison, StreamReader, make_cases, read_answer
from json_report import write_report
from kvist.clock import MonotonicClock
from kvist.http_client import HttpClient, HttpFailure

BEFORE_S = AFTER_S = 2.0  # load before and after the upgrade
MAX_SHOWN = 10  # errors, and wrong answers

Told = TypeVar("Told")


@dataclass(slots=True, kw_only=True)
class OneGateway:
    """The cluster as `chaos.Load` sees it: one gateway, whose address stays."""

    url: str
    gateways: list[SimpleNamespace] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gateways = [SimpleNamespace(name="router", num_ends=0, plan=SimpleNamespace(url=self.url))]

    @property
    def members(self) -> dict[str, SimpleNamespace]:
        return {gateway.name: gateway for gateway in self.gateways}

    def ready_gateways(self) -> list[str]:
        return list(self.members)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """The effects of an upgrade on its users."""

    tally: Tally
    upgrade_s: float

    @property
    def longest_pause_s(self) -> float:
        return max((end_s - begin_s for begin_s, end_s in self.tally.gaps), default=0.0)

    @property
    def is_clean(self) -> bool:
        return not (self.tally.errors or self.tally.wrong)

    def show(self) -> None:
        tally = self.tally
        print(f"streams           {tally.num_streams} compared, {tally.num_left} left by their clients")
        print(f"resumed           {tally.num_resumed} streams, {tally.num_failovers} failovers")
        print(f"errors            {len(tally.errors)}")
        print(f"wrong tokens      {len(tally.wrong)}")
        longest_s = max(tally.first_s, default=0.0)
        print(f"longest pause     {self.longest_pause_s:.2f} s; longest TTFT {longest_s:.2f} s")
        for line in [*tally.errors[:MAX_SHOWN], *tally.wrong[:MAX_SHOWN]]:
            print(f"  {line}")

    def figures(self) -> dict[str, object]:
        tally = self.tally
        return {
            "upgrade_s": self.upgrade_s,
            "streams": tally.num_streams,
            "resumed": tally.num_resumed,
            "failovers": tally.num_failovers,
            "errors": tally.errors,
            "wrong": tally.wrong,
            "longest_pause_s": self.longest_pause_s,
            "longest_ttft_s": max(tally.first_s, default=0.0),
        }


def add_load_options(parser: argparse.ArgumentParser, *, streams: int, cases: int, max_tokens: str) -> None:
    """Add the options that `cases_of`, `under_load` and `report` read, with these defaults."""
    parser.add_argument("--streams", type=int, default=streams, help="clients, each with one stream")
    parser.add_argument("--pause-s", type=float, default=0.0, help="of a client between two streams")
    parser.add_argument("--cases", type=int, default=cases, help="different requests")
    parser.add_argument("--max-tokens", default=max_tokens, help="of an answer: LOW-HIGH")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--keep", type=Path, help="keep the log in this new folder")


def cases_of(args: argparse.Namespace) -> list[Case]:
    low, _, high = args.max_tokens.partition("-")
    bounds = (int(low), int(high or low))
    return make_cases(seed=args.seed, count=args.cases, max_tokens=bounds, comparison=Comparison.TOKENS)


async def answers_of(url: str, cases: Sequence[Case], api_key: str | None) -> list[Answer]:
    """Ask every case once. Raises `ChaosFailure`."""
    client, answers = HttpClient(url, api_key=api_key), []
    try:
        for case in cases:
            reader = StreamReader()
            try:
                await read_answer(client, case, reader, MonotonicClock())
            except HttpFailure as failure:
                raise ChaosFailure(f"no twin of {case.name}: {failure}") from failure
            if not reader.answer.is_whole:
                raise ChaosFailure(f"no twin of {case.name}: {reader.answer.error}")
            answers.append(reader.answer)
    finally:
        client.close()
    return answers


async def under_load(
    url: str,
    pairs: Sequence[tuple[Case, Answer]],
    args: argparse.Namespace,
    upgrade: Callable[[], Awaitable[Told]],
    *,
    timeout_s: float,
    api_key: str | None = None,
) -> tuple[Told, Disturbance]:
    """Keep streams open before, during and after the upgrade; return its result, and what it disturbed."""
    gateway: object = OneGateway(url=url)
    load = Load(gateway, pairs, args.seed, api_key=api_key, pause_s=args.pause_s)  # type: ignore[arg-type]
    reading = asyncio.create_task(load.run(timeout_s, args.streams))
    try:
        await asyncio.sleep(BEFORE_S)
        began_s = time.monotonic()
        told = await upgrade()
        upgrade_s = time.monotonic() - began_s
        await asyncio.sleep(AFTER_S)
        load.end()
        await reading
    finally:
        reading.cancel()
    return told, Disturbance(tally=load.tally, upgrade_s=upgrade_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a run ends."""

    is_clean: bool
    figures: Mapping[str, object]


def report(name: str, args: argparse.Namespace, run: Callable[[Path], Result], kept: Sequence[str]) -> int:
    """Run in a temporary folder and write the figures; return the exit status. `kept`: the files of the folder that
    `--keep` copies."""
    folder, status = Path(tempfile.mkdtemp(prefix=f"kvist-{name}-")), 2
    try:
        result = run(folder)
        status = 0 if result.is_clean else 1
        if args.json:
            write_report(args.json, args, **result.figures)
    except ChaosFailure as failure:
        print(f"{name}: {failure}", file=sys.stderr)
    finally:
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            for file in kept:
                if (folder / file).is_file():
                    shutil.copy(folder / file, args.keep / file)
        shutil.rmtree(folder, ignore_errors=True)
    return status

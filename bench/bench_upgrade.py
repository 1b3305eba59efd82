"""Does an upgrade of a whole cluster disturb a stream?

    python bench/bench_upgrade.py --order start-first
    python bench/bench_upgrade.py --persist               (workers keep their pages in folders, and stop first)
    python bench/bench_upgrade.py --stores 3              (with a page pool of Mooncake; with --persist it has SSDs)

Starts `kvist up` with a small model in fp32 on the CPU, keeps streams of every kind open, and replaces every process by
`kvist upgrade` meanwhile. Every answer is compared with its twin, the answer of the same cluster before the upgrade.
Exit status 0: no error, no wrong token, every process replaced. 1: a finding. 2: the run could not be made.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from chaos import Load
from chaos_cluster import ChaosFailure, tail
from chaos_load import Answer, Case, Comparison, StreamReader, make_cases, read_answer
from json_report import write_report
from kvist.bench.http import HttpClient, HttpFailure, read_whole
from kvist.clock import MonotonicClock
from kvist.cluster.ports import LOOPBACK, free_ports
from kvist.testing.tiny_model import write_tiny_model
from kvist.testing.tokenizers import write_byte_tokenizer

START_TIMEOUT_S = 240.0
UPGRADE_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
BEFORE_S = AFTER_S = 2.0  # load before and after the upgrade
NUM_TOKENS = 4096


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


def up_command(args: argparse.Namespace, folder: Path, port: int) -> list[str]:
    (folder / "model").mkdir()
    vocab_size = write_byte_tokenizer(folder / "model")
    write_tiny_model(folder / "model", vocab_size=vocab_size, max_model_len=1024)
    tiers = [f"--hicache-persist={folder / 'pages'}", "--enable-hierarchical-cache"] if args.persist else []
    if args.stores:
        tiers += ["--storage=mooncake", f"--stores={args.stores}", "--segment-size=0.064"]
        tiers.append("--hicache-storage-prefetch-threshold=16")
    if args.stores and args.persist:
        (folder / "ssd").mkdir()
        tiers += [f"--ssd-path={folder / 'ssd'}", "--ssd-size=0.5"]
    return [
        *(sys.executable, "-m", "kvist", "up", f"--model-path={folder / 'model'}", "--load-format=dummy"),
        *("--device=cpu", f"--port={port}", f"--runtime-dir={folder / 'runtime'}", f"--max-total-tokens={NUM_TOKENS}"),
        *(f"--prefill={args.prefill}", f"--decode={args.decode}", f"--unified={args.unified}", "--no-access-log"),
        *(f"--shutdown-timeout-s={args.drain_s}", *tiers),
    ]


async def wait_ready(client: HttpClient, up: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the control socket can be used: the last thing that `kvist up` opens is announced in its log."""
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while "(Ctrl-C stops everything)" not in log.read_text(errors="replace"):
        if up.poll() is not None or time.monotonic() > give_up_s:
            raise ChaosFailure(f"the cluster is not ready; the end of its output:\n{tail(log)}")
        await asyncio.sleep(0.1)
    status, _ = await read_whole(client, "/ready", timeout_s=10.0)
    if status != 200:
        raise ChaosFailure(f"the cluster is not ready: status {status}")


async def answers_of(client: HttpClient, cases: Sequence[Case]) -> list[Answer]:
    answers = []
    for case in cases:
        reader = StreamReader()
        try:
            await read_answer(client, case, reader, MonotonicClock())
        except HttpFailure as failure:
            raise ChaosFailure(f"no twin of {case.name}: {failure}") from failure
        if not reader.answer.is_whole:
            raise ChaosFailure(f"no twin of {case.name}: {reader.answer.error}")
        answers.append(reader.answer)
    return answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    load: Load
    status: int  # of kvist upgrade
    report: str
    upgrade_s: float

    @property
    def longest_pause_s(self) -> float:
        return max((end_s - begin_s for begin_s, end_s in self.load.tally.gaps), default=0.0)

    @property
    def is_clean(self) -> bool:
        return not (self.status or self.load.tally.errors or self.load.tally.wrong)


async def measure(args: argparse.Namespace, folder: Path, up: subprocess.Popen[bytes], port: int) -> Outcome:
    url = f"http://{LOOPBACK}:{port}"
    client = HttpClient(url, api_key=None)
    try:
        await wait_ready(client, up, folder / "up.log")
        low, _, high = args.max_tokens.partition("-")
        bounds = (int(low), int(high or low))
        cases = make_cases(seed=args.seed, count=args.cases, max_tokens=bounds, comparison=Comparison.TOKENS)
        pairs = list(zip(cases, await answers_of(client, cases), strict=True))
    finally:
        client.close()
    load = Load(OneGateway(url=url), pairs, args.seed, pause_s=args.pause_s)  # type: ignore[arg-type]
    reading = asyncio.create_task(load.run(UPGRADE_TIMEOUT_S, args.streams))
    try:
        await asyncio.sleep(BEFORE_S)
        command = [sys.executable, "-m", "kvist", "upgrade", f"--runtime-dir={folder / 'runtime'}"]
        command += [f"--order={args.order}", f"--python={args.python}"]
        began_s = time.monotonic()
        upgrade = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        told, _ = await asyncio.wait_for(upgrade.communicate(), UPGRADE_TIMEOUT_S)
        upgrade_s = time.monotonic() - began_s
        await asyncio.sleep(AFTER_S)
        load.end()
        await reading
    finally:
        reading.cancel()
    return Outcome(load=load, status=upgrade.returncode or 0, report=told.decode(), upgrade_s=upgrade_s)


def run(args: argparse.Namespace, folder: Path) -> Outcome:
    (port,) = free_ports(1)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KVIST_")}
    with (folder / "up.log").open("wb") as log:
        up = subprocess.Popen(
            up_command(args, folder, port), stdout=log, stderr=log, stdin=subprocess.PIPE, env=environ
        )
    try:
        return asyncio.run(measure(args, folder, up, port))
    finally:
        up.terminate()
        try:
            up.wait(STOP_TIMEOUT_S)
        finally:
            up.kill()


def show(outcome: Outcome) -> None:
    tally = outcome.load.tally
    print(outcome.report)
    print(f"upgrade           {outcome.upgrade_s:.0f} s, status {outcome.status}")
    print(f"streams           {tally.num_streams} compared, {tally.num_left} left by their clients")
    print(f"resumed           {tally.num_resumed} streams, {tally.num_failovers} failovers")
    print(f"errors            {len(tally.errors)}")
    print(f"wrong tokens      {len(tally.wrong)}")
    print(f"longest pause     {outcome.longest_pause_s:.2f} s; longest TTFT {max(tally.first_s, default=0.0):.2f} s")
    for line in [*tally.errors[:10], *tally.wrong[:10]]:
        print(f"  {line}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--unified", type=int, default=0)
    parser.add_argument("--order", default="auto")
    parser.add_argument("--persist", action="store_true", help="with a host tier in a folder for each worker")
    parser.add_argument("--stores", type=int, default=0, help="of a page pool of Mooncake; 0: no pool")
    parser.add_argument("--python", default=sys.executable, help="of the new version")
    parser.add_argument("--drain-s", type=float, default=1.0, help="after which a worker's streams go on elsewhere")
    parser.add_argument("--streams", type=int, default=6, help="clients, each with one stream")
    parser.add_argument("--pause-s", type=float, default=0.0, help="of a client between two streams")
    parser.add_argument("--cases", type=int, default=36, help="different requests")
    parser.add_argument("--max-tokens", default="16-256", help="of an answer: LOW-HIGH")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--keep", type=Path, help="keep the log in this new folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    folder = Path(tempfile.mkdtemp(prefix="kvist-upgrade-"))
    status = 2
    try:
        outcome = run(args, folder)
        show(outcome)
        status = 0 if outcome.is_clean else 1
        if args.json:
            tally = outcome.load.tally
            write_report(
                args.json,
                args,
                status=outcome.status,
                report=outcome.report,
                upgrade_s=outcome.upgrade_s,
                streams=tally.num_streams,
                resumed=tally.num_resumed,
                failovers=tally.num_failovers,
                errors=tally.errors,
                wrong=tally.wrong,
                longest_pause_s=outcome.longest_pause_s,
                longest_ttft_s=max(tally.first_s, default=0.0),
            )
    except ChaosFailure as failure:
        print(f"bench_upgrade: {failure}", file=sys.stderr)
    finally:
        if args.keep:
            shutil.copytree(
                folder, args.keep, ignore=shutil.ignore_patterns("pages", "ssd", "runtime"), dirs_exist_ok=True
            )
        shutil.rmtree(folder, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main())

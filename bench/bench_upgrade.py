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
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chaos_cluster import ChaosFailure, tail
from kvist.cluster.ports import LOOPBACK, free_ports
from kvist.http_client import HttpClient, read_whole
from kvist.testing.tiny_model import write_tiny_model
from kvist.testing.tokenizers import write_byte_tokenizer
from upgrade_load import Disturbance, Result, add_load_options, answers_of, cases_of, report, under_load

START_TIMEOUT_S = 240.0
UPGRADE_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
NUM_TOKENS = 4096


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    disturbance: Disturbance
    status: int  # of kvist upgrade
    report: str

    @property
    def is_clean(self) -> bool:
        return not self.status and self.disturbance.is_clean


async def measure(args: argparse.Namespace, folder: Path, up: subprocess.Popen[bytes], port: int) -> Outcome:
    url = f"http://{LOOPBACK}:{port}"
    client = HttpClient(url, api_key=None)
    try:
        await wait_ready(client, up, folder / "up.log")
    finally:
        client.close()
    cases = cases_of(args)
    pairs = list(zip(cases, await answers_of(url, cases, None), strict=True))

    async def upgrade() -> tuple[int, str]:
        command = [sys.executable, "-m", "kvist", "upgrade", f"--runtime-dir={folder / 'runtime'}"]
        command += [f"--order={args.order}", f"--python={args.python}"]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        told, _ = await asyncio.wait_for(process.communicate(), UPGRADE_TIMEOUT_S)
        return process.returncode or 0, told.decode()

    (status, told), disturbance = await under_load(url, pairs, args, upgrade, timeout_s=UPGRADE_TIMEOUT_S)
    return Outcome(disturbance=disturbance, status=status, report=told)


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
    print(outcome.report)
    print(f"upgrade           {outcome.disturbance.upgrade_s:.0f} s, status {outcome.status}")
    outcome.disturbance.show()


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
    add_load_options(parser, streams=6, cases=36, max_tokens="16-256")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)

    def result(folder: Path) -> Result:
        outcome = run(args, folder)
        show(outcome)
        about = {"status": outcome.status, "report": outcome.report}
        return Result(is_clean=outcome.is_clean, figures={**about, **outcome.disturbance.figures()})

    return report("bench_upgrade", args, result, kept=["up.log"])


if __name__ == "__main__":
    sys.exit(main())

"""Do streams survive when every process of a cluster dies, hangs and is restarted at random?

    python bench/chaos.py --seconds 600 --seed 1            (make chaos SEED=1)

Starts gateways, prefill, decode and unified workers, sends them streams of every kind without pause, and kills,
suspends and restarts the processes by a plan made from the seed. Every answer is compared with its twin: the answer of
a worker that no fault touches, computed beforehand. At the end, the processes are stopped in order, and the pages,
requests, files and processes that are left are counted. Exit status 0: no error, no wrong token, nothing left. 1: a
finding; the same seed plans the same faults again. 2: the run could not be made.

A gateway is the end of its clients' connections: a stream whose gateway is killed breaks, counts as cut, and is sent
again to another gateway, as a client would. The part that it had received must be the beginning of its twin.

Without --model-path, the model is a llama of two layers on the CPU in fp32, where a stream has the same tokens in
batches of any shape. `--compare lengths` is for 16 bits on GPUs, where tokens may depend on the shape of a batch:
numbers of tokens, finish reasons and usage are compared. Options after `--` go to every worker.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chaos_checks import Leaks, leaks_of, longest_pauses
from chaos_cluster import ChaosCluster, ChaosFailure, Member
from chaos_faults import PlannedFault, plan_faults
from chaos_load import (
    STOPPED,
    Answer,
    Case,
    Comparison,
    StreamReader,
    difference,
    make_cases,
    prefix_difference,
    read_answer,
    with_stop_string,
)
from chaos_plan import check_gpus, plans_of, seconds_of_load
from json_report import write_report
from kvist.clock import MonotonicClock
from kvist.http_client import HttpClient, HttpFailure

START_TIMEOUT_S = 240.0
STREAM_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 40.0
GATEWAY_WAIT_S = 60.0  # for a gateway that is ready
SHARE_OF_LEAVERS = 0.05  # streams whose client disconnects early
TWINS_AT_ONCE = 8
QUIET = 0.1  # of the run, at its end: no fault begins
MAX_SHOWN = 10


@dataclass(slots=True, kw_only=True)
class Tally:
    """Counts of the streams and their ends. Mutable; owned by `Load`."""

    num_streams: int = 0  # whole answers that were compared
    num_resumed: int = 0  # of them, those that went on at another worker at least once
    num_failovers: int = 0
    num_cut: int = 0  # broken with their gateway, and sent again
    num_left: int = 0  # by their client
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)  # (begin, end) between two events of a stream
    first_s: list[float] = field(default_factory=list)  # from the request to its first event
    by_case: Counter[str] = field(default_factory=Counter)


class Load:
    """Clients that read one stream after the other, with a pause between two."""

    def __init__(
        self,
        cluster: ChaosCluster,
        pairs: Sequence[tuple[Case, Answer]],
        seed: int,
        *,
        api_key: str | None = None,
        pause_s: float = 0.0,
    ) -> None:
        self.tally = Tally()
        self._cluster, self._pairs = cluster, pairs
        self._draw = random.Random(seed)
        self._clients = {gateway.name: HttpClient(gateway.plan.url, api_key=api_key) for gateway in cluster.gateways}
        self._clock = MonotonicClock()
        self._over = False
        self._pause_s = pause_s

    async def run(self, seconds: float, num_clients: int) -> None:
        loop = asyncio.get_running_loop()
        handle = loop.call_later(seconds, self.end)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(num_clients):
                    group.create_task(self._read_streams())
        finally:
            handle.cancel()
            for client in self._clients.values():
                client.close()

    def end(self) -> None:
        """Begin no further stream; those that are open are read to their end."""
        self._over = True

    async def _read_streams(self) -> None:
        while not self._over:
            case, twin = self._draw.choice(self._pairs)
            leaves_after_s = self._draw.uniform(0.0, 1.0) if self._draw.random() < SHARE_OF_LEAVERS else None
            while await self._is_cut(case, twin, leaves_after_s):
                self.tally.num_cut += 1
            await asyncio.sleep(self._pause_s)

    async def _is_cut(self, case: Case, twin: Answer, leaves_after_s: float | None) -> bool:
        """Read one answer and compare it; return whether it was cut with its gateway."""
        gateway = await self._ready_gateway()
        if gateway is None:
            self.tally.errors.append(f"no gateway was ready within {GATEWAY_WAIT_S:g} s")
            return False
        num_ends, reader, began_s = gateway.num_ends, StreamReader(), self._clock.now_s()
        failure, status = "", 0
        try:
            async with asyncio.timeout(STREAM_TIMEOUT_S if leaves_after_s is None else leaves_after_s):
                status = await read_answer(self._clients[gateway.name], case, reader, self._clock)
        except HttpFailure as error:
            failure = f"{error.kind}: {error}"
        except TimeoutError:
            if leaves_after_s is not None:
                self.tally.num_left += 1
                self._note_wrong(case, prefix_difference(twin, reader.answer, case.comparison))
                return False
            failure = f"no end within {STREAM_TIMEOUT_S:g} s"
        answer = reader.answer
        if not failure and not answer.is_whole:
            failure = answer.error or f"status {status} and an end without [DONE]"
        self._note_times(reader, began_s)
        if failure:
            self._note_wrong(case, prefix_difference(twin, answer, case.comparison))
            if gateway.num_ends != num_ends:
                return True
            self.tally.errors.append(f"{case.name} at {gateway.name}: {failure}")
            return False
        tally = self.tally
        tally.num_streams += 1
        tally.by_case[case.name] += 1
        tally.num_failovers += answer.num_failovers
        tally.num_resumed += answer.num_failovers > 0
        self._note_wrong(case, difference(twin, answer, case.comparison))
        return False

    async def _ready_gateway(self) -> Member | None:
        give_up_s = self._clock.now_s() + GATEWAY_WAIT_S
        while not (names := self._cluster.ready_gateways()):
            if self._clock.now_s() > give_up_s:
                return None
            await asyncio.sleep(0.05)
        return self._cluster.members[self._draw.choice(names)]

    def _note_wrong(self, case: Case, words: str | None) -> None:
        if words is not None:
            self.tally.wrong.append(f"{case.name} ({case.body['prompt'][:40]!r}): {words}")

    def _note_times(self, reader: StreamReader, began_s: float) -> None:
        times_s = reader.event_times_s
        if times_s:
            self.tally.first_s.append(times_s[0] - began_s)
        if len(times_s) > 1:
            begin_s, end_s = max(itertools.pairwise(times_s), key=lambda pair: pair[1] - pair[0])
            self.tally.gaps.append((begin_s, end_s))


async def fault_by_fault(
    cluster: ChaosCluster, faults: Sequence[PlannedFault], seconds: float, shown: bool
) -> Counter[str]:
    """Begin the faults in order, each when its time has come, a victim is alive, and another worker and gateway can
    serve; a fault that has to wait delays those after it. Return how many of each kind began before the end."""
    begun: Counter[str] = Counter()
    start_s, late_s = time.monotonic(), 0.0
    for planned in faults:
        while True:
            now_s = time.monotonic() - start_s
            if now_s > seconds * (1 - QUIET):
                return begun
            if now_s >= planned.at_s + late_s and cluster.can_begin(planned):
                break
            await asyncio.sleep(0.05)
        late_s = now_s - planned.at_s
        cluster.begin(planned)
        begun[planned.fault] += 1
        if shown:
            lasting = f" for {planned.for_s:.1f} s" if planned.for_s else ""
            print(f"{now_s:7.1f} s  {planned.fault} {', '.join(planned.victims)}{lasting}", flush=True)
    return begun


async def twins_of(client: HttpClient, cases: Sequence[Case]) -> list[Answer]:
    """Return the answers to all cases. Raises `ChaosFailure` if one of them is not whole."""
    places = asyncio.Semaphore(TWINS_AT_ONCE)

    async def ask(case: Case) -> Answer:
        async with places:
            reader = StreamReader()
            try:
                status = await read_answer(client, case, reader, MonotonicClock())
            except HttpFailure as failure:
                raise ChaosFailure(f"no twin of {case.name}: {failure}") from failure
        if not reader.answer.is_whole:
            raise ChaosFailure(f"no twin of {case.name}: status {status}, {reader.answer.error}")
        return reader.answer

    return list(await asyncio.gather(*map(ask, cases)))


async def pairs_of(url: str, args: argparse.Namespace) -> list[tuple[Case, Answer]]:
    """Return the cases with their twins, as the server at this URL answers them."""
    low, _, high = args.max_tokens.partition("-")
    bounds, client = (int(low), int(high or low)), HttpClient(url, api_key=None)
    cases = make_cases(seed=args.seed, count=args.cases, max_tokens=bounds, comparison=Comparison(args.compare))
    try:
        twins = await twins_of(client, cases)
        stopped = [place for place, case in enumerate(cases) if case.name == STOPPED]
        for place in stopped:
            cases[place] = with_stop_string(cases[place], twins[place], args.seed + place)
        for place, twin in zip(stopped, await twins_of(client, [cases[place] for place in stopped]), strict=True):
            twins[place] = twin
    finally:
        client.close()
    return list(zip(cases, twins, strict=True))


@dataclass(slots=True, kw_only=True)
class Outcome:
    """The result of a run."""

    tally: Tally
    leaks: Leaks
    faults: Counter[str]
    num_kills: int
    num_stops: int
    pauses_s: Mapping[str, float]
    exit_statuses: list[tuple[str, int]]
    seconds: float

    @property
    def is_clean(self) -> bool:
        return not (self.tally.errors or self.tally.wrong or self.leaks.total or any(s for _, s in self.exit_statuses))


async def run(args: argparse.Namespace, folder: Path) -> Outcome:
    check_gpus(args)
    plans, reference = plans_of(args, folder)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KVIST_")}
    environ |= {"KVIST_CLUSTER_KEY": secrets.token_hex(16), "KVIST_RUNTIME_DIR": str(folder / "runtime")}
    cluster = ChaosCluster(plans, folder, environ)
    alone = ChaosCluster([reference] if reference else [], folder, environ)
    cluster.start()
    alone.start()
    supervisors = [asyncio.create_task(each.supervise()) for each in (cluster, alone)]
    work = asyncio.create_task(_measure(args, folder, cluster, alone))
    try:
        await asyncio.wait([work, *supervisors], return_when=asyncio.FIRST_COMPLETED)
        for supervisor in supervisors:
            if supervisor.done() and not work.done() and (error := supervisor.exception()) is not None:
                raise error
        return await work
    except BaseExceptionGroup as errors:
        failures, _ = errors.split(ChaosFailure)
        if failures is None:
            raise
        raise ChaosFailure(str(failures.exceptions[0])) from errors
    finally:
        for task in (work, *supervisors):
            task.cancel()
        await asyncio.gather(work, *supervisors, return_exceptions=True)
        cluster.kill_all()
        alone.kill_all()


async def _measure(args: argparse.Namespace, folder: Path, cluster: ChaosCluster, alone: ChaosCluster) -> Outcome:
    began_s = time.monotonic()
    twin_url = cluster.gateways[0].plan.url
    if alone.members:
        await alone.wait_ready(START_TIMEOUT_S)
        (member,) = alone.members.values()
        twin_url = member.plan.url
    else:
        await cluster.wait_all_serve(START_TIMEOUT_S)
    pairs = await pairs_of(twin_url, args)
    await alone.stop(STOP_TIMEOUT_S)
    ready_s = await cluster.wait_all_serve(START_TIMEOUT_S)
    print(
        f"{len(pairs)} twins, {len(cluster.workers)} workers, {len(cluster.gateways)} gateways; ready ({ready_s:.0f} s)"
    )
    names = [name for name in cluster.members if not args.roles or name.rpartition("-")[0] in args.roles]
    if len(cluster.gateways) == 1:
        names = [name for name in names if name != cluster.gateways[0].name]
    if not names:
        raise ChaosFailure(f"--roles {' '.join(args.roles)}: no process of the cluster has such a role")
    faults = plan_faults(
        names, seed=args.seed, seconds=args.seconds, interval_s=args.interval_s, has_blackouts=args.blackouts
    )
    load_s = seconds_of_load(args.seconds, args.within_s, time.monotonic() - began_s)
    load, began_s = Load(cluster, pairs, args.seed, pause_s=args.pause_s), time.monotonic()
    reading = asyncio.create_task(load.run(load_s, args.streams))
    try:
        begun = await fault_by_fault(cluster, faults, load_s, args.verbose)
        await reading
    finally:
        reading.cancel()
    seconds = time.monotonic() - began_s
    await cluster.settle_faults()
    await cluster.wait_all_serve(START_TIMEOUT_S)
    leaks = await leaks_of(cluster, folder / "runtime", STOP_TIMEOUT_S)
    return Outcome(
        tally=load.tally,
        leaks=leaks,
        faults=begun,
        num_kills=cluster.num_kills,
        num_stops=cluster.num_stops,
        pauses_s=longest_pauses(load.tally.gaps, cluster.suspensions),
        exit_statuses=cluster.exit_statuses,
        seconds=seconds,
    )


def show(outcome: Outcome, args: argparse.Namespace) -> None:
    tally, leaks = outcome.tally, outcome.leaks
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(outcome.faults.items()))
    print(f"faults            {outcome.faults.total()} in {outcome.seconds:.0f} s: {kinds}")
    print(f"processes         {outcome.num_kills} killed, {outcome.num_stops} victims suspended")
    print(f"streams           {tally.num_streams} compared ({args.compare}), {tally.num_left} left by their clients")
    print(f"resumed           {tally.num_resumed} streams, {tally.num_failovers} failovers")
    print(f"cut with gateways {tally.num_cut}, sent again")
    print(f"errors            {len(tally.errors)}")
    print(f"wrong tokens      {len(tally.wrong)}")
    pauses = ", ".join(f"{seconds:.2f} s {cause}" for cause, seconds in outcome.pauses_s.items())
    print(f"longest pause     {pauses}")
    print(f"longest TTFT      {max(tally.first_s, default=0.0):.2f} s")
    print(f"leaked            {leaks.num_pages} pages, {leaks.num_requests} requests, ", end="")
    print(f"{len(leaks.files)} files, {leaks.num_descriptors} descriptors, {len(leaks.pids)} processes")
    bad = [f"{name} ended with status {status}" for name, status in outcome.exit_statuses if status]
    for line in [*tally.errors[:MAX_SHOWN], *tally.wrong[:MAX_SHOWN], *leaks.files[:MAX_SHOWN], *leaks.notes, *bad]:
        print(f"  {line}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="time under load and faults")
    parser.add_argument(
        "--within-s", type=float, help="of the whole run with its start: the load ends earlier if it must"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the faults, the requests and their order")
    parser.add_argument("--interval-s", type=float, default=3.0, help="mean time between two faults")
    parser.add_argument("--roles", nargs="+", default=(), choices=("prefill", "decode", "unified", "gateway"))
    parser.add_argument("--streams", type=int, default=8, help="clients, each with one stream")
    parser.add_argument("--pause-s", type=float, default=0.0, help="of a client between two streams")
    parser.add_argument("--cases", type=int, default=90, help="different requests")
    parser.add_argument("--max-tokens", default="16-256", help="of an answer: LOW-HIGH")
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--unified", type=int, default=1)
    parser.add_argument("--gateways", type=int, default=2, help="a single one has no faults")
    parser.add_argument("--blackouts", action="store_true", help="also kill all workers of a role for some seconds")
    parser.add_argument("--tiers", action="store_true", help="with a host tier and a file store that workers share")
    parser.add_argument("--compare", choices=[each.value for each in Comparison], default="tokens")
    parser.add_argument("--model-path", help="instead of the tiny model")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that the workers share")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--keep", type=Path, help="keep the logs in this new folder")
    parser.add_argument("--verbose", action="store_true", help="print every fault")
    parser.add_argument("worker_flags", nargs="*", metavar="-- FLAG", help="options of every worker")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="kvist-chaos-", dir=shared if shared.is_dir() else None))
    print(f"seed {args.seed}, {args.seconds:g} s; logs in {args.keep or folder}", flush=True)
    status = 2
    try:
        outcome = asyncio.run(_interruptible(args, folder))
        show(outcome, args)
        status = 0 if outcome.is_clean else 1
        if args.json:
            _write_json(args, outcome)
    except ChaosFailure as failure:
        print(f"chaos: {failure}", file=sys.stderr)
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("chaos: interrupted; every process is stopped", file=sys.stderr)
    finally:
        if args.keep:
            shutil.copytree(folder, args.keep, ignore=shutil.ignore_patterns("runtime", "store"), dirs_exist_ok=True)
        if status != 1 or args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return status


async def _interruptible(args: argparse.Namespace, folder: Path) -> Outcome:
    """Run; SIGTERM ends the run as Ctrl-C does, with all processes."""
    task = asyncio.current_task()
    assert task is not None
    with contextlib.suppress(NotImplementedError, RuntimeError):  # RuntimeError: in a thread, as a test may run it
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await run(args, folder)


def _write_json(args: argparse.Namespace, outcome: Outcome) -> None:
    tally, leaks = outcome.tally, outcome.leaks
    write_report(
        args.json,
        args,
        faults=dict(outcome.faults),
        kills=outcome.num_kills,
        stops=outcome.num_stops,
        streams=tally.num_streams,
        by_case=dict(tally.by_case),
        left=tally.num_left,
        resumed=tally.num_resumed,
        failovers=tally.num_failovers,
        cut=tally.num_cut,
        errors=tally.errors,
        wrong=tally.wrong,
        pauses_s=dict(outcome.pauses_s),
        longest_ttft_s=max(tally.first_s, default=0.0),
        leaked={
            "pages": leaks.num_pages,
            "requests": leaks.num_requests,
            "files": leaks.files,
            "descriptors": leaks.num_descriptors,
            "processes": leaks.pids,
        },
        exit_statuses=outcome.exit_statuses,
    )


if __name__ == "__main__":
    sys.exit(main())

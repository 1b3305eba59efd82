"""How do prefill, decode, unified workers and tensor parallel ranks scale over the GPUs of one host?

    python bench/bench_scaling.py --model-path M --json FILE [--cells pair] [--budget-s 540] [--resume FILE]

Starts clusters by `kvist up` with random weights, sends loads by `kvist bench`, and stops them: unified workers with
exact routing, every split of prefill and decode, aggregate or split by cost (auto), tensor parallel sizes of Qwen2-7B's
and Qwen2-72B's shape, with chats and long prompts at shares of the best goodput, all requests at once, conversations
with a host tier; then the links: handoffs of all pairs at once, and all-reduce. Works with any number of GPUs. Without
one, or with --tiny, a tiny model rehearses everything on processes, and its figures say nothing about speed.

A cell is one load on one fleet, FLEET/LOAD. --cells takes `all`, `pair` (two workers: split, unified, auto; about 8
minutes), fleets, and patterns such as 'tp*/single'; --list prints them. Cells that do not fit into --budget-s are left,
and `--resume FILE` measures them later. FILE is written after every cell. A cell that fails says why in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from json_report import write_report
from kvist.cluster.plan import visible_gpus
from scaling_fleet import BenchCluster
from scaling_links import measure_all_reduce, measure_handoffs
from scaling_plan import FULL, TINY, WARM_UP, Cell, Fleet, Load, bench_argv, choose, obstacle, write_shape
from scaling_table import goodput_of, print_tables
from served import BenchFailure, Report

STOP_S = 6.0
SEARCH_FACTOR = 1.5
CLIMB_FACTOR, CLIMB_STEPS = 1.25, 3
REMEDY = "choose a search too, or give --best-goodput"
MIN_GAIN = 1.02  # of a search's step; less ends it
Result = dict[str, Any]


class NoReference(BenchFailure):
    """The best goodput, of which a load is a share, is not known yet."""


class Scaling:
    """One run. Mutable: `results` grows by a cell at a time."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.sizes = TINY if args.tiny else FULL
        self.deadline_s: float = time.monotonic() + args.budget_s
        self.models = {"7b": self._model("7b"), "72b": self._model("72b")}
        self.configs = {name: json.loads((path / "config.json").read_text()) for name, path in self.models.items()}
        self.results: dict[str, Result] = {}
        self.best_goodput: dict[str, float] = {"7b": args.best_goodput} if args.best_goodput else {}
        self.start_s: dict[str, float] = {}
        self.place_bytes = gpu_bytes() if args.num_gpus else None
        if args.resume and args.resume.exists():
            self._resume(args.resume)

    def _model(self, name: str) -> Path:
        given = self.args.model_path if name == "7b" else self.args.model_path_72b
        if given is not None:
            return Path(given)
        if self.args.tiny:
            return write_shape(self.folder / f"tiny-{name}", "tiny" if name == "7b" else "tiny72b")
        return write_shape(self.folder / f"qwen2-{name}-shape", name, tokenizer_of=Path(self.args.model_path))

    def _resume(self, path: Path) -> None:
        before = json.loads(path.read_bytes())
        for key in ("places", "num_gpus", "tiny", "model_path"):
            ours = getattr(self.args, key)
            if before["settings"].get(key) != ours:
                raise SystemExit(
                    f"--resume {path}: it was measured with {key} {before['settings'].get(key)}, not {ours}"
                )
        keep = ("done", "skipped") if self.args.retry_failed else ("done", "skipped", "failed")
        self.results = {name: cell for name, cell in before["cells"].items() if cell["status"] in keep}
        self.best_goodput = before["best_goodput"] | self.best_goodput

    # ------------------------------------------------------------ the budget

    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    def fits(self, load: Load, fleet: Fleet | None = None) -> bool:
        """Return whether the load fits into the budget; with `fleet`, also its start and its stop."""
        starts_s = 0.0 if fleet is None else fleet.start_s(self.sizes)
        return starts_s + load.estimate_s(self.sizes) + STOP_S <= self.left_s()

    # ------------------------------------------------------------ cells

    def run(self, cells: list[Cell]) -> None:
        todo = [cell for cell in cells if cell.name not in self.results]
        for fleet, group in itertools.groupby(todo, key=lambda cell: cell.fleet):
            waiting = list(group)
            if fleet is None:
                for cell in waiting:
                    if self.fits(cell.load):
                        self._finish(cell, partial(self._links, cell.load))
                continue
            why = obstacle(
                fleet, self.configs[fleet.model], num_places=self.args.num_gpus or self.args.places,
                place_bytes=self.place_bytes,
            )  # fmt: skip
            if why is not None:
                for cell in waiting:
                    self._record(cell, {"status": "skipped", "why": why})
                continue
            has_search = any(cell.load.kind == "search" for cell in waiting)
            if not has_search and fleet.model not in self.best_goodput and any(c.load.needs_reference for c in waiting):
                print(f"{fleet.name}: shares of the best goodput, which is not known, are left: {REMEDY}", flush=True)
                waiting = [cell for cell in waiting if not cell.load.needs_reference]
            while waiting and self.fits(waiting[0].load, fleet):
                waiting = self._run_fleet(fleet, waiting)

    def _run_fleet(self, fleet: Fleet, cells: list[Cell]) -> list[Cell]:
        """Measure cells on one started fleet, and return those that need a new start: after a failure."""
        with BenchCluster(fleet.name, self._up_flags(fleet), self.folder) as cluster:
            try:
                cluster.start(min(self.args.start_timeout_s, self.left_s()))
                self._warm_up(cluster, fleet)
            except BenchFailure as failure:
                if self.left_s() <= 0:
                    print(f"{fleet.name}: the time ended before it was ready", flush=True)
                    return []
                for cell in cells:
                    self._record(cell, {"status": "failed", "why": f"start: {failure}"})
                return []
            self.start_s[fleet.name] = cluster.ready_s
            print(f"{fleet.name}: ready after {cluster.ready_s:.1f} s", flush=True)
            for index, cell in enumerate(cells):
                if not self.fits(cell.load):
                    continue
                self._finish(cell, partial(self._load, cluster, cell))
                if self.results.get(cell.name, {}).get("status") == "failed":
                    return cells[index + 1 :]
        return []

    def _warm_up(self, cluster: BenchCluster, fleet: Fleet) -> None:
        rate = (WARM_UP.rate or 0.0) * self._gpus(fleet)
        self._once(cluster, Cell(fleet=fleet, load=WARM_UP), rate, WARM_UP.stretch * self.sizes.seconds, 0)

    def _up_flags(self, fleet: Fleet) -> list[str]:
        args = self.args
        found = [str(self.models[fleet.model]), "--load-format=dummy", *fleet.flags(self.sizes, args.policy)]
        found += ["--device=cuda", "--dtype=bfloat16"] if args.num_gpus else ["--device=cpu", "--dtype=float32"]
        if args.tiny:
            found += [] if fleet.with_host_tier else [f"--max-total-tokens={self.sizes.device_tokens}"]
            found += ["--num-threads=1"]
        return [*found, f"--start-timeout-s={args.start_timeout_s:g}", *args.up_flags.split()]

    def _finish(self, cell: Cell, measure: Callable[[], Result]) -> None:
        """Run a cell and record its result, or why it has none. A cell that the end of the time cut is left."""
        start_s = time.monotonic()
        print(f"{cell.name} ...", flush=True)
        try:
            result = {"status": "done", **measure()}
        except NoReference as failure:
            print(f"{cell.name}: {failure}", flush=True)
            return
        except BenchFailure as failure:
            if self.left_s() <= 0:
                print(f"{cell.name}: the time ended", flush=True)
                return
            result = {"status": "failed", "why": str(failure)}
        self._record(cell, {**result, "took_s": time.monotonic() - start_s})

    def _record(self, cell: Cell, result: Result) -> None:
        fleet = None if cell.fleet is None else asdict(cell.fleet)
        self.results[cell.name] = {"fleet": fleet, "load": asdict(cell.load), "gpus": self._gpus(cell.fleet), **result}
        self.write()
        if result["status"] != "done":
            print(f"{cell.name}: {result['status']}: {result['why'].splitlines()[0]}", flush=True)

    def write(self) -> None:
        """Write the file so that it is whole at any moment."""
        path: Path = self.args.json
        new = path.with_suffix(path.suffix + ".new")
        write_report(new, self.args, cells=self.results, best_goodput=self.best_goodput, start_s=self.start_s)
        os.replace(new, path)

    def _gpus(self, fleet: Fleet | None) -> int:
        """Return the number of GPUs (on a CPU: of places) that the fleet uses."""
        places = int(self.args.num_gpus or self.args.places)
        return places if fleet is None else min(fleet.places, places)

    # ------------------------------------------------------------ loads

    def _links(self, load: Load) -> Result:
        places, num_gpus = self.args.places, self.args.num_gpus
        if load.kind == "all_reduce":
            return {"links": measure_all_reduce(places, num_gpus, quick=self.args.tiny)}
        num_tokens, repetitions = (64, 3) if self.args.tiny else (2048, 30)
        return {"links": measure_handoffs(places, num_gpus, num_tokens=num_tokens, repetitions=repetitions)}

    def _load(self, cluster: BenchCluster, cell: Cell) -> Result:
        load, fleet = cell.load, cell.fleet
        assert fleet is not None
        places, model = self._gpus(fleet), fleet.model
        if load.kind in ("search", "climb"):
            return self._search(cluster, cell, places)
        rate = (
            load.rate
            if load.share is None
            else load.share * self._best_goodput(model) * fleet.places / self.args.places
        )
        if rate is not None and self.args.tiny and load.share is None:
            rate = self.sizes.start_rate
        seconds = load.stretch * (self.args.seconds or self.sizes.seconds)
        return {"points": [self._once(cluster, cell, rate, seconds, 0)]}

    def _best_goodput(self, model: str) -> float:
        if model not in self.best_goodput:
            raise NoReference(f"the best goodput is not known: {REMEDY}")
        return self.best_goodput[model]

    def _search(self, cluster: BenchCluster, cell: Cell, places: int) -> Result:
        """Raise (or lower) the rate while the goodput grows. A search's best goodput is the 100% of the other cells."""
        assert cell.fleet is not None
        model, is_search = cell.fleet.model, cell.load.kind == "search"
        factor, num_steps = (SEARCH_FACTOR, self.sizes.search_steps) if is_search else (CLIMB_FACTOR, CLIMB_STEPS)
        share_of_all = places / self.args.places
        rate = self.sizes.start_rate * places if is_search else self._best_goodput(model) * share_of_all * factor
        points: list[Result] = []
        for step in range(num_steps):
            if points and self.sizes.search_s + 8.0 + STOP_S > self.left_s():
                break
            points.append(self._once(cluster, cell, rate, self.sizes.search_s, 1 + step))
            if step == 0 and points[0]["summary"]["goodput"]["share"] < 0.5:
                if not is_search:
                    break
                factor = 1 / factor  # more than the fleet can do: go down
            elif step and goodput_of(points[-1]) < MIN_GAIN * goodput_of(points[-2]):
                break
            rate *= factor
        best = max(map(goodput_of, points))
        if is_search and best <= 0:
            raise BenchFailure("no request kept to the limits at any rate of the search")
        if is_search:
            self.best_goodput.setdefault(model, best)
        return {"points": points, "best_goodput": best}

    def _once(self, cluster: BenchCluster, cell: Cell, rate: float | None, seconds: float, step: int) -> Result:
        """Run one load. Each load and step has prompts of its own, the same on every fleet."""
        assert cell.fleet is not None
        argv = bench_argv(cell.load, self.sizes, places=self._gpus(cell.fleet), rate=rate, seconds=seconds)
        vocab = int(self.configs[cell.fleet.model]["vocab_size"])
        low, high = (1000, 30000) if vocab > 30000 else (vocab // 4, vocab - 1)
        name = cell.load.name
        argv += [
            f"--seed={zlib.crc32(name.encode()) % 100_000 * 10 + step}",
            f"--vocab-low={low}",
            f"--vocab-high={high}",
        ]
        argv += ["--request-timeout-s=120"]
        bound_s = min(4 * cell.load.estimate_s(self.sizes) + 30.0, max(20.0, self.left_s() + self.args.grace_s))
        run: Report = cluster.measure(argv, self.folder / "run.json", bound_s)
        point = {key: run[key] for key in ("summary", "warnings", "settings", "router_cpu_s")}
        return {"rate": rate, "seconds": seconds, **point}


def gpu_bytes() -> int | None:
    """Return the memory of the smallest GPU; None if the driver does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return min(int(line) for line in done.stdout.split()) << 20
    return None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="folder with config.json and tokenizer files of Qwen2-7B's shape")
    parser.add_argument("--model-path-72b", help="the same of a 72B model; by default written from Qwen2-72B's shape")
    parser.add_argument("--cells", nargs="+", default=["all"])
    parser.add_argument("--list", action="store_true", help="print the cells and end")
    parser.add_argument("--budget-s", type=float, default=540.0, help="cells that do not fit into this time are left")
    parser.add_argument("--grace-s", type=float, default=15.0, help="how far a running cell may exceed the budget")
    parser.add_argument("--json", type=Path, default=Path("scaling.json"))
    parser.add_argument("--resume", type=Path, help="file of an earlier run, whose cells are kept")
    parser.add_argument("--retry-failed", action="store_true", help="with --resume: measure failed cells again")
    parser.add_argument("--places", type=int, default=0, help="GPUs to use, or processes on a CPU; default: all, or 2")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short loads: a rehearsal")
    parser.add_argument("--seconds", type=float, help="length of each load with arrivals")
    parser.add_argument("--policy", default="cache_aware", help="of fleets other than auto")
    parser.add_argument("--best-goodput", type=float, help="requests/s of all GPUs, instead of the search's")
    parser.add_argument("--start-timeout-s", type=float, default=240.0)
    parser.add_argument("--up-flags", default="", help="more options of kvist up, separated by spaces")
    args = parser.parse_args()
    found = 0 if args.cpu else visible_gpus(os.environ)
    args.num_gpus = min(found, args.places) if args.places else found
    args.places = args.places or max(found, 2 if args.cpu or not found else 1)
    args.tiny = args.tiny or not args.num_gpus
    if not args.tiny and not args.model_path and not args.list:
        parser.error("--model-path is needed: a folder with config.json and tokenizer files; or use --tiny")
    return args


def main() -> None:
    args = parse()
    try:
        cells = choose(args.cells, args.places)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if args.list:
        print("\n".join(cell.name for cell in cells))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the cluster is stopped too
    where = f"{args.num_gpus} GPUs" if args.num_gpus else f"{args.places} places on a CPU: a rehearsal, not the speed"
    print(f"{len(cells)} cells on {where}, in at most {args.budget_s:g} s")
    workers = max((cell.fleet.num_workers * cell.fleet.tp for cell in cells if cell.fleet), default=0)
    if args.num_gpus and workers > args.num_gpus:
        print(
            f"NOTE: up to {workers} workers share {args.num_gpus} GPU(s); figures for each GPU count a shared one once"
        )
    with tempfile.TemporaryDirectory(prefix="kvist-scaling-") as folder:
        scaling = Scaling(args, Path(folder))
        try:
            scaling.run(cells)
        finally:
            scaling.write()
            print_tables(scaling.results, [cell.name for cell in cells])
            print(f"written: {args.json}")


if __name__ == "__main__":
    main()

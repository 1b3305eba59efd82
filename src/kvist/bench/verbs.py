"""Implements `kvist bench single|offline|rate|mixed|multiturn|custom`: find the model, run, print, write.

The exit status is 1 if a request failed, so that scripts notice; the figures are printed in any case.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import kvist
from kvist.bench import report as reports
from kvist.bench.completions import CompletionClient
from kvist.bench.config import LOADS, CustomConfig, Load, Scenario, TargetConfig
from kvist.bench.drive import Driver, Measured
from kvist.bench.load import Source
from kvist.bench.plot import picture
from kvist.bench.report import Report, Run
from kvist.clock import MonotonicClock
from kvist.errors import UNDECODABLE, ConfigError, Unavailable
from kvist.event_loop import run_in_loop
from kvist.flags import Sources, nearest, read_settings
from kvist.http_client import HttpClient, HttpFailure, read_whole
from kvist.options import given_values


def run_scenario(kind: str, load: Load, target: TargetConfig) -> int:
    return run_scenarios([Scenario(name=kind, kind=kind, load=load)], target)


def run_custom(config: CustomConfig, target: TargetConfig) -> int:
    return run_scenarios(read_scenarios(config.file), target)


def run_scenarios(scenarios: Sequence[Scenario], target: TargetConfig) -> int:
    """Run the scenarios and return the exit status. Raises `ConfigError`, or `Unavailable` if nothing can be measured.

    Ctrl-C ends the measurement: the finished requests are shown and written, then `KeyboardInterrupt` is raised.
    """
    baseline = None if target.baseline is None else {run.name: run for run in _read_baseline(target.baseline).runs}
    for flag, path in (("json", target.json_path), ("plot", target.plot)):
        if path is not None:
            _check_writable(path, flag)
    runs: list[Run] = []
    interrupted = False

    async def main() -> None:
        nonlocal interrupted
        client = HttpClient(target.base_url, api_key=target.api_key)
        try:
            model, is_kvist = await _find_model(client, target.model)
            if target.handoff_parts and not is_kvist:
                raise HttpFailure("not_kvist", "--handoff-parts needs a server whose /v1/models says that it is Kvist")
            clock, timeout_s = MonotonicClock(), target.request_timeout_s
            completions = CompletionClient(
                client,
                model=model,
                clock=clock,
                timeout_s=timeout_s,
                sampling_fields=target.sampling_fields,
                by_tier=is_kvist,
                with_report=target.handoff_parts,
            )
            first = Source(seed=target.seed, vocab_low=target.vocab_low, vocab_high=target.vocab_high)
            for number, scenario in enumerate(scenarios):
                source = dataclasses.replace(first, scenario=number)
                driver = Driver(completions, source, clock, warmup=target.warmup)
                measured = await driver.run(scenario)
                run = _as_run(measured, target, model)
                runs.append(run)
                before = None if baseline is None else baseline.get(run.name)
                print(reports.table(run, before), flush=True)
                if baseline is not None:
                    _print_differences(before, run)
                if interrupted := measured.interrupted:
                    break
        finally:
            client.close()

    try:
        run_in_loop(main())
    except HttpFailure as error:
        raise Unavailable(f"{target.base_url} cannot be measured: {error}") from error
    finally:
        if target.json_path is not None and runs:  # also after a failure: keep the finished scenarios
            target.json_path.write_bytes(reports.encode(_as_report(runs, target)))
        if target.plot is not None and runs:
            target.plot.write_text(picture(runs, baseline or {}), encoding="utf-8")
    if interrupted:
        raise KeyboardInterrupt
    return 1 if any(run.summary.failures for run in runs) else 0


async def _find_model(client: HttpClient, named: str | None) -> tuple[str, bool]:
    """Return the model's name, and whether the server is Kvist: other servers may refuse unknown fields.

    Raises `HttpFailure` if no name was given and the server does not return one.
    """
    try:
        status, body = await read_whole(client, "/v1/models", timeout_s=30.0)
    except HttpFailure:
        if named is None:
            raise
        return named, False
    try:
        first = json.loads(body)["data"][0]
        return named or str(first["id"]), first.get("owned_by") == "kvist"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if named is not None:
            return named, False
        text = body[:200].decode("utf-8", "replace")
        raise HttpFailure("no_model", f"/v1/models names no model (status {status}): {text}; give --model") from error


# ---------------------------------------------------------------- custom scenarios


def read_scenarios(path: Path) -> list[Scenario]:
    """Read a JSON list of {"scenario": KIND, "name": TEXT, option: value, ...}. Raises `ConfigError`."""
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}", param="file") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path} must hold a JSON list of scenarios, each an object", param="file")
    scenarios = []
    for number, entry in enumerate(entries, 1):
        kind = str(entry.pop("scenario", ""))
        if kind not in LOADS:
            known = list(LOADS)
            message = f"{path}, scenario {number}: unknown `scenario` {kind!r}{nearest(kind, known)}"
            raise ConfigError(f"{message} Known: {', '.join(known)}", param="file")
        name = str(entry.pop("name", f"{number} {kind}"))
        argv = [f"--{key.replace('_', '-')}={_as_flag_value(value)}" for key, value in entry.items()]
        try:
            load = read_settings(LOADS[kind], Sources(argv=argv, environ={}))
        except ConfigError as error:
            raise ConfigError(f"{path}, scenario {number} ({name}): {error.message}", param="file") from error
        scenarios.append(Scenario(name=name, kind=kind, load=load))
    if len({scenario.name for scenario in scenarios}) < len(scenarios):
        raise ConfigError(f"{path}: two scenarios have the same name", param="file")
    return scenarios


def _as_flag_value(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, list) else value


# ---------------------------------------------------------------- what is written


def _as_run(measured: Measured, target: TargetConfig, model: str) -> Run:
    summary = reports.summarise(measured)
    scenario = measured.scenario
    settings = {
        **_plain(dataclasses.asdict(scenario.load)),
        "seed": target.seed,
        "vocab_low": target.vocab_low,
        "vocab_high": target.vocab_high,
        "model": model,
    }
    if measured.answer_source is not None:
        settings["answers"] = measured.answer_source
    return Run(
        name=scenario.name,
        kind=scenario.kind,
        settings=settings,
        summary=summary,
        warnings=[*_interrupted(measured), *reports.warnings_of(summary, scenario.kind)],
        rows=measured.rows,
    )


def _interrupted(measured: Measured) -> list[str]:
    if not measured.interrupted:
        return []
    return [f"interrupted: the figures cover the {len(measured.rows)} requests that had ended"]


def _as_report(runs: list[Run], target: TargetConfig) -> Report:
    settings = given_values(target)
    settings.pop("api_key")
    return Report(
        commit=_commit(),
        version=kvist.__version__,
        hardware=_hardware(),
        settings=_plain(settings),
        runs=runs,
    )


def _plain(values: dict[str, object]) -> dict[str, bool | str | int | float | None]:
    return {key: _plain_value(value) for key, value in values.items()}


def _plain_value(value: object) -> bool | str | int | float | None:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return value if isinstance(value, bool | str | int | float | None) else str(value)


def _output_of(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, cwd=folder)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> str | None:
    commit = _output_of("git", "rev-parse", "HEAD")
    changed = _output_of("git", "status", "--porcelain", "--untracked-files=no", ".")
    return f"{commit}-dirty" if commit and changed else commit


def _hardware() -> dict[str, str | int]:
    found: dict[str, str | int] = {"cpu": _cpu_name(), "cores": os.cpu_count() or 0, "system": platform.platform()}
    gpus = _output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if gpus:
        found["gpus"] = ", ".join(gpus.splitlines())
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _check_writable(path: Path, flag: str) -> None:
    """Raise `ConfigError` before the measurement, not after it."""
    if not path.parent.is_dir() or path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--{flag} {path} cannot be written", param=flag)


# ---------------------------------------------------------------- baselines


def _read_baseline(path: Path) -> Report:
    try:
        return reports.decode(path.read_bytes())
    except (OSError, *UNDECODABLE) as error:
        raise ConfigError(f"--baseline {path} is not a file written by --json: {error}", param="baseline") from error


def _print_differences(before: Run | None, run: Run) -> None:
    if before is None:
        print(f"  the baseline has no run named {run.name!r}")
        return
    if changed := reports.differences(run, before):
        print(f"  NOTE: the baseline had other settings: {'; '.join(changed)}")
    if num_failed := sum(before.summary.failures.values()):
        print(f"  NOTE: {num_failed} requests of the baseline failed; its figures cover the others")

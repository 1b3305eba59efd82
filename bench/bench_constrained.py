"""What do constraints cost? Time per output token with a schema of 12 fields and without, and time to the first token.

    python bench/bench_constrained.py --model-path M [--load-format dummy] [--streams 8 64] [--json out.json]

For each grammar backend, a worker serves requests in rounds: all streams free, all constrained, and half of them
constrained. The ratio is that of neighbouring rounds, so that a machine that slows down changes both. Constrained
answers end where the schema ends; free ones get as many tokens. With dummy weights the answers are random, valid
documents.

TTFT: new schemas with one output token, each sent several times; the difference to free requests in the same loop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from json_report import write_report
from served import BenchFailure, BenchServer

KINDS = ("free", "constrained", "half")
PROMPT_TOKENS = [300 + number for number in range(16)]
TIMEOUT_S = 600.0


def twelve_fields(name: str = "field") -> dict[str, Any]:
    """Return a schema whose documents have a bounded length. Another `name` makes another grammar."""
    properties: dict[str, Any] = {}
    for number in range(4):
        properties[f"{name}_text_{number}"] = {"type": "string", "maxLength": 12}
        properties[f"{name}_count_{number}"] = {"type": "integer", "minimum": 0, "maximum": 99_999}
    properties[f"{name}_kind"] = {"enum": ["alpha", "beta", "gamma"]}
    properties[f"{name}_price"] = {"type": "integer", "minimum": 0, "maximum": 1000}
    properties[f"{name}_ok"] = {"type": "boolean"}
    properties[f"{name}_tags"] = {"type": "array", "items": {"enum": ["x", "y", "z"]}, "maxItems": 3}
    assert len(properties) == 12
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def constrained(schema: dict[str, Any]) -> dict[str, Any]:
    return {"structured_outputs": {"json": schema, "disable_any_whitespace": True}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    num_tokens: int
    seconds: float
    is_valid: bool  # a whole JSON document; only of constrained requests


class Client:
    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def complete(self, seed: int, **fields: object) -> Answer:
        prompt = [token_id + seed % 97 for token_id in PROMPT_TOKENS]
        body = {"prompt": prompt, "temperature": 1.0, "seed": seed, **fields}
        start_s = time.perf_counter()
        response = await self._http.post("/v1/completions", json=body)
        seconds = time.perf_counter() - start_s
        if response.status_code != httpx.codes.OK:
            raise BenchFailure(f"{response.status_code}: {response.text[:500]}")
        found = response.json()
        return Answer(
            num_tokens=found["usage"]["completion_tokens"],
            seconds=seconds,
            is_valid=is_json(found["choices"][0]["text"]),
        )


def is_json(text: str) -> bool:
    try:
        json.loads(text, strict=False)  # xgrammar allows control characters in strings
    except ValueError:
        return False
    return True


def tpot_ms(answers: Sequence[Answer]) -> float:
    """Return the mean time per output token of the streams; the prompts are short."""
    return statistics.mean(1e3 * each.seconds / each.num_tokens for each in answers)


async def measure_streams(
    client: Client, server: BenchServer, *, num_streams: int, num_rounds: int
) -> list[dict[str, Any]]:
    schema = constrained(twelve_fields())
    first = await asyncio.gather(*(client.complete(seed, max_tokens=1000, **schema) for seed in range(num_streams)))
    if not all(each.is_valid for each in first):
        raise BenchFailure("a constrained answer is not a JSON document")
    length = round(statistics.mean(each.num_tokens for each in first))

    def request(seed: int, *, is_free: bool) -> Any:
        fields = {"max_tokens": length, "ignore_eos": True} if is_free else {"max_tokens": 1000, **schema}
        return client.complete(seed, **fields)

    rows: list[dict[str, Any]] = []
    for number in range(num_rounds):
        for kind in KINDS:
            free = [kind == "free" or (kind == "half" and place % 2 == 0) for place in range(num_streams)]
            before = server.metrics()
            answers = await asyncio.gather(
                *(request(1000 * number + place, is_free=each) for place, each in enumerate(free))
            )
            after = server.metrics()
            took = {name: after[name] - before[name] for name in ("steps", "generation_tokens")}
            seconds = sum(after[name] - before[name] for name in ("decode_step_seconds", "prompt_step_seconds"))
            rows.append(
                {
                    "round": number,
                    "kind": kind,
                    "num_streams": num_streams,
                    "tpot_ms": tpot_ms(answers),
                    "free_tpot_ms": tpot_ms([each for each, is_free in zip(answers, free, strict=True) if is_free])
                    if any(free)
                    else None,
                    "step_ms": 1e3 * seconds / took["steps"],
                    "tokens_per_step": took["generation_tokens"] / took["steps"],
                    "answers": [asdict(each) for each in answers],
                }
            )
    return rows


async def measure_first_tokens(client: Client, *, num_schemas: int, num_uses: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number in range(num_schemas):
        schema = constrained(twelve_fields(f"s{number}_{time.time_ns()}"))
        for use in range(num_uses):
            for kind, fields in (("free", {}), ("constrained", schema)):
                answer = await client.complete(number, max_tokens=1, **fields)
                rows.append({"schema": number, "use": use, "kind": kind, "ttft_ms": 1e3 * answer.seconds})
    return rows


def print_streams(backend: str, rows: Sequence[dict[str, Any]]) -> None:
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    pairs = zip(by_kind["free"], by_kind["constrained"], by_kind["half"], strict=True)
    ratios = [
        (other["tpot_ms"] / free["tpot_ms"], other["step_ms"] / free["step_ms"], half["free_tpot_ms"] / free["tpot_ms"])
        for free, other, half in pairs
    ]
    of_token, of_step, of_free = (statistics.median(each) for each in zip(*ratios, strict=True))
    means = {kind: statistics.median(row["tpot_ms"] for row in each) for kind, each in by_kind.items()}
    print(
        f"{backend:<11} {rows[0]['num_streams']:3} streams: TPOT {means['free']:.2f} ms free, "
        f"{means['constrained']:.2f} ms constrained ({percent(of_token)}, a step {percent(of_step)}); "
        f"free streams beside constrained ones {percent(of_free)}",
        flush=True,
    )


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"


def print_first_tokens(backend: str, rows: Sequence[dict[str, Any]]) -> None:
    def median_ms(kind: str, *, first: bool) -> float:
        return median(row["ttft_ms"] for row in rows if row["kind"] == kind and (row["use"] == 0) is first)

    free = median(row["ttft_ms"] for row in rows if row["kind"] == "free")
    added = [median_ms("constrained", first=first) - free for first in (True, False)]
    print(
        f"{backend:<11} TTFT {free:.2f} ms free; first use of a schema {added[0]:+.2f} ms, later {added[1]:+.2f} ms",
        flush=True,
    )


async def measure(backend: str, server: BenchServer, args: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S, trust_env=False, limits=limits) as http:
        client = Client(http)
        await measure_first_tokens(client, num_schemas=1, num_uses=3)  # warms up
        first_tokens = await measure_first_tokens(client, num_schemas=args.schemas, num_uses=4)
        print_first_tokens(backend, first_tokens)
        streams: list[dict[str, Any]] = []
        for count in args.streams:
            rows = await measure_streams(client, server, num_streams=count, num_rounds=args.rounds)
            print_streams(backend, rows)
            streams += rows
    return {"backend": backend, "first_tokens": first_tokens, "streams": streams}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="a model with a tokenizer")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backends", nargs="+", default=["llguidance", "xgrammar"])
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--schemas", type=int, default=10, help="new schemas for the times to the first token")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of `kvist serve`")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    flags = [f"--model-path={args.model_path}", f"--load-format={args.load_format}", f"--device={args.device}"]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for backend in args.backends:
            with BenchServer(backend, [*flags, f"--grammar-backend={backend}", *args.flags], Path(folder)) as server:
                try:
                    server.start(TIMEOUT_S)
                    results.append(asyncio.run(measure(backend, server, args)))
                except BenchFailure as failure:
                    sys.exit(str(failure))
    if args.json:
        write_report(args.json, args, rows=results)


if __name__ == "__main__":
    main()

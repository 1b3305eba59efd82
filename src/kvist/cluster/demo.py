"""`kvist demo`: a cluster of separate processes answers a question and a chat; then a table of the figures is printed.

The demo starts a cluster, streams the answers, shows one answer with the form of a JSON schema, runs a small program of
kvist.lang, and stops the cluster. Before the
last turns, the upper cache tiers are flushed, so that these turns load their pages from the tier below. The demo fails
if the first answer lacks the expected word, if no page was loaded from a tier, or if the answer with a schema does not
have its form.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx

from kvist.clock import MonotonicClock
from kvist.cluster.chat_turn import Message, TurnOptions, TurnReport, stream_turn
from kvist.cluster.leftovers import stop_and_clear
from kvist.cluster.plan import ClusterShape, plan_on_free_ports
from kvist.cluster.processes import Processes
from kvist.cluster.start_display import StartLines
from kvist.cluster.up import interrupt_on_stop_signals
from kvist.demo_program import run_demo_program
from kvist.demo_schema import ask_for_json
from kvist.errors import KvistError
from kvist.supervisor.child import Child
from kvist.supervisor.probe import probe_child

MAX_TOKENS = 64
TURN_TIMEOUT_S = 120.0
CHAT = (
    "Name three things that a plant needs to grow.",
    "Why does it need water?",
    "Thank you. Now say that in one short sentence.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCheck:
    """A chat turn after a flush: its pages must come from the tier `source`."""

    name: str
    flushed: Mapping[str, str]  # the query of /flush_cache
    described: str
    text: str
    source: str


FROM_HOST = TierCheck(
    name="from host",
    flushed={"tier": "device"},
    described="the device pools",
    text="And what does it need light for?",
    source="host",
)
FROM_STORE = TierCheck(
    name="from store",
    flushed={},
    described="the device pools and of host memory",
    text="What happens to it in the dark?",
    source="storage",
)


def show_line(text: str) -> None:
    print(text, flush=True)


def show_piece(piece: str) -> None:
    print(piece, end="", flush=True)


def run_demo(shape: ClusterShape, *, question: str, expect: str) -> int:
    """Run the demo; return 0 if all expectations are met, else 1. The workers need a host tier and a store. Raises
    `KvistError` when the cluster fails."""
    processes = Processes(plan_on_free_ports(shape), probe=probe_child, sink=lambda _name, _line: None)
    checks = [FROM_HOST, FROM_STORE]
    with interrupt_on_stop_signals(processes), contextlib.ExitStack() as stack:
        stack.callback(stop_and_clear, processes, shape.runtime_dir)
        config = shape.config
        if shape.pool is not None:
            show_line(f"Starting the master and {shape.pool.num_stores} stores of a page pool, then the workers ...")
        show_line(f"Starting {config.prefill} prefill worker(s), {config.decode} decode worker(s) and a router ...")
        processes.start()
        start_lines = StartLines(processes.children, lambda text: show_line("  " + text))
        processes.wait_ready(config.start_timeout_s, each_second=start_lines)
        router = processes.children["router"]
        show_line(f"Ready at {router.plan.url}\n")
        try:
            rows = _talk(router.plan.url, question, checks)
        except (KvistError, httpx.HTTPError):
            show_line("\nThe last lines of each process:")
            for child in processes.children.values():
                show_line("\n".join(f"  [{child.plan.name}] {line}" for line in list(child.last_lines)[-15:]))
            raise
        show_line(table(rows))
        show_line(LEGEND)
        show_line(process_summary(rows, list(processes.children.values())))
        for check, (_name, report) in zip(checks, rows[-len(checks) :], strict=True):
            show_line(cache_summary(check, report))
        show_line("")
        with httpx.Client(base_url=router.plan.url, timeout=TURN_TIMEOUT_S, trust_env=False) as client:
            wrong_form = ask_for_json(client, show_line)
        run_demo_program(router.plan.url, show_line)
        show_line("")
    show_line("All processes are stopped.")
    failures = unmet_expectations(rows, checks, question=question, expect=expect)
    failures += [] if wrong_form is None else [wrong_form]
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def unmet_expectations(
    rows: Sequence[tuple[str, TurnReport]], checks: Sequence[TierCheck], *, question: str, expect: str
) -> list[str]:
    """Return a line for each expectation that was not met."""
    found = []
    if expect and expect.lower() not in rows[0][1].text.lower():
        found.append(f"The answer to {question!r} does not name {expect}.")
    reports = dict(rows)
    for check in checks:
        if not reports[check.name].num_cached_by_tier.get(check.source):
            found.append(
                f"The pages of {check.described} were flushed, but no page was loaded from the {check.source} tier."
            )
    return found


def _talk(url: str, question: str, checks: Sequence[TierCheck]) -> list[tuple[str, TurnReport]]:
    """Return (name of the row, report) of the question, of each turn of the chat, and of each check."""
    with httpx.Client(base_url=url, timeout=TURN_TIMEOUT_S, trust_env=False) as client:
        rows = [("question", _ask(client, [{"role": "user", "content": question}]))]
        messages: list[Message] = []
        for index, text in enumerate(CHAT):
            rows.append((f"chat {index + 1}", _next_turn(client, messages, text)))
        for check in checks:
            answer = client.post("/flush_cache", params=check.flushed).raise_for_status().json()
            show_line(f"Flushed: the {answer['num_pages']} pages of {check.described}. The chat goes on.\n")
            rows.append((check.name, _next_turn(client, messages, check.text)))
    return rows


def _next_turn(client: httpx.Client, messages: list[Message], text: str) -> TurnReport:
    """Send `text`; append the question and the answer to `messages`."""
    messages.append({"role": "user", "content": text})
    report = _ask(client, messages)
    messages.append({"role": "assistant", "content": report.text})
    return report


def _ask(client: httpx.Client, messages: Sequence[Message]) -> TurnReport:
    show_line(f"you   > {messages[-1]['content']}")
    show_piece("model > ")
    options = TurnOptions(max_tokens=MAX_TOKENS, temperature=0)  # greedy: every run gives the same answers
    report = stream_turn(client, messages, options, clock=MonotonicClock(), show=show_piece)
    show_line("\n")
    return report


_COLUMNS = (
    *("turn", "TTFT", "TPOT", "prompt", "cached", "answer"),
    *("pages sent", "pages reused", "moved", "handoff", "waited"),
)


LEGEND = """
pages sent: written by prefill into decode's pool; pages reused: prompt pages already cached at decode
handoff: from decode's grant until its pages are verified, while prefill computes; waited: the part after prefill ended
"""


def table(rows: Sequence[tuple[str, TurnReport]]) -> str:
    """Return the table, one line per turn."""
    cells = [_COLUMNS, *(_row(name, report) for name, report in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _row(name: str, report: TurnReport) -> tuple[str, ...]:
    return (
        name,
        f"{report.ttft_s * 1e3:.0f} ms",
        "-" if report.tpot_s is None else f"{report.tpot_s * 1e3:.1f} ms",
        f"{report.num_prompt_tokens} tok",
        f"{report.num_cached_tokens} tok",
        f"{report.num_output_tokens} tok",
        str(report.num_pages),
        str(report.num_pages_reused),
        f"{report.num_bytes / 2**20:.2f} MiB",
        f"{report.handoff_s * 1e3:.1f} ms",
        f"{report.handoff_wait_s * 1e3:.1f} ms",
    )


def process_summary(rows: Sequence[tuple[str, TurnReport]], children: Sequence[Child]) -> str:
    """Return which processes did the prefill and the decode."""
    names = {child.plan.url.removeprefix("http://"): f"{child.plan.name} (process {child.pid})" for child in children}
    prefill = sorted({names.get(worker, worker) for _name, report in rows if (worker := report.prefill_worker)})
    decode = sorted({names.get(worker, worker) for _name, report in rows if (worker := report.decode_worker)})
    return (
        f"Prefill ran in {', '.join(prefill)}, decode in {', '.join(decode)}; "
        "the router tokenised the prompts, chose the workers and merged their tokens."
    )


def cache_summary(check: TierCheck, report: TurnReport) -> str:
    """Return which tiers the cached tokens of a turn came from."""
    places = {"device": "from the device pool", "host": "from host memory", "storage": "from storage"}
    described = [f"{report.num_cached_by_tier.get(tier, 0)} {words}" for tier, words in places.items()]
    return (
        f"{check.name.capitalize()}: {report.num_cached_tokens} of {report.num_prompt_tokens} prompt tokens were "
        f"cached ({', '.join(described)})."
    )

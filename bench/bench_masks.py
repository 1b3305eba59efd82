"""What does the host do for a step of many constrained streams, and how long does it take?

    python bench/bench_masks.py --model-path M [--streams 64] [--vocabulary 151936] [--threads 1 8] [--json out.json]

The code of the runner (runner/answers.py and runner/shaping.py) follows answers to the schema of bench_constrained.py,
without a model: each token is drawn from the mask, all equally likely. The vocabulary is that of M, filled up with
synthetic tokens, which answers never need but masks must judge. Microseconds a step: the time that passes, which means
something on an idle machine only; CPU time of the thread that also plans and launches steps; CPU time of all threads.
With one thread, a grammar has one copy, and its masks are computed one after the other.

    accept    the tokens of a step enter their matchers
    masks     the masks of the rows, and their way to the table of bans
    forced    tokens that follow without a step, and the masks after them
    all       all of them
    copy      baseline: one copy of the masks of all rows
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from bench_constrained import twelve_fields
from json_report import write_report
from kvist.checkpoint import find_checkpoint
from kvist.grammar import llguidance
from kvist.grammar.backend import TokenTable, Vocabulary
from kvist.grammar.backends import GRAMMAR_BACKENDS
from kvist.grammar.compiler import GrammarCompiler
from kvist.models import load_model_config
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.request import Constraint, RequestId, SamplingParams, SlotId
from kvist.runner.shaping import table_sizes
from kvist.runner.slots import SlotTable
from kvist.text import load_tokenizer

PARTS = ("accept", "masks", "forced", "all", "copy")
PROMPT = [5, 6, 7]
COMPILE_TIMEOUT_S = 120.0  # reads the vocabulary first


class LargerTokens:
    """A `TokenTable`: the tokens of another one, and synthetic ones: the text of one and the beginning of another."""

    def __init__(self, tokens: TokenTable, size: int) -> None:
        self.vocab_size = size
        self.special_token_ids = tokens.special_token_ids
        self._tokens = tokens
        known = {tokens.token_bytes(token_id) for token_id in range(tokens.vocab_size)}
        whole = sorted(text for text in known if 2 <= len(text) <= 8 and text.strip().isalpha())
        dice, found = random.Random(0), dict[bytes, None]()
        while len(found) < size - tokens.vocab_size:
            text = dice.choice(whole) + dice.choice(whole).strip()[: dice.randint(1, 4)]
            if text not in known:
                found[text] = None
        self._synthetic = list(found)

    def token_bytes(self, token_id: int) -> bytes:
        first = self._tokens.vocab_size
        return self._tokens.token_bytes(token_id) if token_id < first else self._synthetic[token_id - first]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._tokens.encode(text, add_special_tokens=add_special_tokens)


class Stopwatch:
    def __init__(self) -> None:
        self.times_us: dict[str, list[tuple[float, ...]]] = defaultdict(list)  # passed, of this thread, of the process

    @contextmanager
    def __call__(self, *parts: str) -> Iterator[None]:
        clocks = (time.perf_counter, time.thread_time, time.process_time)
        starts_s = [clock() for clock in clocks]
        yield
        took = tuple(1e6 * (clock() - start_s) for clock, start_s in zip(clocks, starts_s, strict=True))
        for part in parts:
            self.times_us[part].append(took)


class Streams:
    """Answers that start again when they are over."""

    def __init__(self, table: SlotTable, constraint: Constraint, num_streams: int, seed: int) -> None:
        self._table = table
        self._constraint = constraint
        self._dice = np.random.default_rng(seed)
        self._ends = {SlotId(slot): 0 for slot in range(num_streams)}  # the number of known tokens; 0: not started
        self.num_tokens = 0
        self._step_id = 0

    def step(self, watch: Stopwatch) -> None:
        self._start([slot for slot, end in self._ends.items() if not end])
        items = [
            BatchItem(slot=slot, token_ids=(), start=end - 1, page_ids=(), samples=True)
            for slot, end in self._ends.items()
        ]
        answers, shaping = self._table.answers, self._table.shaping
        rows = answers.followed(items)
        with watch("masks", "all"):
            shaping.before_choice(items, rows)
        token_ids = [self._choose(each.row, each.position) for each in rows]
        with watch("accept", "all"):
            answers.read(rows, token_ids)
        with watch("forced", "all"):
            following = answers.take_forced(rows)
        for row, slot in enumerate(self._ends):
            answer = answers.get(slot)
            assert answer is not None
            assert not answer.error, answer.error
            self.num_tokens += 1 + len(following.get(row, ()))
            is_over = answer.matcher is None or answer.matcher.is_terminated
            self._ends[slot] = 0 if is_over else len(answer.token_ids)

    def _choose(self, row: int, position: int) -> int:
        banned = self._table.shaping.tables.banned[row].numpy()
        assert position > 0
        return int(self._dice.choice(np.flatnonzero(np.unpackbits(~banned.view(np.uint8), bitorder="little"))))

    def _start(self, slots: Sequence[SlotId]) -> None:
        self._step_id += 1
        sampling = SamplingParams(max_tokens=1000, constraint=self._constraint)
        started = tuple(
            StartRequest(
                slot=slot,
                request_id=RequestId(f"r-{slot}"),
                sampling=sampling,
                token_ids=PROMPT,
                num_prompt_tokens=len(PROMPT),
            )
            for slot in slots
        )
        ended = tuple(slot for slot in slots if slot in self._table.open_slots)
        self._table.update(Batch(step_id=self._step_id, ended=ended, started=started, items=()))
        self._ends.update(dict.fromkeys(slots, len(PROMPT)))


def read_vocabulary(args: argparse.Namespace) -> Vocabulary:
    checkpoint = find_checkpoint(args.model_path)
    tokens = load_tokenizer(checkpoint)
    end_token_ids = load_model_config(checkpoint).eos_token_ids
    larger = LargerTokens(tokens, args.vocabulary) if args.vocabulary > tokens.vocab_size else tokens
    return Vocabulary(tokens=larger, size=max(args.vocabulary, tokens.vocab_size), end_token_ids=end_token_ids)


def measure(args: argparse.Namespace, vocabulary: Vocabulary, num_threads: int) -> tuple[Stopwatch, float]:
    llguidance._NUM_MASK_THREADS = num_threads
    compiler = GrammarCompiler(lambda: GRAMMAR_BACKENDS[args.backend].make({}, vocabulary))
    constraint = Constraint(kind="json_schema", text=json.dumps(twelve_fields()), whitespace="")
    compiler.start(constraint).result(COMPILE_TIMEOUT_S)
    sizes = table_sizes(args.streams, vocab_size=vocabulary.size, context_len=1024)
    streams = Streams(SlotTable(sizes, torch.device("cpu"), compiler), constraint, args.streams, args.seed)
    watch = Stopwatch()
    for _ in range(args.warm_up):
        streams.step(watch)
    watch.times_us.clear()
    streams.num_tokens = 0
    source = np.ones((args.streams, vocabulary.num_words), dtype=np.int32)
    target = np.empty_like(source)
    for _ in range(args.steps):
        streams.step(watch)
        with watch("copy"):
            target[:] = source
    return watch, streams.num_tokens / args.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="a model with a tokenizer")
    parser.add_argument("--backend", default="llguidance")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=151_936, help="tokens; not fewer than the model has")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, llguidance._NUM_MASK_THREADS])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=20, help="steps before the measured ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    vocabulary, rows = read_vocabulary(args), []
    for num_threads in args.threads:
        watch, tokens_per_step = measure(args, vocabulary, num_threads)
        what = f"{args.streams} streams, {tokens_per_step:.0f} tokens a step, {num_threads} mask threads"
        print(f"{what}; microseconds a step:")
        for part in PARTS:
            passed_us, thread_us, process_us = (np.array(watch.times_us[part]).sum(axis=0) / args.steps).tolist()
            print(f"{part:>7}: passed {passed_us:9.0f}   CPU of this thread {thread_us:9.0f}, of all {process_us:9.0f}")
        names = ("passed_us", "thread_us", "process_us")
        rows += [
            {"num_threads": num_threads, "part": part, **dict(zip(names, times, strict=True))}
            for part, all_times in watch.times_us.items()
            for times in all_times
        ]
    if args.json:
        write_report(args.json, args, rows=rows)


if __name__ == "__main__":
    main()

"""Does every document that a schema lets through validate, and is every other text impossible?

    python bench/bench_schemas.py --model-path M [--seeds 12] [--served 0] [--json out.json]

The schemas are the supported ones of the official JSON Schema suite (draft 2020-12), compiled for the vocabulary of the
model M. For each schema and seed, tokens are drawn at random from the masks, all equally likely, which is hotter than
any temperature, but closing ones more often in long documents; `jsonschema-rs` validates the document. Then characters
of the document are changed: the matcher must refuse a changed text that the schema forbids.

`--served N`: N of these pairs are also answered by a worker with the model, with temperature 1.5.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import numpy as np

from json_report import write_report
from kvist.checkpoint import find_checkpoint
from kvist.grammar.backend import Grammar, Vocabulary
from kvist.grammar.backends import GRAMMAR_BACKENDS
from kvist.models import load_model_config
from kvist.request import Constraint
from kvist.text import load_tokenizer
from served import BenchFailure, BenchServer

SUITE = Path(__file__).parent.parent / "tests" / "conformance" / "json_schema_suite.json"
# Calendars, lengths of names and the like, which no grammar of this kind expresses: docs/structured-output.md has them.
APPROXIMATE_FORMATS = {"date-time", "date", "time", "hostname"}
MAX_TOKENS = 300  # of a document; a longer one is counted as cut
NUM_TRIES = 4  # to get a whole document
NUM_CHANGES = 8  # changed texts of a document
CHANGED_TO = '"{}[]:,0123456789.eE+-truefalsn aZ\\'
TIMEOUT_S = 1800.0  # of a request: other work may keep the machine busy
PATIENT = (f"--max-queue-wait-s={TIMEOUT_S}", f"--queue-timeout-s={TIMEOUT_S}")  # flags of the worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    schema: str  # file and description
    seed: int
    source: str  # "masks" or "model"
    result: str  # "valid", "invalid" or "cut"
    num_tokens: int
    text: str | None = None  # of an invalid document, or of an invalid text that is possible
    num_refused: int = 0  # changed texts that the schema forbids and the matcher refuses
    num_passed: int = 0  # changed texts that the schema forbids and the matcher takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    schema: Any
    validator: Any

    def is_valid(self, text: str) -> bool:
        try:
            value = json.loads(text, parse_float=finite)
        except ValueError:
            return False
        return bool(self.validator.is_valid(value))


def finite(text: str) -> float:
    """Return the number, or the largest one that has its sign: JSON has numbers that a double has not."""
    return max(-sys.float_info.max, min(sys.float_info.max, float(text)))


def read_cases() -> list[Case]:
    suite = json.loads(SUITE.read_text(encoding="utf-8"))
    return [
        Case(
            name=f"{file}: {description}",
            schema=schema,
            validator=jsonschema_rs.validator_for(
                schema, validate_formats=Path(file).stem not in APPROXIMATE_FORMATS and "format" in file
            ),
        )
        for file, groups in suite["supported"].items()
        for description, schema, _ in groups
    ]


def constraint_of(case: Case) -> Constraint:
    return Constraint(kind="json_schema", text=json.dumps(case.schema))


class Walker:
    """Draws documents from the masks of a grammar."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._ends = set(vocabulary.end_token_ids)
        structure = {b'"', b"}", b"]", b",", b":", b"0", b"1", b"5", b"true", b"null", b"{", b"[", b'"}', b'",'}
        is_structure = np.array([each in structure for each in vocabulary.token_bytes()])
        self._structure = is_structure

    def draw(self, grammar: Grammar, dice: random.Random) -> list[int] | None:
        """Return the tokens of a whole document without its end; None if it is too long."""
        matcher, tokens = grammar.matcher(), list[int]()
        mask = np.zeros(self._vocabulary.num_words, dtype=np.int32)
        while len(tokens) < MAX_TOKENS:
            matcher.fill(mask)
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: self._vocabulary.size].astype(bool)
            choices = np.flatnonzero(bits)
            may_end = any(bits[end] for end in self._ends)
            if may_end and (len(choices) <= len(self._ends) or dice.random() < 0.3):
                return tokens
            closing = np.flatnonzero(bits & self._structure)
            if len(closing) and dice.random() < len(tokens) / 100:
                choices = closing
            token_id = int(choices[dice.randrange(len(choices))])
            if token_id in self._ends:
                return tokens
            tokens.append(token_id)
            if not matcher.accept([token_id]):
                raise BenchFailure("a token of the mask is refused")
        return None

    def takes(self, grammar: Grammar, text: str) -> bool:
        """Return whether the text is a whole document of the grammar, in the tokens of the tokenizer."""
        tokens = self._vocabulary.tokens.encode(text, add_special_tokens=False)
        return grammar.matcher().accept([*tokens, self._vocabulary.end_token_ids[0]])


def changed(text: str, dice: random.Random) -> str:
    place = dice.randrange(len(text))
    kind = dice.randrange(4)
    new = dice.choice(CHANGED_TO)
    if kind == 0:
        return text[:place] + new + text[place + 1 :]
    if kind == 1:
        return text[:place] + new + text[place:]
    return text[:place] + text[place + 1 :] if kind == 2 else text[:place]


def walk(case: Case, grammar: Grammar, walker: Walker, vocabulary: Vocabulary, seed: int) -> Row:
    dice = random.Random(f"{case.name}/{seed}")
    for _ in range(NUM_TRIES):
        tokens = walker.draw(grammar, dice)
        if tokens is not None:
            break
    else:
        return Row(schema=case.name, seed=seed, source="masks", result="cut", num_tokens=MAX_TOKENS)
    text = b"".join(vocabulary.tokens.token_bytes(each) for each in tokens).decode("utf-8", "replace")
    if not case.is_valid(text):
        return Row(schema=case.name, seed=seed, source="masks", result="invalid", num_tokens=len(tokens), text=text)
    others = {changed(text, dice) for _ in range(NUM_CHANGES)} - {""}
    forbidden = [each for each in others if not case.is_valid(each)]
    passed = [each for each in forbidden if walker.takes(grammar, each)]
    return Row(
        schema=case.name,
        seed=seed,
        source="masks",
        result="valid",
        num_tokens=len(tokens),
        num_refused=len(forbidden) - len(passed),
        num_passed=len(passed),
        text=passed[0] if passed else None,
    )


async def ask(cases: Sequence[Case], server: BenchServer, numbers: range, num_at_once: int) -> list[Row]:
    """Let the model answer the pairs of a schema and a seed with these numbers, `num_at_once` at a time."""
    places = asyncio.Semaphore(num_at_once)

    async def one(http: httpx.AsyncClient, number: int) -> Row:
        case, seed = cases[(number * 7) % len(cases)], number  # 7: near ones are of one file
        fields = {"structured_outputs": {"json": case.schema}, "temperature": 1.5, "seed": seed, "max_tokens": 200}
        message = {"role": "user", "content": "Write a JSON document, as short as you can."}
        async with places:
            response = await http.post("/v1/chat/completions", json={"messages": [message], **fields})
        if response.status_code != httpx.codes.OK:
            raise BenchFailure(f"{case.name}: {response.status_code} {response.text[:300]}")
        found = response.json()
        choice, text = found["choices"][0], found["choices"][0]["message"]["content"]
        is_whole = choice["finish_reason"] == "stop"
        result = "cut" if not is_whole else "valid" if case.is_valid(text) else "invalid"
        return Row(
            schema=case.name,
            seed=seed,
            source="model",
            result=result,
            num_tokens=found["usage"]["completion_tokens"],
            text=text if result == "invalid" else None,
        )

    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S, trust_env=False) as http:
        return list(await asyncio.gather(*(one(http, number) for number in numbers)))


def print_rows(source: str, rows: Sequence[Row]) -> None:
    counts = Counter(row.result for row in rows)
    refused, passed = sum(row.num_refused for row in rows), sum(row.num_passed for row in rows)
    print(
        f"{source}: {len(rows)} pairs of {len({row.schema for row in rows})} schemas: {counts['valid']} valid, "
        f"{counts['invalid']} invalid, {counts['cut']} too long; forbidden texts: {refused} refused, {passed} possible",
        flush=True,
    )
    for row in rows:
        if row.text is not None:
            print(f"  {row.result}: {row.schema}, seed {row.seed}: {row.text!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="a model with a tokenizer")
    parser.add_argument("--seeds", type=int, default=12, help="documents of each schema")
    parser.add_argument("--served", type=int, default=0, help="pairs that a worker with the model answers")
    parser.add_argument("--first", type=int, default=0, help="number of the first of these pairs, to go on after a run")
    parser.add_argument("--at-once", type=int, default=8, help="requests that are open at a time, with --served")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    checkpoint = find_checkpoint(args.model_path)
    config = load_model_config(checkpoint)
    vocabulary = Vocabulary(
        tokens=load_tokenizer(checkpoint), size=config.vocab_size, end_token_ids=config.eos_token_ids
    )
    backend, walker, cases = GRAMMAR_BACKENDS["llguidance"].make({}, vocabulary), Walker(vocabulary), read_cases()
    rows: list[Row] = []
    for case in cases:
        grammar = backend.compile(constraint_of(case))
        rows += [walk(case, grammar, walker, vocabulary, seed) for seed in range(args.seeds)]
    print_rows("masks", rows)
    if args.served:
        with tempfile.TemporaryDirectory() as folder:
            with BenchServer("served", [f"--model-path={args.model_path}", *PATIENT], Path(folder)) as server:
                try:
                    server.start(TIMEOUT_S)
                    answered = asyncio.run(
                        ask(cases, server, range(args.first, args.first + args.served), args.at_once)
                    )
                except BenchFailure as failure:
                    sys.exit(str(failure))
            print_rows("model", answered)
            rows += answered
    if args.json:
        write_report(args.json, args, rows=[asdict(row) for row in rows])
    sys.exit(any(row.result == "invalid" or row.num_passed for row in rows))


if __name__ == "__main__":
    main()

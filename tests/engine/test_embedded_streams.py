"""Tool calls and JSON of the embedded model: preempted, handed over or continued elsewhere, a stream has the tokens of
one engine that is not disturbed."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch

from kvist.checkpoint import find_checkpoint
from kvist.grammar.backend import Vocabulary
from kvist.grammar.backends import GRAMMAR_BACKENDS
from kvist.grammar.compiler import GrammarCompiler
from kvist.models import load_model_config
from kvist.models.load import load_model
from kvist.models.parallel import TensorParallel
from kvist.request import Constraint, EngineRequest, Role
from kvist.testing.memory_cluster import MemoryCluster, Stream
from kvist.text import load_tokenizer
from kvist.tools import AnswerFormats, answer_parser
from kvist.tools.constrained import CallableTool, calls_tag
from kvist.tools.tables import HERMES
from tests.engine.conftest import request_of
from tests.tools.cases import Answer

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [CallableTool(name="weather", parameters=WEATHER, strict=True, param="tools[0]")]
TAG, _ = calls_tag(HERMES, TOOLS, required=True, parallel=True)
CONSTRAINTS = {
    "tool": Constraint(kind="structural_tag", text=json.dumps(TAG)),
    "schema": Constraint(kind="json_schema", text=json.dumps(WEATHER)),
}
PROMPTS = ("Will it rain in Oslo this week?", "Is it warm in Reims for a walk on the hills of the vineyards?")


def test_disturbed_streams_of_the_embedded_model_equal_undisturbed_ones(tmp_path: Path) -> None:
    checkpoint = find_checkpoint(None)
    config, tokenizer = load_model_config(checkpoint), load_tokenizer(checkpoint)
    vocabulary = Vocabulary(tokens=tokenizer, size=config.vocab_size, end_token_ids=config.eos_token_ids)
    grammars = GrammarCompiler(lambda: GRAMMAR_BACKENDS["llguidance"].make({}, vocabulary))
    model = load_model(checkpoint, config, dtype=torch.float32, device=torch.device("cpu"), tp=TensorParallel())
    world = MemoryCluster(model, tmp_path.resolve())

    def request(kind: str, form: str, number: int) -> EngineRequest:
        return request_of(
            f"{kind}-{form}-{number}",
            tuple(tokenizer.encode(PROMPTS[number])),
            temperature=0.9,
            seed=number,
            max_tokens=40,
            ignore_eos=False,
            constraint=CONSTRAINTS[form],
        )

    cases = [(form, number) for form in CONSTRAINTS for number in range(len(PROMPTS))]
    calm = world.start(num_pages=128, grammars=grammars)
    alone = {case: world.submit_full(calm, request("alone", *case)) for case in cases}
    world.run()
    small = world.start(num_pages=26, grammars=grammars)
    prefill = world.start(role=Role.PREFILL, num_pages=64, grammars=grammars)
    decode = world.start(role=Role.DECODE, num_pages=26, grammars=grammars)
    streams: dict[tuple[str, str, int], Stream] = {}
    for form, number in cases:
        streams["unified", form, number] = world.submit_full(small, request("unified", form, number))
        streams["pair", form, number] = world.submit_pair(prefill, decode, request("pair", form, number))
        known = tuple(alone[form, number].token_ids)
        continued = msgspec.structs.replace(
            request("continued", form, number), output_token_ids=known[: len(known) // 2]
        )
        streams["continued", form, number] = world.submit_full(calm, continued)
    world.run()
    assert small.scheduler.status().totals["preemptions"], "the pool was large enough: this tests nothing"
    assert decode.scheduler.status().totals["preemptions"], "the pool was large enough: this tests nothing"
    for (kind, form, number), stream in streams.items():
        first = alone[form, number]
        tokens = first.token_ids[: min(stream.tokens)] + [stream.tokens[place] for place in sorted(stream.tokens)]
        assert tokens == first.token_ids, (kind, form, number)
        assert stream.finish is first.finish
    for number in range(len(PROMPTS)):
        parser, answer = answer_parser(AnswerFormats(HERMES, None)), Answer()
        for event in (*parser.push(tokenizer.decode(alone["tool", number].token_ids)), *parser.finish()):
            answer.add(event)
        assert answer.calls
        assert answer.calls[0][0] == "weather"
    world.check_ledgers()
    world.close()

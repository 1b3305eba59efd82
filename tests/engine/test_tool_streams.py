"""Tool calls of real engines with the tiny model: preempted, handed over or continued elsewhere, a stream has the same
tokens and the same calls as one engine that is not disturbed."""

from __future__ import annotations

import json

import jsonschema_rs
import msgspec
import pytest

from kvist.request import Constraint, EngineRequest, Role
from kvist.testing.memory_cluster import MemoryCluster, Stream
from kvist.testing.specs import RequestFields
from kvist.testing.tokenizers import byte_tokenizer
from kvist.tools import AnswerFormats, answer_parser
from kvist.tools.constrained import CallableTool, calls_tag
from kvist.tools.tables import NamedCall, Opening, Region, ToolFormat, Written
from tests.engine.conftest import request_of
from tests.engine.test_engines import prompt
from tests.tools.cases import Answer

TOKENS = byte_tokenizer()  # the tiny model has the first 128 of them: no blank
FORMAT = ToolFormat(
    name="test",
    template_marks=(),
    openings=(Opening(text="[CALLS]", region=Region(between=",", end="[/CALLS]")),),
    separators=(",",),
    closings=("[/CALLS]",),
    calls=(NamedCall(begin="", arguments_begin="[ARGS]", written=Written(name_end="[ARGS]")),),
)
BOOK = {
    "type": "object",
    "properties": {"to": {"enum": ["Oslo", "Reims"]}, "n": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["to", "n"],
    "additionalProperties": False,
}
TOOLS = [
    CallableTool(name="book", parameters=BOOK, strict=True, param="tools[0]"),
    CallableTool(name="now", parameters={}, strict=True, param="tools[1]"),
]
LENGTHS = (9, 12, 14, 17, 20)  # of the prompts


def sampling(seed: int) -> RequestFields:
    tag, _ = calls_tag(FORMAT, TOOLS, required=True, parallel=True)
    constraint = Constraint(kind="structural_tag", text=json.dumps(tag))
    return {"temperature": 1.3, "seed": seed, "max_tokens": 60, "ignore_eos": False, "constraint": constraint}


def calls_in(token_ids: list[int], num_together: int) -> Answer:
    """Read the answer as a gateway that gets some tokens at a time."""
    parser, answer = answer_parser(AnswerFormats(FORMAT, None)), Answer()
    pieces = [TOKENS.decode(token_ids[at : at + num_together]) for at in range(0, len(token_ids), num_together)]
    for event in (*(event for piece in pieces for event in parser.push(piece)), *parser.finish()):
        answer.add(event)
    return answer


@pytest.mark.parametrize("seed", [1, 2])
def test_disturbed_tool_streams_equal_undisturbed_ones(world: MemoryCluster, seed: int) -> None:
    fields = sampling(seed)
    alone = [
        world.answer(world.start(overlap=False), request_of(f"alone{length}", prompt(length, seed=seed), **fields))
        for length in LENGTHS
    ]
    small = world.start(num_pages=30)
    prefill = world.start(role=Role.PREFILL, num_pages=64)
    decode = world.start(role=Role.DECODE, num_pages=36)

    def request(kind: str, length: int) -> EngineRequest:
        return request_of(f"{kind}{length}", prompt(length, seed=seed), **fields)

    streams: dict[tuple[str, int], Stream] = {}
    for length, first in zip(LENGTHS, alone, strict=True):
        streams["unified", length] = world.submit_full(small, request("unified", length))
        streams["pair", length] = world.submit_pair(prefill, decode, request("pair", length))
        cut = len(first.token_ids) * length // 24
        continued = msgspec.structs.replace(request("continued", length), output_token_ids=tuple(first.token_ids[:cut]))
        streams["continued", length] = world.submit_full(small, continued)
    world.run()
    assert small.scheduler.status().totals["preemptions"], "the pool was large enough: this tests nothing"
    assert decode.scheduler.status().totals["preemptions"], "the pool was large enough: this tests nothing"
    num_calls = 0
    for (kind, length), stream in streams.items():
        first = alone[LENGTHS.index(length)]
        tokens = first.token_ids[: min(stream.tokens)] + [stream.tokens[place] for place in sorted(stream.tokens)]
        assert tokens == first.token_ids, (kind, length)
        assert stream.finish is first.finish
        answer = calls_in(tokens, 1)
        assert answer == calls_in(tokens, 7) == calls_in(tokens, len(tokens))
        for name, arguments in answer.calls[: len(answer.ended)]:
            assert name in ("book", "now")
            schema = BOOK if name == "book" else {"type": "object", "maxProperties": 0}
            assert jsonschema_rs.validator_for(schema).is_valid(json.loads(arguments))
        num_calls += len(answer.ended)
    assert num_calls
    world.check_ledgers()

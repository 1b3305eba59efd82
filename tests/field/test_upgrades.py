"""Reports on upgrades and migrated requests: RBG #22, #307 and #455, Dynamo #7930 and #7634.

There, prefill and decode had to be upgraded in step, and a request with a schema that moved to another worker began its
JSON again inside the JSON so far. Here neighbouring versions hand over to each other, others serve alone, and the
tokens of an answer so far are replayed into its matcher.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvist.models.decoder import CausalLM
from kvist.protocol import PROTOCOL_VERSION
from kvist.request import Constraint, Mode, Role
from kvist.router.policy import Reason
from kvist.testing.memory_cluster import MemoryCluster
from kvist.testing.router_bench import RouterBench
from kvist.testing.specs import make_pool, make_request
from kvist.testing.tokenizers import byte_tokenizer
from tests.engine.conftest import request_of, tiny_model, tiny_model_path

__all__ = ["tiny_model", "tiny_model_path"]  # fixtures

OLD, NEW, NEXT = PROTOCOL_VERSION - 1, PROTOCOL_VERSION, PROTOCOL_VERSION + 1


async def joined(prefill_version: int, decode_version: int) -> tuple[RouterBench, list[Mode], list[Mode]]:
    """Return a router after one request, and the work that it sent to prefill and to decode."""
    bench = RouterBench()
    pools = (make_pool(),)
    prefill = bench.engines.join("p", role=Role.PREFILL, protocol_version=prefill_version, transports=pools)
    decode = bench.engines.join("d", role=Role.DECODE, protocol_version=decode_version, transports=pools)
    await bench.begin(make_request(max_tokens=64))
    prefill_work, decode_work = ([each.mode for each in bench.engines.submits(worker)] for worker in (prefill, decode))
    return bench, prefill_work, decode_work


@pytest.mark.parametrize(("prefill", "decode"), [(OLD, OLD), (OLD, NEW), (NEW, OLD), (NEW, NEXT), (NEXT, NEXT)])
async def test_rbg_22_307_455_prefill_and_decode_of_neighbouring_versions_hand_over(prefill: int, decode: int) -> None:
    bench, _, decode_work = await joined(prefill, decode)
    assert decode_work == [Mode.DECODE], "the pages come from the prefill worker"
    assert bench.dispatcher.ready()


@pytest.mark.parametrize(("prefill", "decode"), [(OLD, NEXT), (NEXT, OLD)])
async def test_rbg_22_307_455_versions_further_apart_serve_alone_and_fail_no_request(prefill: int, decode: int) -> None:
    bench, prefill_work, decode_work = await joined(prefill, decode)
    assert (prefill_work, decode_work) == ([], [Mode.FULL])
    assert bench.dispatcher.snapshot().num_routes[Reason.NO_PREFILL] == 1
    assert bench.dispatcher.ready()


@pytest.fixture
def world(tiny_model: CausalLM, tmp_path: Path) -> Iterator[MemoryCluster]:
    made = MemoryCluster(tiny_model, tmp_path.resolve())
    yield made
    made.close()


@pytest.mark.parametrize("num_tokens", [1, 4, 9])
def test_dynamo_7930_7634_an_answer_with_a_grammar_goes_on_at_another_worker_where_it_was(
    world: MemoryCluster, num_tokens: int
) -> None:
    request = request_of(
        "whole",
        tuple(range(3, 10)),
        temperature=1.5,
        seed=4,
        ignore_eos=False,
        max_tokens=60,
        constraint=Constraint(kind="regex", text=r'\{"a":[0-9]{3,6},"b":\{"c":"[a-c]{4,8}"\}\}'),
    )
    expected = world.answer(world.start(), request)
    text = byte_tokenizer().decode(expected.token_ids)
    assert text.startswith('{"a":')
    assert text.count('"a"') == 1
    moved = msgspec.structs.replace(
        request, request_id="moved", output_token_ids=tuple(expected.token_ids[:num_tokens])
    )
    rest = world.answer(world.start(), moved)
    later = [token for _position, token in sorted(rest.tokens.items())]
    assert [*expected.token_ids[:num_tokens], *later] == expected.token_ids
    assert rest.finish is expected.finish
    world.check_ledgers()

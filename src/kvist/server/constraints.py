"""Compiles the constraints of requests before an engine gets them.

Engines compile them too (docs/adr/0030-grammars-are-compiled-twice.md). A constraint that cannot be compiled is found
here first, so that the error is an ordinary 400 that names the field and the path inside the schema.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, Metric

from kvist.api.decoding import IGNORED
from kvist.checking.constraints import RequestedConstraint
from kvist.errors import InvalidConstraint, KvistError
from kvist.grammar.backend import Vocabulary
from kvist.grammar.backends import GRAMMAR_BACKENDS
from kvist.grammar.compiler import Compilation, GrammarCompiler
from kvist.grammar.counters import GRAMMAR_COUNTERS
from kvist.http.asgi import Headers
from kvist.text import Tokenizer

if TYPE_CHECKING:
    from kvist.server.gateway import GatewayContext

_MAX_UNENFORCED = 16  # parts of schemas that a header names


def gateway_compiler(backend: str, tokenizer: Tokenizer) -> GrammarCompiler:
    """Return the compiler of a gateway. Whether a constraint compiles does not depend on the end tokens of the model,
    which the gateway does not know: one more token stands for them."""
    vocabulary = Vocabulary(tokens=tokenizer, size=tokenizer.vocab_size + 1, end_token_ids=(tokenizer.vocab_size,))
    return GrammarCompiler(lambda: GRAMMAR_BACKENDS[backend].make({}, vocabulary))


def grammar_families(compiler: GrammarCompiler | None) -> Iterator[Metric]:
    """Yield the metrics of a gateway's compiler."""
    totals = GRAMMAR_COUNTERS.zeros() if compiler is None else compiler.totals()
    for counter in GRAMMAR_COUNTERS.counters:
        text = f"{counter.text}, at this gateway"
        yield CounterMetricFamily(f"kvist:gateway_{counter.name}", text, totals[counter.name])


async def compile_constraint(gateway: GatewayContext, requested: RequestedConstraint) -> Headers:
    """Wait until the constraint is compiled. Return the response header that names its parts without effect, if there
    are any. Raises `InvalidConstraint` with the path of the faulty part, and `Overloaded`."""
    assert gateway.grammars is not None
    start_s = gateway.clock.now_s()
    named = []
    try:
        for part in (*requested.parts, requested):
            left_s = start_s + gateway.grammar_timeout_s - gateway.clock.now_s()
            ignored = await _compiled(gateway.grammars, part, max(left_s, 0.0))
            if ignored and (part is not requested or not requested.parts):  # the parts have named theirs
                named.append(f"{part.param} ({'; '.join(ignored)})")
    finally:
        gateway.metrics.grammar_compile_s.observe(gateway.clock.now_s() - start_s)
    return [(IGNORED, _list_of(named, requested.unenforced))] if named or requested.unenforced else []


def _list_of(named: Sequence[str], unenforced: Sequence[str]) -> bytes:
    """Return the value of a header. Names come from schemas: they may have any characters, and any number."""
    shown = [*named, *unenforced[:_MAX_UNENFORCED]]
    if len(unenforced) > _MAX_UNENFORCED:
        shown.append(f"and {len(unenforced) - _MAX_UNENFORCED} more")
    plain = ("".join(char if " " <= char <= "~" and char != "," else " " for char in each) for each in shown)
    return ", ".join(plain).encode("ascii")


async def _compiled(grammars: GrammarCompiler, requested: RequestedConstraint, timeout_s: float) -> Sequence[str]:
    """Wait until the constraint is compiled. Return its parts without effect."""
    compilation = grammars.start(requested.constraint)
    try:
        if not compilation.is_done:
            await _wait(compilation, timeout_s)
        return compilation.result(0.0).ignored
    except InvalidConstraint as error:
        raise _located(error, requested.param) from error


async def _wait(compilation: Compilation, timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def set_done() -> None:
        if not done.done():
            done.set_result(None)

    def on_thread() -> None:
        loop.call_soon_threadsafe(set_done)

    compilation.when_done(on_thread)
    try:
        async with asyncio.timeout(timeout_s):
            await done
    except TimeoutError as error:
        raise InvalidConstraint.too_slow(timeout_s) from error


def _located(error: KvistError, param: str) -> InvalidConstraint:
    """Return the error with the name of the field before the path inside the constraint."""
    path = error.param or ""
    where = f"{param}{path}" if path.startswith("[") or not path else f"{param}.{path}"
    return InvalidConstraint(f"`{where}`: {error.message}", param=where)

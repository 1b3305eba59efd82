from __future__ import annotations

import pytest
from starlette.types import Scope

from kvist.errors import Unauthorized
from kvist.http.caller import ApiKeys, caller_of
from tests.server.conftest import MakeBench


def scope_of(authorization: bytes | None = None) -> Scope:
    headers = [] if authorization is None else [(b"authorization", authorization)]
    return {"type": "http", "path": "/", "headers": headers, "client": ("127.0.0.1", 5)}


def test_every_api_key_is_one_caller_also_after_a_restart() -> None:
    keys = ApiKeys(("k1", "k2"))
    found = []
    for key in (b"Bearer k1", b"bearer  k2", b"Bearer k1"):
        scope = scope_of(key)
        keys.authenticate(scope)
        found.append(caller_of(scope).key_id)
    assert found[0] == found[2] != found[1]
    assert "k1" not in str(found)
    scope = scope_of(b"Bearer k1")
    ApiKeys(("k1",)).authenticate(scope)  # another process with a different list of keys
    assert caller_of(scope).key_id == found[0]
    for wrong in (None, b"", b"Bearer", b"Bearer k", b"Bearer k1k2", b"Basic k1", b"Bearer \xff"):
        with pytest.raises(Unauthorized):
            keys.authenticate(scope_of(wrong))


def test_a_server_without_keys_ignores_the_key_of_a_request() -> None:
    scope = scope_of(b"Bearer whatever")
    ApiKeys(()).authenticate(scope)
    assert caller_of(scope).key_id is None
    assert caller_of(scope).connection == "127.0.0.1:5"


async def test_every_generating_endpoint_salts_the_cache_by_the_callers_key(make_bench: MakeBench) -> None:
    bench = make_bench(api_key=("k1", "k2"), tenant_by="api-key")
    salts: dict[str, list[str]] = {"k1": [], "k2": []}
    async with bench.client:
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
            ("/v1/completions", {"prompt": "hi"}),
            ("/generate", {"text": "hi"}),
        ):
            for key, seen in salts.items():
                response = await bench.post(path, {**body, "cache_salt": "s"}, authorization=f"Bearer {key}")
                assert response.status_code == 200, response.text
                seen.append(bench.dispatcher.requests[-1].cache_salt)
    assert len(set(salts["k1"])) == len(set(salts["k2"])) == 1
    assert salts["k1"] != salts["k2"]

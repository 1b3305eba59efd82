"""With --tenant-by api-key, no request hits pages of another API key, in any tier."""

from __future__ import annotations

import pytest
from starlette.types import Scope

from kvist import settings
from kvist.checking.sampling import salt_digest
from kvist.errors import ConfigError
from kvist.http.caller import ApiKeys, caller_of
from kvist.options import given_values


def tenant(key: str) -> str:
    scope: Scope = {"type": "http", "path": "/", "headers": [(b"authorization", f"Bearer {key}".encode())]}
    ApiKeys(("k1", "k2")).authenticate(scope)
    key_id = caller_of(scope).key_id
    assert key_id is not None
    return key_id


def test_equal_salts_share_pages_within_one_api_key_only() -> None:
    one, other = tenant("k1"), tenant("k2")
    salts = [salt_digest(salt, tenant) for tenant in (one, other, "") for salt in (None, "a", one, other)]
    assert len(set(salts)) == len(salts)
    assert salt_digest("a", one) == salt_digest("a", tenant("k1"))
    assert salt_digest("", one) == salt_digest(None, one)


@pytest.mark.parametrize("verb", ["serve", "up", "router"])
def test_tenant_by_api_key_without_a_key_is_refused_at_start(verb: str) -> None:
    argv = ["--worker-urls", "http://127.0.0.1:1"] if verb == "router" else []
    with pytest.raises(ConfigError, match=r"--tenant-by api-key .* add --api-key"):
        settings.read(verb, [*argv, "--tenant-by", "api-key"], {})
    read = settings.read(verb, [*argv, "--tenant-by", "api-key", "--api-key", "k1"], {})
    assert given_values(read)["tenant_by"] == "api-key"

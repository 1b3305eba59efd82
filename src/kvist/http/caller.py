"""Identifies the caller of a request: the API key that the request carries, its connection, and its session.

`ApiKeys` is built once from the settings; app.py checks every request with it. The caller is stored in the request's
scope, where `caller_of` reads it when a job is made. The key itself stays in this module.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from starlette.types import Scope

from kvist.errors import Unauthorized
from kvist.fairness import CallerPath, caller_path, weighted_name
from kvist.http.asgi import header

_SCOPE_KEY = "kvist.caller"
_ID_BYTES = 16
_TAG_BYTES = 4
_SESSION_HEADERS = (b"x-session-id", b"x-smg-routing-key")  # the first of them counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    key_id: str | None  # names an accepted API key, the same after every restart; None when no key is required
    connection: str  # the client's HOST:PORT
    weight: int = 1  # of the API key
    session: str = ""  # that the request's header names; "": none

    @property
    def tag(self) -> str:
        """Return the opaque name by which engines serve callers in turn (fairness.py); it reveals no key or address."""
        host, _, port = self.connection.rpartition(":")
        host_id = blake2b(host.encode(), digest_size=_TAG_BYTES).hexdigest()
        key = weighted_name((self.key_id or "")[: 2 * _TAG_BYTES], self.weight)
        return f"{key}/{host_id}/{port}"

    @property
    def path(self) -> CallerPath:
        return caller_path(self.tag)


class ApiKeys:
    """The accepted API keys. Without any key, every request is accepted."""

    def __init__(self, keys: Iterable[str], weights: Sequence[int] = ()) -> None:
        """`weights` of the keys, in their order; empty: every weight is 1."""
        self._ids = [_digest(key.encode()) for key in keys]
        self._weights = dict(zip(self._ids, weights, strict=True)) if weights else {}

    def __bool__(self) -> bool:
        return bool(self._ids)

    def authenticate(self, scope: Scope) -> None:
        """Store the caller in the scope. Raise `Unauthorized` when a key is required and the request has none of the
        accepted keys."""
        key_id = None
        if self._ids:
            given = [_digest(key) for key in _keys_of(scope)]
            known = [one for one in given if self._accepts(one)]
            if not known:
                raise Unauthorized(
                    "the API key is missing or wrong; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
                )
            key_id = known[0]
        weight = self._weights.get(key_id or "", 1)
        scope[_SCOPE_KEY] = Caller(key_id=key_id, connection=_connection(scope), weight=weight, session=_session(scope))

    def _accepts(self, given_id: str) -> bool:
        found = [hmac.compare_digest(given_id, one) for one in self._ids]  # no early exit: constant time
        return any(found)


def caller_of(scope: Scope) -> Caller:
    """Return the caller of a request that `ApiKeys.authenticate` has accepted."""
    caller: Caller = scope[_SCOPE_KEY]
    return caller


def own_key(scope: Scope) -> str | None:
    """Return the API key of a request that `ApiKeys.authenticate` has accepted; None if no key is required."""
    key_id = caller_of(scope).key_id
    return next((key.decode("latin-1") for key in _keys_of(scope) if _digest(key) == key_id), None)


def _keys_of(scope: Scope) -> list[bytes]:
    """Return the keys of a request: OpenAI's clients send `Authorization`, Anthropic's send `x-api-key` or both."""
    scheme, _, key = (header(scope, b"authorization") or b"").partition(b" ")
    keys = [key.strip()] if scheme.lower() == b"bearer" else []
    own = header(scope, b"x-api-key")
    return keys if own is None else [*keys, own.strip()]


def _digest(key: bytes) -> str:
    return blake2b(key, digest_size=_ID_BYTES, person=b"kvist api key").hexdigest()


def _session(scope: Scope) -> str:
    """Return the name of the session in the request's header, as gateways of SGLang and vLLM name it."""
    return next((value.decode("latin-1") for name in _SESSION_HEADERS if (value := header(scope, name))), "")


def _connection(scope: Scope) -> str:
    host, port = scope.get("client") or ("?", 0)
    return f"{host}:{port}"

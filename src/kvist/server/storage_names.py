"""SGLang's names for the storage tier, used in HTTP only.

They are `hicache_storage_backend`, `hicache_storage_prefetch_policy`, and `hicache_storage_` before the name of each
option that a store has. The engine's protocol has names of its own (wire.py)."""

from __future__ import annotations

import typing

import msgspec

from kvist.api.decoding import BodyDecoder
from kvist.store import STORES
from kvist.store.config import PREFIX
from kvist.wire import AttachStore, StorageStatus

_OWN = ("backend", "prefetch_policy")
_OPTIONS = {name: hint for row in STORES.values() for name, hint in typing.get_type_hints(row.options).items()}
_BODY: BodyDecoder[msgspec.Struct] = BodyDecoder(
    msgspec.defstruct(
        "AttachStoreBody",
        [(PREFIX + name, hint | None, None) for name, hint in {**dict.fromkeys(_OWN, str), **_OPTIONS}.items()],
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
    )
)


def decode_store(body: bytes) -> tuple[AttachStore, typing.Sequence[tuple[bytes, bytes]]]:
    """Decode the body of `PUT /hicache/storage-backend`. Raises `RequestError` naming the field."""
    decoded, headers = _BODY.decode(body)
    given = {name.removeprefix(PREFIX): value for name, value in msgspec.structs.asdict(decoded).items()}
    options = {name: given[name] for name in _OPTIONS if given[name] is not None}
    return AttachStore(backend=given["backend"], options=options, prefetch_policy=given["prefetch_policy"]), headers


def field_of(param: str | None) -> str | None:
    """Return the body's field for an option that an engine names."""
    return PREFIX + param if param in (*_OWN, *_OPTIONS) else param


def named_status(status: StorageStatus | None) -> dict[str, object] | None:
    """Return the status with the names of the body; options that the store does not have are null."""
    if status is None:
        return None
    fields = msgspec.structs.asdict(status)
    options: dict[str, object] = {**dict.fromkeys(_OPTIONS), **fields.pop("options")}
    own = {name: fields.pop(name) for name in _OWN}
    return {**{PREFIX + name: value for name, value in {**own, **options}.items()}, **fields}

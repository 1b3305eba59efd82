"""Whether two engines may hand over pages, and by which transport. Pure: schedulers and the router call these
functions, and compare nothing themselves.

    meet(source, target) ─► incompatibility ─► choose_transport ─► TransportChoice

Both engines call `meet` when a first handoff brings them together (`scheduler/handoff/peers.py`), the router before it
routes a request to the pair. All reach the same result, because they compare the same two specs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvist.protocol import interworks
from kvist.wire import EngineSpec, PeerSpec, PoolAddress


class Peer(Protocol):
    """An engine as another engine sees it: a `PeerSpec`, or an `EngineSpec`, which has the same fields."""

    @property
    def worker_id(self) -> str: ...
    @property
    def protocol_version(self) -> int: ...
    @property
    def model_fingerprint(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def page_size(self) -> int: ...
    @property
    def layout(self) -> str: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def host_id(self) -> str: ...
    @property
    def transports(self) -> tuple[PoolAddress, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportChoice:
    """How pages travel from one engine to another, or why they cannot."""

    name: str | None  # None: no page may travel between the two
    reason: str  # a text to be read
    compatible: bool = True  # False: the pages of one engine mean nothing to the other


def peer_spec(spec: EngineSpec) -> PeerSpec:
    """Return the part of a spec that other engines need."""
    return PeerSpec(**{name: getattr(spec, name) for name in PeerSpec.__struct_fields__})


def meet(source: Peer, target: Peer) -> TransportChoice:
    """Return the transport of handoffs from `source` to `target`."""
    problem = incompatibility(source, target)
    if problem is not None:
        return TransportChoice(name=None, reason=problem, compatible=False)
    return choose_transport(source, target)


def incompatibility(one: Peer, other: Peer) -> str | None:
    """Return why the two engines cannot hand requests over to each other, naming both values; None if they can."""
    if not interworks(one.protocol_version, other.protocol_version):
        versions = str(one.protocol_version), str(other.protocol_version)
        remedy = "run versions of Kvist that are at most one protocol version apart"
        return _difference("protocol version", (one, versions[0]), (other, versions[1]), remedy)
    return difference_of_pages(one, other)


def difference_of_pages(one: Peer, other: Peer) -> str | None:
    """Return why the pages of one engine mean nothing to the other, naming both values; None if they mean the same."""
    for name, ours, theirs, remedy in (
        ("model", f"content {one.model_fingerprint}", f"content {other.model_fingerprint}", "use the same model files"),
        ("dtype", one.dtype, other.dtype, "start both with the same --dtype"),
        ("page size", str(one.page_size), str(other.page_size), "start both with the same --page-size"),
        ("page layout", _layout(one), _layout(other), "run the same version of Kvist on both"),
    ):
        if ours != theirs:
            return _difference(name, (one, ours), (other, theirs), remedy)
    return None


def choose_transport(source: Peer, target: Peer) -> TransportChoice:
    """Return the first transport of the source that the target offers too and that can reach it."""
    excluded: list[str] = []
    for address in source.transports:
        theirs = next((each for each in target.transports if each.transport == address.transport), None)
        if theirs is None:
            excluded.append(f"{address.transport}: worker {target.worker_id} does not offer it")
        elif theirs.same_host and source.host_id != target.host_id:
            excluded.append(
                f"{address.transport}: works only within one host and one --runtime-dir, but worker {source.worker_id} "
                f"is on {source.host_id}, worker {target.worker_id} on {target.host_id}"
            )
        elif address.device not in theirs.from_devices:
            excluded.append(
                f"{address.transport}: copies no pages from {address.device} (worker {source.worker_id}) to "
                f"{theirs.device} (worker {target.worker_id})"
            )
        else:
            return TransportChoice(name=address.transport, reason=_reason(source, target, address, theirs))
    known = {address.transport for address in source.transports}
    excluded += [
        f"{each.transport}: worker {source.worker_id} does not offer it"
        for each in target.transports
        if each.transport not in known
    ]
    return TransportChoice(name=None, reason=_no_common(source, target, excluded))


def _reason(source: Peer, target: Peer, from_: PoolAddress, to: PoolAddress) -> str:
    if source.host_id != target.host_id:
        return f"{to.transport}: from host {source.host_id} to host {target.host_id}"
    if from_.device == to.device:
        where = "on GPUs" if to.device == "cuda" else "in the memory"
        return f"{to.transport}: both pools are {where} of host {source.host_id}"
    names = {"cuda": "a GPU", "cpu": "the memory"}
    pools = [names.get(address.device, address.device) for address in (from_, to)]
    return f"{to.transport}: from {pools[0]} to {pools[1]} of host {source.host_id}"


def _no_common(source: Peer, target: Peer, excluded: Sequence[str]) -> str:
    why = "; ".join(excluded) or "both offer none"
    return (
        f"no transport can copy pages from worker {source.worker_id} to worker {target.worker_id} ({why}): choose "
        "others with --disaggregation-transfer-backend"
    )


def _layout(peer: Peer) -> str:
    return f"{peer.layout} ({peer.page_bytes} bytes)"


def _difference(name: str, one: tuple[Peer, str], other: tuple[Peer, str], remedy: str) -> str:
    return (
        f"worker {other[0].worker_id} has another {name} than worker {one[0].worker_id} ({other[1]}, not {one[1]}): "
        f"{remedy}"
    )

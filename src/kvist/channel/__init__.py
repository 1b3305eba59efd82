"""The sockets between processes: the messages of wire.py over ZeroMQ.

An engine has one `EngineChannel` (synchronous, for its loop); a gateway has one `GatewayLink` per engine (asyncio).
Both have bounded queues, never block on a send, and drop undecodable messages with a log line and a count. Only
messages from holders of the cluster key are accepted (security.py).

A channel does not interpret messages; its users detect silent peers.
"""

from kvist.channel.cluster_key import with_cluster_key, with_private_key
from kvist.channel.engine import EngineChannel
from kvist.channel.gateway import GatewayLink
from kvist.channel.proof import PROOF_HEADER, ClusterProof
from kvist.channel.security import (
    ChannelConfig,
    Member,
    address_for_log,
    bracketed,
    host_to_name,
    is_loopback,
    split_tcp_endpoint,
)

__all__ = [
    "PROOF_HEADER",
    "ChannelConfig",
    "ClusterProof",
    "EngineChannel",
    "GatewayLink",
    "Member",
    "address_for_log",
    "bracketed",
    "host_to_name",
    "is_loopback",
    "split_tcp_endpoint",
    "with_cluster_key",
    "with_private_key",
]

"""The sockets between processes: ZeroMQ carrying wire.py's messages.

An engine owns one `EngineChannel` (synchronous, for its loop); a gateway owns one `GatewayLink` per engine (asyncio).
Both are bounded, never block on a send, and drop undecodable messages with a log line and a count. Only messages from
holders of the cluster key are accepted: see security.py.

The channel does not interpret messages; its users judge liveness.
"""

from kvist.channel.cluster_key import with_cluster_key, with_private_key
from kvist.channel.engine import EngineChannel
from kvist.channel.gateway import GatewayLink
from kvist.channel.security import ChannelConfig, Member, bracketed, host_to_name, is_loopback, shown

__all__ = [
    "ChannelConfig",
    "EngineChannel",
    "GatewayLink",
    "Member",
    "bracketed",
    "host_to_name",
    "is_loopback",
    "shown",
    "with_cluster_key",
    "with_private_key",
]

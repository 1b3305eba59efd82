"""The sockets between processes: ZeroMQ carrying wire.py's messages.

An engine owns one `EngineChannel` (synchronous, for its loop); a gateway owns one `GatewayLink` for each engine
(asyncio). Both are bounded, never block on a send, and drop what cannot be decoded, with a log line and a count.
Only holders of the cluster key are heard: see security.py.

This room moves messages. It does not know what they mean; liveness is judged by its users.
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

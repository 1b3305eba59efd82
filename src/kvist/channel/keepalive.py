"""A peer whose host or network vanished without a close is noticed by TCP's keep-alive, which its kernel answers.

Not by ZeroMQ's heartbeat, which its process answers: that would be a second limit for processes that are silent, beside
the one that users of this room have an option for.
"""

from __future__ import annotations

import zmq

_IDLE_S, _INTERVAL_S, _NUM_PROBES = 10, 5, 3


def enable_tcp_keepalive(socket: zmq.Socket[bytes]) -> None:
    """Call it before the socket binds or connects."""
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _IDLE_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, _INTERVAL_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, _NUM_PROBES)

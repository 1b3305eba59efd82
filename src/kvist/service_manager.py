"""Reports to the service manager that this process is ready, as systemd defines it for services of `Type=notify`.

The protocol is one datagram of NAME=VALUE lines to the socket that NOTIFY_SOCKET names:
https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping


def notify_ready(url: str, environ: Mapping[str, str] = os.environ) -> None:
    """Report that the service is ready at a URL. Does nothing without a service manager, or if it has gone."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.setblocking(False)
        message = f"READY=1\nSTATUS=ready at {url}"
        channel.sendto(message.encode(), "\0" + address[1:] if address[0] == "@" else address)

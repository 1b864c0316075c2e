"""Taking a port, with an error that says what to do when it cannot be had.

On its own, so that a command can look whether a port is free before it imports and starts anything.
"""

from __future__ import annotations

import errno
import socket

from kvstore.errors import ConfigError

__all__ = ["end_unread", "listen"]


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, or ConfigError that says what to do about it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(_taken(host, port, error)) from None


def end_unread(listener: socket.socket, limit_s: float) -> None:
    """Have the kernel end connections whose peer takes nothing for so long. Else one that is closed while its
    client does not read waits for it for ever, to deliver what is left. Where there is no such option
    (only Linux has it) such connections stay until the client goes."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(limit_s * 1000)))


def _taken(host: str, port: int, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"{host} is no address of this machine: choose another with --host"
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken: stop what listens there or choose another with --port"
    return f"cannot listen on {host}:{port} ({error.strerror}): choose another with --host or --port"

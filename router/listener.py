"""Taking a port, with an error that says what to do when it cannot be had.

On its own, so that a command can look whether a port is free before it imports and starts anything.
"""

from __future__ import annotations

import errno
import os
import socket

from kvstore.errors import ConfigError

__all__ = ["end_unread", "listen"]


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, or ConfigError that says what to do about it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4]
    except (OSError, UnicodeError):
        raise ConfigError(f"{host} is no address, nor a known name: choose another with --host") from None
    try:
        return socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(_refused(host, port, error.errno or 0)) from None


def end_unread(listener: socket.socket, limit_s: float) -> None:
    """Have the kernel end connections whose peer takes nothing for so long. Else one that is closed while its
    client does not read waits for it for ever, to deliver what is left. Where there is no such option
    (only Linux has it) such connections stay until the client goes."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(limit_s * 1000)))


def _refused(host: str, port: int, code: int) -> str:
    if code == errno.EADDRINUSE:
        return f"port {port} is taken: stop what listens there or choose another with --port"
    if code == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine: choose another with --host"
    return f"cannot listen on {host}:{port} ({os.strerror(code)}): choose another with --host or --port"

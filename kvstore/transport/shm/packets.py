"""Small msgpack messages, with descriptors, between two processes of one user on one host.

Abstract unix sockets of kind SEQPACKET: a message is a packet, cut by the kernel, so there is no framing to
get wrong. The name is random and stands in no file system, nothing is left of it when its owner dies. It is
seen in one network namespace only: a peer in another container or host finds nobody there. Reading is total:
a packet that is too long or not msgpack raises `BadPacket`, and descriptors that came along are closed.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgpack

PACKET_NBYTES_MAX: Final = 64 << 10
PREFIX: Final = "\0kvstrata-"
_DESCRIPTORS_MAX: Final = 4
_CREDENTIALS: Final = struct.Struct("3i")


class BadPacket(Exception):
    """Bytes that are no message of ours."""


class Closed(Exception):
    """The other side is gone."""


def new_name() -> str:
    """128 random bits: who knows it was told so by the shard."""
    return PREFIX + secrets.token_hex(16)


def listen(name: str, backlog: int) -> socket.socket:
    """Raises OSError where there are no such sockets."""
    listening = _new_socket()
    try:
        listening.bind(name)
        listening.listen(backlog)
    except OSError:
        listening.close()
        raise
    return listening


async def connect(name: str) -> socket.socket:
    """Raises OSError when nobody of this user listens there."""
    if not name.startswith(PREFIX):
        raise OSError(f"{name!r} is no name of a shard's socket")
    connected = _new_socket()
    try:
        await asyncio.get_running_loop().sock_connect(connected, name)
        if peer_uid(connected) != os.getuid():
            raise PermissionError("the shard runs as another user")
    except BaseException:
        connected.close()
        raise
    return connected


def peer_uid(connected: socket.socket) -> int:
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(credentials)[1]
    return uid


async def send(connected: socket.socket, message: object, descriptors: Sequence[int] = ()) -> None:
    """Raises Closed, or ValueError for a message that is too long for a packet."""
    data: bytes = msgpack.packb(message)
    if len(data) > PACKET_NBYTES_MAX:
        raise ValueError(f"a message of {len(data)} bytes: at most {PACKET_NBYTES_MAX}")
    loop = asyncio.get_running_loop()
    while True:
        try:
            socket.send_fds(connected, [data], descriptors)
            return
        except BlockingIOError:
            await _until_ready(loop.add_writer, loop.remove_writer, connected.fileno())
        except OSError as error:
            raise Closed(str(error)) from None


async def receive(connected: socket.socket) -> tuple[Any, list[int]]:
    """The next message and its descriptors, which are the caller's to close. Raises Closed or BadPacket."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return receive_now(connected)
        except BlockingIOError:
            await _until_ready(loop.add_reader, loop.remove_reader, connected.fileno())


def receive_now(connected: socket.socket) -> tuple[Any, list[int]]:
    """As `receive`, but raises BlockingIOError when there is none yet."""
    try:
        data, descriptors, flags, _ = socket.recv_fds(
            connected, PACKET_NBYTES_MAX, _DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
        )
    except BlockingIOError:
        raise
    except OSError as error:
        raise Closed(str(error)) from None
    try:
        if not data:
            raise Closed("the other side closed the connection")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise BadPacket("a packet longer than any message of ours")
        try:
            return msgpack.unpackb(data, raw=False, strict_map_key=True), descriptors
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
            raise BadPacket(f"not msgpack: {error}") from None
    except (BadPacket, Closed):
        close_all(descriptors)
        raise


def close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def number(message: Any, field: str, most: int) -> int:
    """A whole number of a message, 0 to `most`. Raises BadPacket."""
    value = message.get(field) if isinstance(message, dict) else None
    if type(value) is not int or not 0 <= value <= most:
        raise BadPacket(f"{field} is no number up to {most}")
    return value


def numbers(message: Any, field: str, count_max: int, most: int) -> list[int]:
    """A column of them. Raises BadPacket."""
    values = message.get(field) if isinstance(message, dict) else None
    if not isinstance(values, list) or len(values) > count_max:
        raise BadPacket(f"{field} is no column of at most {count_max} numbers")
    if any(type(value) is not int or not 0 <= value <= most for value in values):
        raise BadPacket(f"{field} holds what is no number up to {most}")
    return values


def text(message: Any, field: str) -> str:
    value = message.get(field) if isinstance(message, dict) else None
    if not isinstance(value, str):
        raise BadPacket(f"{field} is no text")
    return value


def _new_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    made.setblocking(False)
    return made


async def _until_ready(
    add: Callable[[int, Callable[[], None]], object], remove: Callable[[int], object], descriptor: int
) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    add(descriptor, tell)
    try:
        await ready
    finally:
        remove(descriptor)

"""Messages between rank 0 and another rank: a socket pair, one frame after another.

    u32 length of head | u32 length of body | head: a msgpack map | body: raw bytes (KV, ids)

Numbers and bytes only, nothing that can run. What a body says is KV carries its checksum, which the receiver
compares. The pair is each side's lifeline too: where one process ends, however it ends, the other reads the
end of its stream. Every wait within a message is bounded by `timeout_s`; for the next command a rank waits as
long as rank 0 lives. Costs some 20 us a message and a copy of its bytes.
"""

from __future__ import annotations

import socket
import struct
from typing import Any, Final

import msgpack

from engine.errors import RanksLost
from kvstore.frame import payload_checksum

__all__ = ["RankLink", "checked", "with_checksum"]

_LENGTHS: Final = struct.Struct("<II")
HEAD_NBYTES_MAX: Final = 1 << 24
BODY_NBYTES_MAX: Final = 1 << 31

Head = dict[str, Any]
Bytes = bytes | bytearray | memoryview


class RankLink:
    """One end. Raises RanksLost when the other has ended, does not answer, or sends nonsense."""

    def __init__(self, end: socket.socket, timeout_s: float) -> None:
        self._socket = end
        self._timeout_s = timeout_s

    def send(self, head: Head, body: Bytes = b"") -> None:
        packed = msgpack.packb(head)
        if len(packed) > HEAD_NBYTES_MAX or len(body) > BODY_NBYTES_MAX:
            raise ValueError(f"a message of {len(packed)} and {len(body)} bytes is longer than a rank takes")
        self._socket.settimeout(self._timeout_s)
        try:
            self._socket.sendall(_LENGTHS.pack(len(packed), len(body)) + packed)
            self._socket.sendall(body)
        except OSError as error:  # a timeout is one
            raise RanksLost(f"a rank takes no messages: {error}") from error

    def receive(self, first_timeout_s: float | None) -> tuple[Head, memoryview]:
        """The next message, which may take `first_timeout_s` to begin (None: as long as the other lives)."""
        head_nbytes, body_nbytes = _LENGTHS.unpack(self._exactly(_LENGTHS.size, first_timeout_s))
        if head_nbytes > HEAD_NBYTES_MAX or body_nbytes > BODY_NBYTES_MAX:
            raise RanksLost(f"a rank sends a message of {head_nbytes} and {body_nbytes} bytes")
        head = msgpack.unpackb(self._exactly(head_nbytes, self._timeout_s))
        return head, self._exactly(body_nbytes, self._timeout_s)

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, nbytes: int, first_timeout_s: float | None) -> memoryview:
        """`timeout_s` is for some of it to come, again and again."""
        view = memoryview(bytearray(nbytes))
        self._socket.settimeout(first_timeout_s)
        got = 0
        while got < nbytes:
            try:
                count = self._socket.recv_into(view[got:])
            except OSError as error:
                raise RanksLost(f"a rank does not answer: {error}") from error
            if count == 0:
                raise RanksLost("a rank has ended")
            got += count
            self._socket.settimeout(self._timeout_s)
        return view


def with_checksum(head: Head, body: memoryview) -> Head:
    """Of a message whose body is KV."""
    return head | {"checksum": payload_checksum(body)}


def checked(head: Head, body: memoryview) -> memoryview:
    """The KV, if it is what was sent."""
    if payload_checksum(body) != head["checksum"]:
        raise RanksLost("KV was damaged on its way between ranks")
    return body

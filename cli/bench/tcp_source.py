"""The far end of the raw TCP limit: sends blocks of its own memory over one loopback connection, no more.

A request on the connection is a header (bytes of a block, count) and the indexes of the blocks wanted.
Nothing is framed, checked or looked up: what TCP itself costs between two processes.
"""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any, Final

from cli.bench.figures import cpu_s
from cli.bench.jsonlines import answer
from cli.bench.oracle import Bytes, payload

HEADER: Final = struct.Struct("<QQ")

_blocks: dict[int, list[Bytes]] = {}


def _load(nbytes: int, keys: list[str]) -> dict[str, Any]:
    _blocks[nbytes] = [payload(bytes.fromhex(key), nbytes) for key in keys]
    return {}


def _listen() -> dict[str, Any]:
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(listener,), daemon=True).start()
    return {"port": listener.getsockname()[1]}


def _serve(listener: socket.socket) -> None:
    with listener, listener.accept()[0] as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while header := receive(peer, HEADER.size):
            nbytes, count = HEADER.unpack(header)
            for (index,) in struct.iter_unpack("<I", receive(peer, 4 * count)):
                peer.sendall(_blocks[nbytes][index].data)


def receive(peer: socket.socket, nbytes: int) -> bytes:
    """Exactly `nbytes`, or nothing when the connection ended."""
    got = bytearray(nbytes)
    return bytes(got) if receive_into(peer, memoryview(got)) else b""


def receive_into(peer: socket.socket, buffer: memoryview) -> bool:
    while len(buffer):
        taken = peer.recv_into(buffer)
        if not taken:
            return False
        buffer = buffer[taken:]
    return True


if __name__ == "__main__":
    answer({"load": _load, "listen": _listen, "cpu": lambda: {"cpu_s": cpu_s()}})

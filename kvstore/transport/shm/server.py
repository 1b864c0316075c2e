"""The shard's side of shared memory: who may map the arena, and frames from writers' own memory.

Nobody is configured: a client learns the socket's random name from the shard's hello, connects if it is on
this host, runs as the same user (the kernel says so, not the client) and shows the token that the shard asks
for. It gets the arena's descriptor, which can only read, and from then on reads without us. To write it
hands over a memory of its own, sealed against shrinking, and names frames in it: we copy each into the
arena and verify our copy, so that what the writer does to its memory meanwhile harms only the writer.

    client: {v, token}                              shard: {incarnation, nbytes, slots} + arena
    client: {op: window, nbytes} + memory           shard: {}
    client: {op: write, txn, indexes, offsets, nbytes, timeout_ms}   shard: {refusals} | {error, message}

A connection does one thing at a time, and there are CONNECTIONS_MAX of them. Whatever is not such a message
ends it. When it ends, for whatever reason, our map of the client's memory goes with it.
"""

from __future__ import annotations

import asyncio
import hmac
import mmap
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import structlog

from kvstore.driver import ShardDriver
from kvstore.errors import KVStrataError
from kvstore.frame import HEADER_NBYTES
from kvstore.nouns import OFFERS_MAX, Incarnation, Refusal, TxnId
from kvstore.tiers.arena import ArenaTier
from kvstore.transport.shm import packets
from kvstore.transport.shm.memory import Unsafe, map_readonly
from kvstore.transport.shm.packets import BadPacket, Closed

log = structlog.get_logger(__name__)

VERSION: Final = 2  # 2: a row of the slot table counts its turns
CONNECTIONS_MAX: Final = 64
GREETING_S: Final = 2.0
WINDOW_NBYTES_MAX: Final = 1 << 30
TIMEOUT_MS_MAX: Final = 60_000
_U64: Final = (1 << 64) - 1


class Writable(Protocol):
    """What stands behind the socket: the shard's driver."""

    async def write(
        self, txn: TxnId, frames: Sequence[tuple[int, bytes, memoryview]], *, timeout_s: float
    ) -> list[Refusal | None]: ...


class ShmServer:
    def __init__(
        self, shard: Writable, arena: ArenaTier, incarnation: Incarnation, admits: Callable[[str], bool]
    ) -> None:
        """`admits` says whether a token opens this shard. Constant-time comparison is its part."""
        self._shard = shard
        self._arena = arena
        self._incarnation = incarnation
        self._admits = admits
        self._listening: socket.socket | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.counters: Counter[str] = Counter()
        self.name = ""  # nobody can connect: before start, after stop, and where nothing can be shared

    def start(self) -> None:
        """Listen, where memory can be shared. Never fails: gRPC serves everybody anyway."""
        descriptor = self._arena.share()
        if descriptor is None:
            return
        os.close(descriptor)
        name = packets.new_name()
        try:
            self._listening = packets.listen(name, CONNECTIONS_MAX)
        except OSError as error:
            log.warning("no shared memory for clients of this host", error=str(error))
            return
        asyncio.get_running_loop().add_reader(self._listening.fileno(), self._accept)
        self.name = name

    async def stop(self) -> None:
        """End all connections; clients go on over gRPC."""
        self.name = ""
        if self._listening is not None:
            asyncio.get_running_loop().remove_reader(self._listening.fileno())
            self._listening.close()
            self._listening = None
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def connections(self) -> int:
        """Clients that are attached: none is left once they have gone."""
        return len(self._connections)

    def _accept(self) -> None:
        assert self._listening is not None
        try:
            connected, _ = self._listening.accept()
        except OSError:
            return  # it was gone before we came to it
        if len(self._connections) >= CONNECTIONS_MAX:
            self.counters["shm:over_limit"] += 1
            connected.close()
            return
        connected.setblocking(False)
        task = asyncio.create_task(self._serve(connected))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, connected: socket.socket) -> None:
        try:
            async with asyncio.timeout(GREETING_S):
                await self._greet(connected)
            await _Session(self._shard, self.counters, connected).run()
        except (BadPacket, Unsafe, PermissionError, TimeoutError) as error:
            self.counters["shm:refused"] += 1
            log.warning("a client of shared memory was turned away", error=str(error) or "silent")
        except Closed:
            self.counters["shm:closed"] += 1
        finally:
            connected.close()

    async def _greet(self, connected: socket.socket) -> None:
        if packets.peer_uid(connected) != os.getuid():
            raise PermissionError("another user")
        message, descriptors = await packets.receive(connected)
        packets.close_all(descriptors)
        if packets.number(message, "v", _U64) != VERSION:
            raise BadPacket("another version of this protocol")
        if not self._admits(packets.text(message, "token")):
            raise PermissionError("not the shard's token")
        descriptor = self._arena.share()
        assert descriptor is not None, "a shard without a shared arena does not listen"
        try:
            nbytes, slots = self._arena.geometry
            answer = {"incarnation": self._incarnation, "nbytes": nbytes, "slots": slots}
            await packets.send(connected, answer, [descriptor])
        finally:
            os.close(descriptor)
        self.counters["shm:attached"] += 1


class _Session:
    """One admitted client, and the window it writes through."""

    def __init__(self, shard: Writable, counters: Counter[str], connected: socket.socket) -> None:
        self._shard = shard
        self._counters = counters
        self._connected = connected
        self._window: mmap.mmap | None = None

    async def run(self) -> None:
        """Until the client goes (Closed), or says what we do not understand (BadPacket)."""
        while True:
            message, descriptors = await packets.receive(self._connected)
            try:
                operation = packets.text(message, "op")
                if operation == "window":
                    answer = self._open_window(message, descriptors)
                elif operation == "write":
                    answer = await self._write(message)
                else:
                    raise BadPacket(f"no operation {operation[:20]!r}")
            finally:
                packets.close_all(descriptors)
            await packets.send(self._connected, answer)

    def _open_window(self, message: Any, descriptors: list[int]) -> dict[str, object]:
        nbytes = packets.number(message, "nbytes", WINDOW_NBYTES_MAX)
        if len(descriptors) != 1:
            raise BadPacket("a window is one descriptor")
        self._window = map_readonly(descriptors[0], nbytes)
        return {}

    async def _write(self, message: Any) -> dict[str, object]:
        frames = self._frames(message)
        timeout_s = packets.number(message, "timeout_ms", TIMEOUT_MS_MAX) / 1000
        txn = TxnId(packets.number(message, "txn", _U64))
        try:
            refusals = await self._shard.write(txn, frames, timeout_s=timeout_s)
        except KVStrataError as error:
            return {"error": type(error).__name__, "message": str(error)[:1000]}
        nbytes = sum(HEADER_NBYTES + payload.nbytes for _, _, payload in frames)
        self._counters["shm:written_bytes"] += nbytes
        return {"refusals": [refusal.value if refusal else "" for refusal in refusals]}

    def _frames(self, message: Any) -> list[tuple[int, bytes, memoryview]]:
        """Views into the window: headers are copied here, payloads when they arrive in the arena."""
        if self._window is None:
            raise BadPacket("frames without a window")
        indexes = packets.numbers(message, "indexes", OFFERS_MAX, OFFERS_MAX)
        offsets = packets.numbers(message, "offsets", OFFERS_MAX, WINDOW_NBYTES_MAX)
        sizes = packets.numbers(message, "nbytes", OFFERS_MAX, WINDOW_NBYTES_MAX)
        if not len(indexes) == len(offsets) == len(sizes):
            raise BadPacket("the columns of a write have different lengths")
        window = memoryview(self._window)
        frames = []
        for index, offset, nbytes in zip(indexes, offsets, sizes, strict=True):
            frame = window[offset : offset + nbytes]
            if nbytes <= HEADER_NBYTES or frame.nbytes != nbytes:
                raise BadPacket(f"{nbytes} bytes at {offset} are no frame of this window")
            frames.append((index, bytes(frame[:HEADER_NBYTES]), frame[HEADER_NBYTES:]))
        return frames


def shared_memory(shard: object, token: str | None) -> ShmServer | None:
    """The server for a shard of this process whose bytes lie in an arena; None for any other.

    A shard without a token is mapped, as it is read, by whoever of its user finds it.
    """
    if not isinstance(shard, ShardDriver) or not isinstance(shard.storage, ArenaTier):
        return None
    expected = (token or "").encode()

    def admits(shown: str) -> bool:
        return hmac.compare_digest(shown.encode(), expected) or not expected

    return ShmServer(shard, shard.storage, shard.config.incarnation, admits)

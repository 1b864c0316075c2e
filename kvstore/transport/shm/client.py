"""The client's side of shared memory: a map of the shard's arena, and a window to write through.

`attach` either works or says why not; whoever asked goes on over gRPC. When the shard is gone the socket
says so, and the maps are let go: what a dead shard held is not served any more. Calls are made one at a
time, each within its deadline; one that runs past it ends the attachment, since its answer may still come.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from kvstore.deadline import Deadline
from kvstore.errors import ERRORS, Unavailable
from kvstore.frame import HEADER_NBYTES
from kvstore.nouns import Incarnation, Refusal, TxnId
from kvstore.tiers.arena import Geometry
from kvstore.tiers.copying import beside_the_loop
from kvstore.tiers.pinned import pin
from kvstore.transport.shm import packets
from kvstore.transport.shm.memory import Unsafe, map_readonly, new_window
from kvstore.transport.shm.packets import BadPacket, Closed
from kvstore.transport.shm.reader import ArenaReader
from kvstore.transport.shm.server import VERSION

ARENA_NBYTES_MAX: Final = 1 << 44
HALF_NBYTES: Final = 16 << 20  # the shard copies one half of the window while we fill the other
WRITES_MAX: Final = 256  # frames of one message
_PAGE: Final = mmap.PAGESIZE
_U64: Final = (1 << 64) - 1

Frame = tuple[int, bytes, memoryview]


class NotHere(Exception):
    """This shard's memory cannot be shared with us; the message says why."""


class Attachment:
    """One shard's arena, as long as its socket lives, pinned where CUDA is. Belongs to one event loop."""

    def __init__(self, connected: socket.socket, reader: ArenaReader) -> None:
        self._socket = connected
        self._reader: ArenaReader | None = reader
        self._answers: asyncio.Queue[Any] = asyncio.Queue(1)
        self._writing = asyncio.Lock()
        self._window: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        self._pinning = pin(reader.memory, read_only=True)
        asyncio.get_running_loop().add_reader(connected.fileno(), self._heard)

    @property
    def reader(self) -> ArenaReader | None:
        """None when the shard is gone."""
        return self._reader

    def close(self) -> None:
        """Let go of the maps; threads that still copy from them keep theirs."""
        if self._reader is None:
            return
        self._reader, self._window = None, None
        if self._pinning is not None:
            self._pinning.close()
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        if self._answers.empty():
            self._answers.put_nowait(Closed("the shard is gone"))

    async def write(self, txn: TxnId, frames: Sequence[Frame], timeout_s: float) -> list[Refusal | None]:
        """Frames of at most HALF_NBYTES each. Raises what the shard raised, or Unavailable."""
        deadline = Deadline(timeout_s)
        try:
            async with asyncio.timeout_at(deadline.at), self._writing:
                return await self._alone(txn, frames, deadline)
        except TimeoutError as error:
            raise Unavailable(f"no answer through shared memory in time: {error!r}") from None

    async def _alone(self, txn: TxnId, frames: Sequence[Frame], deadline: Deadline) -> list[Refusal | None]:
        """Who waited in vain for his turn harms nobody: only what fails from here on ends the attachment."""
        try:
            return await self._write(txn, frames, deadline)
        except (Closed, BadPacket, Unsafe, OSError, ValueError) as error:
            self.close()
            raise Unavailable(f"shared memory was lost while writing: {error!r}") from None
        except asyncio.CancelledError:  # he or his deadline
            self.close()  # an answer may be on its way that nobody waits for, or a thread fill the window
            raise

    async def _write(self, txn: TxnId, frames: Sequence[Frame], deadline: Deadline) -> list[Refusal | None]:
        window = await self._opened()
        refusals: list[Refusal | None] = []
        asked: list[int] = []  # how many frames each open question is about
        for turn, batch in enumerate(_batches(frames)):
            half = turn % 2 * HALF_NBYTES
            places = _places(batch, half)
            nbytes = sum(len(header) + payload.nbytes for _, header, payload in batch)
            await beside_the_loop(nbytes, lambda b=batch, p=places: _fill(window, b, p))  # type: ignore[misc]
            if asked:
                refusals += await self._refusals(asked.pop())
            await packets.send(self._socket, _question(txn, batch, places, deadline))
            asked.append(len(batch))
        for count in asked:
            refusals += await self._refusals(count)
        return refusals

    async def _opened(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if self._reader is None:
            raise Closed("the shard is gone")
        if self._window is None:
            descriptor, mapped = new_window(2 * HALF_NBYTES)
            try:
                await packets.send(self._socket, {"op": "window", "nbytes": 2 * HALF_NBYTES}, [descriptor])
            finally:
                os.close(descriptor)
            await self._answer()
            self._window = np.frombuffer(mapped, dtype=np.uint8)
        return self._window

    async def _refusals(self, count: int) -> list[Refusal | None]:
        answer = await self._answer()
        if "error" in answer:
            kind = ERRORS.get(str(answer["error"]), Unavailable)
            raise kind(str(answer.get("message")))
        names = answer.get("refusals")
        if not isinstance(names, list) or len(names) != count:
            raise BadPacket(f"{count} frames were sent and not as many answered")
        return [Refusal(name) if name else None for name in names]

    async def _answer(self) -> dict[str, Any]:
        answer = await self._answers.get()
        if isinstance(answer, Exception):
            raise answer
        if not isinstance(answer, dict):
            raise BadPacket("an answer that is none")
        return answer

    def _heard(self) -> None:
        try:
            message, descriptors = packets.receive_now(self._socket)
        except BlockingIOError:
            return
        except (BadPacket, Closed):
            self.close()
            return
        packets.close_all(descriptors)
        if self._answers.full():
            self.close()  # it talks without being asked
        else:
            self._answers.put_nowait(message)


async def attach(name: str, token: str, incarnation: Incarnation, timeout_s: float) -> Attachment:
    """Map the arena of the shard that listens under `name`. Raises NotHere."""
    connected: socket.socket | None = None
    try:
        async with asyncio.timeout(timeout_s):
            connected = await packets.connect(name)
            await packets.send(connected, {"v": VERSION, "token": token})
            message, descriptors = await packets.receive(connected)
        try:
            reader = _reader(message, descriptors, incarnation)
        finally:
            packets.close_all(descriptors)
        return Attachment(connected, reader)
    except BaseException as error:
        if connected is not None:
            connected.close()
        if isinstance(error, OSError | TimeoutError | Closed | BadPacket | Unsafe | ValueError):
            raise NotHere(f"{type(error).__name__}: {error}") from None
        raise


def _reader(message: Any, descriptors: list[int], incarnation: Incarnation) -> ArenaReader:
    nbytes = packets.number(message, "nbytes", ARENA_NBYTES_MAX)
    slots = packets.number(message, "slots", ARENA_NBYTES_MAX)
    if len(descriptors) != 1 or packets.number(message, "incarnation", _U64) != incarnation:
        raise BadPacket("another shard than the one we spoke with")
    return ArenaReader(map_readonly(descriptors[0], nbytes), Geometry(nbytes, slots), incarnation)


def _batches(frames: Sequence[Frame]) -> list[list[Frame]]:
    """In order, each within half of the window."""
    batches: list[list[Frame]] = []
    room = 0
    for frame in frames:
        nbytes = _aligned(len(frame[1]) + frame[2].nbytes)
        if not batches or nbytes > room or len(batches[-1]) >= WRITES_MAX:
            batches.append([])
            room = HALF_NBYTES
        batches[-1].append(frame)
        room -= nbytes
    return batches


def _places(batch: Sequence[Frame], start: int) -> list[int]:
    places = []
    for _, header, payload in batch:
        places.append(start)
        start += _aligned(len(header) + payload.nbytes)
    return places


def _fill(window: np.ndarray[Any, np.dtype[np.uint8]], batch: Sequence[Frame], places: Sequence[int]) -> None:
    for (_, header, payload), at in zip(batch, places, strict=True):
        window[at : at + len(header)] = np.frombuffer(header, dtype=np.uint8)
        body = np.frombuffer(payload, dtype=np.uint8)
        np.copyto(window[at + len(header) : at + len(header) + body.nbytes], body)


def _question(
    txn: TxnId, batch: Sequence[Frame], places: Sequence[int], deadline: Deadline
) -> dict[str, object]:
    return {
        "op": "write",
        "txn": txn,
        "indexes": [index for index, _, _ in batch],
        "offsets": list(places),
        "nbytes": [len(header) + payload.nbytes for _, header, payload in batch],
        "timeout_ms": min(60_000, int(deadline.left() * 1000)),
    }


def fits(frames: Sequence[Frame]) -> bool:
    """Can all of these go through the window?"""
    return all(HEADER_NBYTES <= len(h) + p.nbytes <= HALF_NBYTES for _, h, p in frames)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE

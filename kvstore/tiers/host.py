"""Host memory: one buffer a frame. The core keeps the byte budget; this keeps the bytes.

Writing hands the buffer over and copies nothing; a reader's view keeps its buffer alive, so a discarded
slot can never show another block's bytes to a reader that still holds the view.
"""

from __future__ import annotations

from kvstore.nouns import Tier


class HostTier:
    tier = Tier.HOST

    def __init__(self) -> None:
        self._frames: dict[int, bytearray] = {}

    def write(self, slot: int, frame: bytearray) -> None:
        self._frames[slot] = frame

    def read(self, slot: int) -> memoryview | None:
        frame = self._frames.get(slot)
        return None if frame is None else memoryview(frame)

    def sync(self) -> None:
        """Host memory promises nothing across a crash: there is nothing to wait for."""

    def discard(self, slot: int) -> None:
        self._frames.pop(slot, None)

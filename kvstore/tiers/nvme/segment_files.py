"""What is done to segment files, synchronously, in threads: made, appended to, sealed, read, unlinked.

A file appears under its name only once its header is durable (made as *.new, synced, renamed), so a file of
that name without our magic is not ours. A footer is written only after everything before it was synced: a
valid footer proves that its records are durable.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from kvstore.tiers.nvme.buffers import Bytes, aligned
from kvstore.tiers.nvme.files import Files
from kvstore.tiers.nvme.layout import (
    HEAD_NBYTES,
    Prefix,
    Seal,
    decode_prefix,
    encode_footer,
    encode_segment_header,
    record_nbytes,
)

SEGMENT_NAME: Final = re.compile(r"segment-([0-9a-f]{16})")
UNFINISHED_NAME: Final = re.compile(r"segment-[0-9a-f]{16}\.new")


def segment_path(directory: Path, segment_id: int) -> Path:
    return directory / f"segment-{segment_id:016x}"


def _page(data: bytes | bytearray) -> memoryview:
    """The bytes in page-aligned memory."""
    room = aligned(len(data))
    room[:] = np.frombuffer(data, dtype=np.uint8)
    return room.data


@dataclass(frozen=True, slots=True)
class SegmentFiles:
    files: Files
    store: bytes
    seal: Seal
    direct: bool

    def make(self, path: Path, segment_id: int, nbytes: int) -> int:
        """An empty segment, durable under its name. The handle to append with."""
        new = path.with_name(path.name + ".new")
        handle = self.files.create(new, direct=self.direct)
        try:
            self.files.allocate(handle, nbytes)
            self.files.write(handle, [_page(encode_segment_header(self.store, segment_id))], 0)
            self.files.sync(handle)
            self.files.rename(new, path)
            self.files.sync_directory(path.parent)
        except BaseException:
            self.files.close(handle)
            with contextlib.suppress(OSError):  # what stays is removed at the next start
                self.files.unlink(new)
                self.files.unlink(path)
            raise
        return handle

    def append(self, handle: int, records: Sequence[Bytes], offset: int) -> None:
        self.files.write(handle, [record.data for record in records], offset)

    def finish(self, handle: int, segment_id: int, heads: bytearray, end: int) -> int:
        """The footer behind `end`, up to which all is durable already. What the file takes from now on."""
        footer = _page(encode_footer(heads, segment_id, end, self.seal))
        self.files.write(handle, [footer], end)
        self.files.truncate(handle, end + footer.nbytes)
        self.files.sync(handle)
        return end + footer.nbytes

    def read(
        self, path: Path, segment_id: int, offset: int, frame_nbytes: int
    ) -> tuple[Bytes, Prefix | None]:
        """The record's buffer, and what its prefix says; None where it is not there whole."""
        room = aligned(record_nbytes(frame_nbytes))
        handle = self.files.open(path, direct=self.direct)
        try:
            got = self.files.read(handle, room.data, offset)
        finally:
            self.files.close(handle)
        prefix = decode_prefix(room[:HEAD_NBYTES].data, segment_id, offset, self.seal)
        whole = prefix is not None and got == room.nbytes and prefix.nbytes == frame_nbytes
        return room, prefix if whole else None

    def remove(self, path: Path) -> None:
        """Gone for good when this returns."""
        self.files.unlink(path)
        self.files.sync_directory(path.parent)

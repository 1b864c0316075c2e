"""Memory that other processes may map to read and that nobody, ever again, can map to write: a sealed memfd.

It has no name in any file system and is gone with its last holder, kill -9 included. Where the kernel cannot
seal so (FUTURE_WRITE, Linux 5.1), or has no memfd, it is private memory without a descriptor.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

_F_SEAL_FUTURE_WRITE: Final = 0x10  # Python names it from 3.13 on
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


class Descriptor:
    """Closed with its last holder."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)


def sealed_memory(nbytes: int) -> tuple[None, mmap.mmap] | tuple[Descriptor, mmap.mmap]:
    """Memory, and its file if no other process can ever write it."""
    try:
        file = Descriptor(os.memfd_create("kvstrata-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except (AttributeError, OSError):
        return None, mmap.mmap(-1, nbytes)
    try:
        os.ftruncate(file.fileno(), nbytes)
        mapped = mmap.mmap(file.fileno(), nbytes, flags=mmap.MAP_SHARED)
        fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, _SEALS)
    except OSError:  # no such seal here: without it a reader could write
        return None, mmap.mmap(-1, nbytes)
    return file, mapped

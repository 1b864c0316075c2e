"""Memory that came from another process as a descriptor, mapped so that it can harm nobody.

What we map must not shrink under us (touching what is gone would kill us: SIGBUS), so it must be a memfd
of ordinary pages that its owner sealed against shrinking. We map it read-only. Its content may change at any
time: whoever uses it copies first and verifies the copy.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import Final

_HUGETLBFS: Final = 0x958458F6  # HUGETLBFS_MAGIC, statfs(2)
_STATFS_NBYTES: Final = 256  # more than any struct statfs has
F_SEAL_FUTURE_WRITE: Final = 0x10  # Python names it from 3.13 on

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Unsafe(Exception):
    """A descriptor whose memory we will not map."""


def map_readonly(descriptor: int, nbytes: int) -> mmap.mmap:
    """The first `nbytes` of a sealed memfd. Raises Unsafe; the descriptor stays the caller's."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        status = os.fstat(descriptor)
        if not seals & fcntl.F_SEAL_SHRINK:
            raise Unsafe("its owner may shrink it")
        if _file_system(descriptor) == _HUGETLBFS:
            raise Unsafe("huge pages may run out when they are touched")
        if not 0 < nbytes <= status.st_size:
            raise Unsafe(f"{nbytes} bytes of a memory of {status.st_size}")
        return mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except OSError as error:
        raise Unsafe(str(error)) from None


def new_window(nbytes: int) -> tuple[int, mmap.mmap]:
    """A memfd of our own for others to read, and our writable view of it. Raises OSError."""
    descriptor = os.memfd_create("kvstrata-window", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, nbytes)
        mapped = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, mapped


def _file_system(descriptor: int) -> int:
    """Its magic number: what tells hugetlbfs from ordinary memory that the kernel may keep in huge pages
    (st_blksize does not). Raises OSError."""
    found = ctypes.create_string_buffer(_STATFS_NBYTES)
    if _libc.fstatfs(descriptor, found) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(ctypes.c_long.from_buffer(found).value) & 0xFFFF_FFFF  # f_type comes first

"""How this process's allocator treats large buffers. Blocks are megabytes, allocated and freed all day.

By default glibc maps every buffer above 128 KiB anew and unmaps it when freed, so each block is paid for in
page faults: on a virtual machine that is up to 3 ms a MiB, ten times the copy itself. Keeping freed memory
costs at most what was once in use at the same time, which the bounds on queues and pools already bound.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3
_MMAP_NBYTES: Final = 32 << 20  # the most glibc takes: larger buffers are mapped as before
_TRIM_NBYTES: Final = 1 << 30
_TOP_PAD_NBYTES: Final = 64 << 20


def keep_freed_buffers() -> bool:
    """Serve large buffers from memory the process already has. False where there is no glibc to ask."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # All three or none: glibc stops adapting by itself as soon as one is set.
    settings = (
        (_M_MMAP_THRESHOLD, _MMAP_NBYTES),
        (_M_TRIM_THRESHOLD, _TRIM_NBYTES),
        (_M_TOP_PAD, _TOP_PAD_NBYTES),
    )
    accepted = [mallopt(name, nbytes) == 1 for name, nbytes in settings]
    return all(accepted)

"""Host memory page-locked for a GPU, where CUDA is in the process: what the device may copy from directly.

Nobody imports torch for this: a process that has not, or whose torch sees no GPU, pins nothing. Registering
touches and locks every page, so that an arena takes all of its budget at once, and takes its time: it is
done in a thread, and until it is done, or if it fails (a limit on locked memory, a device that cannot
register what is mapped read-only), the memory is read as any other. Failing costs a log line.

In threads of its own, which end with the call: CUDA keeps a failure as its thread's last error, and torch
would raise it from the next kernel that this thread launches.

UNMEASURED: no machine with a GPU has run this; the tests have a fake of torch's binding.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, Final

import numpy as np
import structlog

log = structlog.get_logger(__name__)

REGISTER_PORTABLE: Final = 0x01  # cudaHostRegisterPortable: pinned for every context of the process
REGISTER_READ_ONLY: Final = 0x08  # cudaHostRegisterReadOnly: the device will not write, the map cannot


class Registration:
    """One map, from when it is asked for until `close`. The map stays mapped as long."""

    def __init__(self, memory: memoryview, torch: Any, read_only: bool) -> None:
        self._memory: memoryview | None = memory
        self._torch = torch
        self._flags = REGISTER_PORTABLE | (REGISTER_READ_ONLY if read_only else 0)
        self._address: int = np.frombuffer(memory, dtype=np.uint8).ctypes.data
        self.pinned = False
        self._registering = _beside(self._register, "kvstrata-pin")

    def close(self) -> None:
        """Ends it as soon as it may be ended; does not wait for that."""
        if self._memory is not None:
            memory, self._memory = self._memory, None
            _beside(lambda: self._unregister(memory), "kvstrata-unpin")

    def _register(self) -> None:
        nbytes = self._memory.nbytes if self._memory is not None else 0
        if nbytes:
            self.pinned = self._succeeded("cudaHostRegister", self._address, nbytes, self._flags)

    def _unregister(self, memory: memoryview) -> None:
        """`memory` is held until here: what is registered must not be unmapped."""
        self._registering.join()
        if self.pinned:
            self.pinned = not self._succeeded("cudaHostUnregister", self._address)
        del memory

    def _succeeded(self, name: str, *arguments: int) -> bool:
        try:
            cudart = self._torch.cuda.cudart()
            result = getattr(cudart, name)(*arguments)
            if result == cudart.cudaError.success:
                return True
            why = str(cudart.cudaGetErrorString(result))
        except (AttributeError, RuntimeError) as error:  # another torch, or CUDA will not start
            why = repr(error)
        log.warning("memory is not pinned as asked", call=name, why=why)
        return False


def pin(memory: memoryview, *, read_only: bool) -> Registration | None:
    """Begin to pin a map, whole pages of it. None where this process has no CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return Registration(memory, torch, read_only)


def _beside(work: Any, name: str) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread

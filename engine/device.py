"""Where an engine computes, and what is different there: streams, marks, recorded work, pinned memory.

    compute stream   [ step ][ step ][ step ]        the device's default stream, the engine's thread's
    beside()              [ copy ]    [ copy ]       a stream of the calling thread's own, behind all that the
                                                     compute stream was given before
    mark()                    ^ done?                what the host asks, or waits for

Work on a device is issued and done later, so who hands bytes to another thread, or memory to another owner,
orders the two by a mark. On the CPU everything is done when the call returns: `HostDevice` is the same seam
there, and how all that stands on it is tested.

UNMEASURED: no machine with a GPU has run `CudaDevice`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple, Protocol

import structlog
import torch

from kvstore.errors import ConfigError

__all__ = ["CudaDevice", "Device", "HostDevice", "Mark", "Recorded", "resolve_device"]

WARM_UPS: Final = 2
"""Runs before work is recorded: kernels are compiled and libraries take their workspace in them."""

log = structlog.get_logger(__name__)


class Mark(Protocol):
    """A place in a stream."""

    def query(self) -> bool:
        """Has the device come past it?"""
        ...

    def synchronize(self) -> None:
        """Wait until it has. Lets go of the interpreter lock."""
        ...


class Recorded(NamedTuple):
    """Work that can be done again, on the same memory, without its Python."""

    replay: Callable[[], object]
    result: torch.Tensor


class Device(Protocol):
    """See the module."""

    @property
    def torch_device(self) -> torch.device: ...

    def pinned(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of host memory that the device copies from and to by itself. It goes back to a cache
        when nobody holds it and no copy uses it."""
        ...

    def mark(self) -> Mark:
        """Behind all that the calling thread has issued on its current stream."""
        ...

    def wait_for(self, mark: Mark) -> None:
        """Compute nothing that is issued from here on before `mark` is done. The host does not wait."""
        ...

    def current(self) -> AbstractContextManager[None]:
        """What the calling thread issues goes to this device. Any thread that has not asked must."""
        ...

    def beside(self) -> AbstractContextManager[None]:
        """What the calling thread issues goes to a stream of its own, behind all that the compute stream was
        given so far. From any thread."""
        ...

    def record(self, work: Callable[[], torch.Tensor]) -> Recorded:
        """`work` must not wait for the device, and reads and writes what it finds at fixed addresses; what it
        returns is written again by every replay. Engine thread."""
        ...


class CudaDevice:
    """Raises ConfigError if this machine has no such device."""

    def __init__(self, device: torch.device) -> None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index or 0
        if index >= count:
            raise ConfigError(
                f"device is {device}, but torch finds {count} CUDA devices here: use device cpu"
            )
        self.torch_device = torch.device("cuda", index)
        self._compute = torch.cuda.default_stream(self.torch_device)
        self._own = threading.local()
        self._graphs_memory: Any = None

    def pinned(self, nbytes: int) -> torch.Tensor:
        with torch.cuda.device(self.torch_device):  # another thread's would be the first device
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def wait_for(self, mark: Mark) -> None:
        assert isinstance(mark, torch.cuda.Event), "a mark of another device"
        self._compute.wait_event(mark)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        with torch.cuda.device(self.torch_device):
            yield

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        stream: torch.cuda.Stream | None = getattr(self._own, "stream", None)
        if stream is None:
            stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
            self._own.stream = stream
        stream.wait_stream(self._compute)
        with torch.cuda.stream(stream):
            yield

    def record(self, work: Callable[[], torch.Tensor]) -> Recorded:
        """A CUDA graph. All of a device's share one pool of memory: what one returned is lost when another
        is replayed."""
        with self.beside():
            for _ in range(WARM_UPS):
                work()
        torch.cuda.synchronize(self.torch_device)
        if self._graphs_memory is None:
            self._graphs_memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: only this one's calls are held to what can be recorded.
        with torch.cuda.graph(graph, pool=self._graphs_memory, capture_error_mode="thread_local"):
            result = work()
        return Recorded(graph.replay, result)


class _Done:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """It is."""


class HostDevice:
    """The CPU behind the same seam: one stream, always done, and nothing recorded but the work itself."""

    torch_device = torch.device("cpu")

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def mark(self) -> Mark:
        return _Done()

    def wait_for(self, mark: Mark) -> None:
        mark.synchronize()

    def current(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def beside(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self, work: Callable[[], torch.Tensor]) -> Recorded:
        result = work()
        return Recorded(lambda: result.copy_(work()), result)


def resolve_device(name: str, *, batch_invariant: bool) -> torch.device:
    """What EngineConfig.device means on this machine.

    `auto` never takes a promise back: batch invariance is proved for CPUs, so with it that is where it
    computes, and the log says what is left unused. A device that is asked for by name is taken at its word.
    """
    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if batch_invariant:
        log.warning("a CUDA device is left unused: batch_invariant is proved on CPUs only, set it to false")
        return torch.device("cpu")
    return torch.device("cuda")

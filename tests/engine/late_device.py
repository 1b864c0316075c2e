"""Two devices that are the CPU and behave as a GPU does where it matters.

RecordingDevice   what is recorded is its operations on their tensors: a replay knows nothing of the Python
                  around them, and waiting for a value inside is an error, as in a CUDA graph
LateDevice        besides, a copy that is issued beside the compute stream is done when somebody waits for it
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.device import HostDevice, Mark, Recorded

WAITING = ("_local_scalar_dense", "nonzero", "equal", "item")


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in WAITING, f"{func} waits for the device"
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return (
        [one for one in result if isinstance(one, torch.Tensor)] if isinstance(result, tuple | list) else []
    )


class RecordingDevice(HostDevice):
    """`replays` counts what was done again."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, work: Callable[[], torch.Tensor]) -> Recorded:
        with _Recording() as recording:
            result = work()

        def replay() -> None:
            self.replays += 1
            with torch.inference_mode():
                recording.replay()

        return Recorded(replay, result)


class _Deferring(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, queue: list[Callable[[], object]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._queue = queue

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **kwargs)
        self._queue.append(lambda: func(*args, **kwargs))
        return args[0]


class LateDevice(RecordingDevice):
    """`catch_up()` does what was issued, as time does."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: list[Callable[[], object]] = []
        self._done = 0
        self._lock = threading.RLock()

    def mark(self) -> Mark:
        with self._lock:
            return _LateMark(self, self._done + len(self._queue))

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        with _Deferring(self._queue):
            yield

    def done(self) -> int:
        return self._done

    def catch_up(self, until: int | None = None) -> None:
        with self._lock, torch.inference_mode():
            while self._queue and (until is None or self._done < until):
                self._queue.pop(0)()
                self._done += 1


class _LateMark:
    def __init__(self, device: LateDevice, place: int) -> None:
        self._device = device
        self._place = place

    def query(self) -> bool:
        return self._device.done() >= self._place

    def synchronize(self) -> None:
        self._device.catch_up(self._place)

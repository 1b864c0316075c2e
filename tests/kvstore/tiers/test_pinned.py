"""Memory is pinned where torch sees a GPU, and nothing depends on it. With a fake of torch's binding."""

from __future__ import annotations

import gc
import mmap
import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from structlog.testing import capture_logs

from kvstore.tiers.pinned import REGISTER_PORTABLE, REGISTER_READ_ONLY, Registration, pin

NBYTES = 4 * mmap.PAGESIZE
SUCCESS, NOT_SUPPORTED = 0, 801


class FakeCudart:
    """`torch.cuda.cudart()`: keeps what is registered, and who called."""

    cudaError = SimpleNamespace(success=SUCCESS)

    def __init__(self, answer: int = SUCCESS) -> None:
        self.answer = answer
        self.registered: dict[int, tuple[int, int]] = {}
        self.threads: set[int] = set()
        self.go_on = threading.Event()
        self.go_on.set()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert self.go_on.wait(10)
        self.threads.add(threading.get_ident())
        if self.answer == SUCCESS:
            self.registered[address] = nbytes, flags
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return SUCCESS

    def cudaGetErrorString(self, code: int) -> str:
        return f"error {code}"


def install(monkeypatch: pytest.MonkeyPatch, cudart: object, available: bool = True) -> None:
    cuda = SimpleNamespace(is_available=lambda: available, cudart=lambda: cudart)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


def ended() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("kvstrata-"):
            thread.join(10)


def map_of() -> mmap.mmap:
    return mmap.mmap(-1, NBYTES)


def test_without_torch_or_a_gpu_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCudart(), available=False)
    assert pin(memoryview(map_of()), read_only=True) is None
    monkeypatch.delitem(sys.modules, "torch")
    assert pin(memoryview(map_of()), read_only=True) is None
    assert "torch" not in sys.modules, "it was imported for this"


@pytest.mark.parametrize(("read_only", "flag"), [(True, REGISTER_READ_ONLY), (False, 0)])
def test_a_map_is_registered_whole_and_given_back(
    read_only: bool, flag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart, mapped = FakeCudart(), map_of()
    install(monkeypatch, cudart)
    registration = pin(memoryview(mapped).toreadonly(), read_only=read_only)
    ended()
    assert isinstance(registration, Registration)
    assert registration.pinned
    address = np.frombuffer(mapped, dtype=np.uint8).ctypes.data
    assert cudart.registered == {address: (NBYTES, REGISTER_PORTABLE | flag)}
    assert threading.get_ident() not in cudart.threads, "an error would be the next kernel's"
    registration.close()
    registration.close()
    ended()
    assert not cudart.registered
    assert not registration.pinned


def test_what_is_closed_while_it_is_registered_is_unregistered_and_stays_mapped_until_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cudart, mapped = FakeCudart(), np.zeros(NBYTES, dtype=np.uint8)
    install(monkeypatch, cudart)
    cudart.go_on.clear()
    registration = pin(mapped.data, read_only=True)
    assert registration is not None
    registration.close()
    gone = weakref.ref(mapped)
    del mapped
    gc.collect()
    assert gone() is not None, "unmapped under the driver's hands"
    cudart.go_on.set()
    ended()
    gc.collect()
    assert not cudart.registered
    assert gone() is None, "the map outlives its registration"


@pytest.mark.parametrize("cudart", [FakeCudart(NOT_SUPPORTED), None, SimpleNamespace()], ids=str)
def test_a_failure_is_a_log_line_and_nothing_else(cudart: object, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, cudart)
    with capture_logs() as lines:
        registration = pin(memoryview(map_of()), read_only=True)
        ended()
    assert registration is not None
    assert not registration.pinned
    assert [line["call"] for line in lines] == ["cudaHostRegister"]
    registration.close()
    ended()

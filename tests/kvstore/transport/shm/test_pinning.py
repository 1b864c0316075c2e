"""A client in a process with CUDA pins the arena it maps, as long as it maps it."""

from __future__ import annotations

import pytest

from kvstore.tiers.pinned import REGISTER_PORTABLE, REGISTER_READ_ONLY
from tests.kvstore.tiers.test_pinned import FakeCudart, ended, install
from tests.kvstore.transport.shm.conftest import Near


async def test_an_arena_is_pinned_from_attaching_to_letting_go(
    near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart = FakeCudart()
    install(monkeypatch, cudart)
    await near.transport.hello(timeout_s=10.0)  # attaches anew
    ended()
    flags = REGISTER_PORTABLE | REGISTER_READ_ONLY
    assert list(cudart.registered.values()) == [(near.arena.geometry.nbytes, flags)]
    await near.transport.close()
    ended()
    assert not cudart.registered

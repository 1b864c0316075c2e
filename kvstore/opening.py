"""Ways to come by a client that need a moment: awaited, or entered with `async with`.

client = await StoreClient.in_process()          close it yourself
async with StoreClient.in_process() as client:   closed for you
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Generator, Sequence
from types import TracebackType
from typing import Any, Final, Generic, Protocol, TypeVar

import grpc

from kvstore.deadline import Deadline
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.errors import ConfigError, DeadlineExceeded, KVStrataError, Unavailable
from kvstore.nouns import ShardId
from kvstore.tiers.host import HostTier
from kvstore.topology import ShardEntry, Topology
from kvstore.transport.grpc.client import ANY_SHARD, GrpcTransport

ASK_EACH_S: Final = 2.0
"""For one address to answer who is there, before the next is asked."""


class Closable(Protocol):
    async def close(self) -> None: ...


Made = TypeVar("Made", bound=Closable)


class Opening(Generic[Made]):
    """What is being opened: await it, or enter it to have it closed at the end."""

    def __init__(self, make: Callable[[], Awaitable[Made]]) -> None:
        self._make = make
        self._made: Made | None = None

    def __await__(self) -> Generator[Any, Any, Made]:
        return self._make().__await__()

    async def __aenter__(self) -> Made:
        self._made = await self._make()
        return self._made

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._made is not None:
            await self._made.close()


async def start_in_process(capacity_nbytes: int, policy: str, shards: int) -> list[ShardDriver]:
    """Running shards in this process, with a secret that nobody else knows. Raises ConfigError."""
    secret = secrets.token_bytes(32)
    configs = [
        DriverConfig(ShardId(f"in-process-{i}"), capacity_nbytes // shards, secret, policy=policy)
        for i in range(shards)
    ]
    drivers = [ShardDriver(config, HostTier()) for config in configs]
    for driver in drivers:
        await driver.start()
    return drivers


async def discover(
    addresses: Sequence[str],
    token: str | None,
    credentials: grpc.ChannelCredentials | None,
    *,
    admin: bool,
    timeout_s: float,
) -> Topology:
    """Which shards there are: asked of one address after the other until one knows.

    `admin`: the addresses are all shards' admin addresses themselves, and each is asked who it is; so it is
    where no shard knows a topology. Raises what the last one raised when none answers.
    """
    if not addresses:
        raise ConfigError("no address: give at least one shard's, like 127.0.0.1:7400")
    deadline = Deadline(timeout_s)
    failures: list[KVStrataError] = []
    found: list[ShardEntry] = []
    for address in addresses:
        anyone = GrpcTransport(ANY_SHARD, address, token, credentials)
        try:
            bound = min(ASK_EACH_S, deadline.left())
            hello = await anyone.hello(timeout_s=bound)
            known = None if admin else await _topology(anyone, bound)
        except KVStrataError as error:
            failures.append(error)
            continue
        finally:
            await anyone.close()
        if known is not None and known.shards:
            return known
        found.append(ShardEntry(hello.shard, address))
    if failures and (admin or not found):
        raise _worded(failures[-1], addresses)
    return Topology(0, tuple(found))


async def _topology(shard: GrpcTransport, timeout_s: float) -> Topology | None:
    """None where it does not say: an admin's listener."""
    try:
        return await shard.topology(timeout_s=timeout_s)
    except (Unavailable, DeadlineExceeded):
        raise
    except KVStrataError:
        return None


def _worded(error: KVStrataError, addresses: Sequence[str]) -> KVStrataError:
    if not isinstance(error, Unavailable):
        return error
    return Unavailable(
        f"no store answers at {', '.join(addresses)}: is it running (`kvstrata store`), and are TLS and the "
        f"address as it says? ({str(error).removeprefix('shard : ')})"
    )

"""One question to all shards at once, and an honest answer: everybody's, or who did not answer and why.

What changes things for all (an epoch, a purge) must not be half done in silence: `Incomplete` names the
shards that did it and those that did not. All are idempotent: repeat them when the cause is mended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from kvstore.errors import Incomplete, KVStrataError, Unavailable
from kvstore.nouns import BlockKey, Listed, NamespaceId, Revision, ShardId
from kvstore.peers import Peers
from kvstore.transport.base import Purge, Purged, ShardTransport

Value = TypeVar("Value")

KEYS_A_PURGE: Final = 4_096
PAGE_VERSIONS: Final = 1_024


@dataclass(frozen=True, slots=True)
class Page:
    """Versions that one shard holds of a namespace, as they stood at its `revision`."""

    shard: ShardId
    revision: Revision
    versions: tuple[Listed, ...]


async def each(
    peers: Peers, call: Callable[[ShardTransport], Awaitable[Value]]
) -> dict[ShardId, Value | KVStrataError]:
    """Every shard's answer, or its error."""
    transports = list(peers.transports.values())
    answers = await asyncio.gather(*(call(t) for t in transports), return_exceptions=True)
    found: dict[ShardId, Value | KVStrataError] = {}
    for transport, answer in zip(transports, answers, strict=True):
        if isinstance(answer, BaseException) and not isinstance(answer, KVStrataError):
            raise answer
        found[transport.shard] = answer
    return found


async def everywhere(
    peers: Peers, what: str, call: Callable[[ShardTransport], Awaitable[Value]]
) -> dict[ShardId, Value]:
    """Every shard's answer. Raises Incomplete when some failed, and their error when all failed alike."""
    answers = await each(peers, call)
    done: dict[ShardId, Value] = {}
    failed: dict[ShardId, KVStrataError] = {}
    for shard, answer in answers.items():
        if isinstance(answer, KVStrataError):
            failed[shard] = answer
        else:
            done[shard] = answer
    check_complete(what, done, failed)
    return done


def check_complete(
    what: str, done: Mapping[ShardId, object], failed: Mapping[ShardId, KVStrataError]
) -> None:
    """Raises Incomplete, or the one error that all shards gave."""
    if not done and not failed:
        raise Unavailable(f"{what}: the topology has no shards")
    kinds = {type(error) for error in failed.values()}
    if failed and not done and len(kinds) == 1:
        raise next(iter(failed.values()))
    if failed:
        whys = "; ".join(f"{shard}: {error}" for shard, error in failed.items())
        raise Incomplete(
            f"{what}: done by {', '.join(done) or 'none'}, not by {', '.join(failed)}. It may be repeated "
            f"when that is mended: {whys}",
            done,
            failed,
        )


async def purge_on(
    transport: ShardTransport,
    namespace: NamespaceId,
    keys: tuple[BlockKey, ...] | None,
    epoch: int | None,
    timeout_s: float,
) -> Purged:
    """One shard's purge, in as many calls as the keys need."""
    parts = (
        [None]
        if keys is None
        else [keys[at : at + KEYS_A_PURGE] for at in range(0, len(keys), KEYS_A_PURGE)] or [()]
    )
    purged: Purged | None = None
    for part in parts:
        done = await transport.purge(Purge(namespace, part, epoch), timeout_s=timeout_s)
        before = (purged.versions, purged.nbytes) if purged else (0, 0)
        purged = replace(done, versions=done.versions + before[0], nbytes=done.nbytes + before[1])
    assert purged is not None
    return purged


async def compact_on(
    transport: ShardTransport, revisions: Mapping[ShardId, Revision] | None, timeout_s: float
) -> Revision:
    if revisions is not None:
        return await transport.compact(revisions[transport.shard], timeout_s=timeout_s)
    now = await transport.status(timeout_s=timeout_s)
    return await transport.compact(Revision(now.incarnation, now.revision), timeout_s=timeout_s)


async def listing(
    peers: Peers, namespace: NamespaceId, at: Mapping[ShardId, Revision], timeout_s: float
) -> AsyncIterator[Page]:
    """Page by page, shard after shard; a shard that fails is skipped, and told of at the end."""
    done: dict[ShardId, object] = {}
    failed: dict[ShardId, KVStrataError] = {}
    for transport in list(peers.transports.values()):
        revision, cursor = at.get(transport.shard), 0
        try:
            while True:
                page = await transport.listing(
                    namespace, revision, cursor, PAGE_VERSIONS, timeout_s=timeout_s
                )
                yield Page(transport.shard, page.revision, page.versions)
                revision, cursor = page.revision, page.next_cursor
                if not cursor:
                    break
            done[transport.shard] = revision
        except KVStrataError as error:
            failed[transport.shard] = error
    check_complete("listing", done, failed)

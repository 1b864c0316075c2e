"""Reading blocks into the caller's own memory: all shards at once, one look at all headers.

What could not be read, or is not what was asked for, is a miss with its reason, and the content of its
buffer is undefined. Costs one copy and one xxh3 pass of the payload, and some microseconds a block; a block
of lesser quality may have come encoded and is decoded into its buffer (`decoding.py`).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import structlog

from kvstore.answers import BlockMiss, VerifiedBlock
from kvstore.codecs.frames import encoded_sizes
from kvstore.decoding import decode_landed
from kvstore.errors import KVStrataError, Unavailable
from kvstore.frame import HEADER_NBYTES
from kvstore.frame_columns import identities, verdicts
from kvstore.nouns import KVLayout, MissReason, PinnedBlock, ShardId, Snapshot
from kvstore.peers import Peers, miss_of
from kvstore.transport import landing as to_land
from kvstore.transport.landing import NOTHING, Landing

log = structlog.get_logger(__name__)


async def read_into(
    peers: Peers,
    snapshot: Snapshot,
    layout: KVLayout,
    blocks: Sequence[PinnedBlock],
    buffers: Sequence[Any],
    timeout_s: float,
    unexpected: Callable[[ShardId, Exception], Unavailable],
) -> tuple[list[VerifiedBlock | BlockMiss], list[PinnedBlock]]:
    """The answer for each block, and the blocks whose bytes were refused: to be reported to their shards."""
    block_nbytes = layout.block_nbytes
    landing = Landing(
        [_target(buffer, block_nbytes) for buffer in buffers], encoded_sizes(layout, snapshot.min_quality)
    )
    if len(blocks) != len(buffers):
        raise ValueError(f"{len(blocks)} blocks and {len(buffers)} buffers: one each")
    by_shard: dict[ShardId, list[int]] = defaultdict(list)
    refs = [block.ref for block in blocks]
    for row, ref in enumerate(refs):
        by_shard[ref.shard].append(row)

    async def land_on(shard: ShardId, rows: list[int]) -> None:
        reason = MissReason.SHARD_UNAVAILABLE
        mine = [refs[row] for row in rows]
        try:
            async with asyncio.timeout(timeout_s):
                transport = peers.transport(shard)
                await to_land.read_into(
                    transport, snapshot.namespace, mine, landing, rows, timeout_s=timeout_s
                )
        except TimeoutError:
            reason = MissReason.DEADLINE
        except KVStrataError as error:
            log.warning("read broke off", shard=shard, error=str(error))
            reason = miss_of(error)
        except AssertionError:
            raise
        except Exception as error:
            reason = miss_of(unexpected(shard, error))
        for i in np.flatnonzero(landing.payload_nbytes[rows] == NOTHING).tolist():
            landing.misses[rows[i]] = landing.misses[rows[i]] or reason

    await asyncio.gather(*(land_on(*part) for part in by_shard.items()))
    came = landing.payload_nbytes != NOTHING
    columns = landing.headers, landing.payload_nbytes, landing.checksums
    found = verdicts(*columns, [block.key for block in blocks], snapshot, layout)
    encoded = came & (landing.payload_nbytes != block_nbytes)
    lossy = [row for row in np.flatnonzero(encoded).tolist() if found[row] is None]
    for row, why in (await decode_landed(landing, lossy, layout)).items():
        found[row] = why
    peers.counters["decoded_blocks"] += len(lossy)
    return _answers(peers, snapshot, blocks, landing, found)


def _answers(
    peers: Peers,
    snapshot: Snapshot,
    blocks: Sequence[PinnedBlock],
    landing: Landing,
    found: list[MissReason | None],
) -> tuple[list[VerifiedBlock | BlockMiss], list[PinnedBlock]]:
    came = landing.payload_nbytes != NOTHING
    answers: list[VerifiedBlock | BlockMiss] = [
        VerifiedBlock(row, payload, *identity)
        for row, (payload, identity) in enumerate(
            zip(landing.payloads, identities(landing.headers, snapshot), strict=True)
        )
    ]
    refused: list[PinnedBlock] = []
    missed = np.flatnonzero(~came | np.array([reason is not None for reason in found], dtype=np.bool_))
    for row in missed.tolist():
        reason = landing.misses[row] or MissReason.ABSENT
        if came[row]:
            reason = found[row] or reason
            refused.append(blocks[row])
            peers.counters[f"rejected:{reason.value}"] += 1
        peers.counters[f"miss:{reason.value}"] += 1
        answers[row] = BlockMiss(row, blocks[row].key, reason)
    good = len(blocks) - len(missed)
    peers.counters["verified_blocks"] += good
    read_nbytes = int(landing.payload_nbytes.sum() - landing.payload_nbytes[missed].sum())
    peers.counters["read_bytes"] += good * HEADER_NBYTES + read_nbytes
    return answers, refused


def _target(buffer: Any, nbytes: int) -> memoryview:
    target = memoryview(buffer).cast("B")
    if target.nbytes != nbytes or target.readonly:
        kind = "read-only" if target.readonly else "writable"
        raise ValueError(f"a {kind} buffer of {target.nbytes} bytes: give a writable one of {nbytes}")
    return target

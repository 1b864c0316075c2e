"""Encoded blocks that landed, decoded into the memory their readers gave.

Decoding costs about as much as a few copies of the block (`kvstrata bench codec`), in one thread beside the
loop, where torch may use threads of its own. What does not decode is a miss like any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore.codecs.frames import decode_payload
from kvstore.errors import CorruptBlock
from kvstore.frame import decode_header
from kvstore.nouns import KVLayout, MissReason
from kvstore.tiers.copying import INLINE_NBYTES_MAX, all_done
from kvstore.transport.landing import Landing


async def decode_landed(landing: Landing, rows: Sequence[int], layout: KVLayout) -> dict[int, MissReason]:
    """Decode the rows, which were verified, into their buffers; why some could not be, by row.

    A caller who is cancelled waits for the thread: the buffers are his.
    """
    if not rows:
        return {}
    if len(rows) * layout.block_nbytes <= INLINE_NBYTES_MAX:
        return _decode(landing, rows, layout)
    working = asyncio.get_running_loop().run_in_executor(None, _decode, landing, rows, layout)
    await all_done([working])
    return working.result()


def _decode(landing: Landing, rows: Sequence[int], layout: KVLayout) -> dict[int, MissReason]:
    failed = {}
    for row in rows:
        frame = decode_header(landing.headers[row].data)
        try:
            decode_payload(frame, landing.encoded[row], layout, landing.payloads[row])
        except CorruptBlock as error:
            failed[row] = error.reason
    return failed

"""A step's rows between ranks: plain numbers, int64 little-endian, in one body.

    head   rows, segments [[row, rows, start, slots], ...]
    body   token ids | positions | pool rows | logits rows | every segment's slots, one after another

Logits are rank 0's matter: others compute KV and their parts of sums, of the same rows.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.attention.base import Segment
from engine.batch import Batch
from engine.parallel.link import Bytes, Head

__all__ = ["packed_step", "unpacked_step"]


def packed_step(batch: Batch) -> tuple[Head, Bytes]:
    """A message for another rank."""
    segments = [[each.row, each.rows, each.start, len(each.slots)] for each in batch.segments]
    slots = [slot for each in batch.segments for slot in each.slots]
    columns = (batch.token_ids, batch.positions, batch.pool_rows, batch.logits_rows)
    body = (
        torch.cat((*columns, torch.tensor(slots, dtype=torch.int64)))
        .numpy()
        .astype("<i8", copy=False)
        .tobytes()
    )
    rows, drawing = len(batch.token_ids), len(batch.logits_rows)
    return {"command": "step", "rows": rows, "logits_rows": drawing, "segments": segments}, body


def unpacked_step(head: Head, body: Bytes) -> Batch:
    """ValueError unless the body has what the head says."""
    numbers = torch.from_numpy(np.frombuffer(body, "<i8").astype(np.int64))
    rows, segments = head["rows"], head["segments"]
    counts = [count for *_, count in segments]
    columns = [rows, rows, rows, head["logits_rows"], *counts]
    token_ids, positions, pool_rows, logits_rows, *of_each = torch.split_with_sizes(numbers, columns)
    return Batch(
        token_ids,
        positions,
        pool_rows,
        tuple(
            Segment(row, count, start, tuple(taken.tolist()))
            for (row, count, start, _), taken in zip(segments, of_each, strict=True)
        ),
        logits_rows,
    )

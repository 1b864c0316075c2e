"""Promise: what ranks tell each other arrives as it was sent, or not at all."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
import torch

from engine.attention.base import Segment
from engine.batch import Batch
from engine.errors import RanksLost
from engine.parallel.link import RankLink, checked, with_checksum
from engine.parallel.step import packed_step, unpacked_step

Ends = tuple[RankLink, RankLink, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Two ends of a link, and the socket of the first."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield RankLink(ours, 5.0), RankLink(theirs, 0.2), ours


def test_a_step_arrives_as_it_was(ends: Ends) -> None:
    sender, receiver, _ = ends
    ids = torch.tensor([3, 5, 7, 2**40, 11])
    segments = (Segment(0, 4, 16, (9, 2, 5)), Segment(4, 1, 0, (1,)))
    sender.send(*packed_step(Batch(ids, ids + 1, ids + 2, segments, torch.tensor([3, 4]))))
    came = unpacked_step(*receiver.receive(1.0))
    assert came.segments == segments
    for column, sent in ((came.token_ids, ids), (came.positions, ids + 1), (came.pool_rows, ids + 2)):
        assert torch.equal(column, sent)
    assert came.logits_rows.tolist() == [3, 4]


def test_kv_that_was_damaged_is_no_kv(ends: Ends) -> None:
    sender, receiver, _ = ends
    head = with_checksum({}, memoryview(b"whole"))
    sender.send(head, b"whole")
    sender.send(head, b"whol3")
    assert bytes(checked(*receiver.receive(1.0))) == b"whole"
    with pytest.raises(RanksLost, match="damaged"):
        checked(*receiver.receive(1.0))


def test_an_end_within_a_message_is_the_end(ends: Ends) -> None:
    _, receiver, raw = ends
    raw.sendall(struct.pack("<II", 100, 0) + b"half")
    raw.close()
    with pytest.raises(RanksLost, match="ended"):
        receiver.receive(1.0)


def test_a_message_that_stops_coming_is_given_up(ends: Ends) -> None:
    _, receiver, raw = ends
    raw.sendall(struct.pack("<II", 100, 0) + b"half")
    with pytest.raises(RanksLost, match="does not answer"):
        receiver.receive(1.0)


def test_a_message_beyond_all_bounds_is_refused(ends: Ends) -> None:
    _, receiver, raw = ends
    raw.sendall(struct.pack("<II", 1 << 30, 0))
    with pytest.raises(RanksLost, match="a message of"):
        receiver.receive(1.0)

"""`kvstrata replay --tiers`: blocks move between two tiers in virtual time, and prefetch is on time."""

from __future__ import annotations

import dataclasses
import json
import os
from array import array
from pathlib import Path
from typing import Final

import pytest

from cli.replay.cold_codecs import codec_named, encoded_nbytes
from cli.replay.offline import ideal
from cli.replay.runs import run
from cli.replay.tiered import Channel, TieredReplay, TierSetting, percentile
from cli.replay.trace import BLOCK_TOKENS, Request, Trace
from kvstore.policies import POLICIES
from tests.cli.replay.test_replay import MOONCAKE, conversations, replayed, write

BLOCK: Final = 1_000_000_000  # at 1 GB/s a second each
SETTING: Final = TierSetting(4_000, 100.0, 5.0, "best_effort", 1.0, "write_through", "always", BLOCK)


def replay(trace: Trace, host: int, codec: str = "lossless", **changes: object) -> TieredReplay:
    setting = dataclasses.replace(SETTING, **changes)  # type: ignore[arg-type]
    chosen = codec_named(codec)
    made = TieredReplay(POLICIES["default"], host, setting, chosen, encoded_nbytes(chosen, BLOCK))
    made.run(trace)
    made.core.check_integrity()
    assert made.tally.requests == len(made.tally.delays_s) == len(trace.requests)
    return made


def ready(replay: TieredReplay) -> float:
    return replay.tally.host_blocks / (replay.tally.host_blocks + replay.tally.nvme_blocks)


def asks(*requests: tuple[float, list[int]]) -> Trace:
    """At so many seconds, for these blocks."""
    return Trace(
        "by hand", tuple(Request(at_s, len(ids) * BLOCK_TOKENS, array("q", ids)) for at_s, ids in requests)
    )


def test_two_tiers_find_what_one_of_their_size_would() -> None:
    trace = conversations(300)
    done = replay(trace, 150, lead_s=0.0)
    assert done.tally.run_blocks / trace.blocks == pytest.approx(ideal(trace).block, abs=0.005)
    assert done.tally.host_blocks + done.tally.nvme_blocks == done.tally.run_blocks


def test_an_announced_request_finds_its_blocks_on_the_host() -> None:
    trace = conversations(300)
    announced, not_announced = (replay(trace, 150, prefetch=mode) for mode in ("best_effort", "off"))
    assert ready(announced) >= 0.9 > 0.7 > ready(not_announced)
    assert announced.wasted_nbytes() < 0.1 * announced.moved_nbytes()["to_host"]


def test_without_time_between_knowing_and_starting_prefetch_is_for_nothing() -> None:
    trace = conversations(300)
    assert ready(replay(trace, 150, lead_s=0.0)) < ready(replay(trace, 150)) - 0.1


LATER: Final = asks((0.0, [1, 2, 3]), (60.0, list(range(10, 26))), (120.0, [1, 2, 3]))
"""Its third request finds what it asks for below: the host holds sixteen."""


@pytest.mark.parametrize(
    ("prefetch", "delay_s", "on_host"),
    [
        ("off", 3.0, 0),  # reads three seconds' worth
        ("best_effort", 1.0, 2),  # the third is still on its way: read
        ("wait_complete", 0.5, 3),
        ("timeout", 0.25 + 1.25, 2),  # waits a quarter of a second, then reads it behind its own move
    ],
)
def test_what_is_not_there_is_waited_for_or_read(prefetch: str, delay_s: float, on_host: int) -> None:
    done = replay(LATER, 16, prefetch=prefetch, nvme_gb_s=1.0, lead_s=2.5, wait_s=0.25)
    assert done.tally.run_blocks == 3
    assert done.tally.host_blocks == on_host
    assert list(done.tally.delays_s)[:2] == [0.0, 0.0]
    assert done.tally.delays_s[2] == pytest.approx(delay_s, abs=0.51)


def test_a_codec_makes_room_below() -> None:
    trace = conversations(300)
    hits = [replay(trace, 60, codec, nvme_blocks=150).tally.run_blocks for codec in ("lossless", "k4v4")]
    assert hits[1] > 1.05 * hits[0]


def test_nothing_waits_where_nothing_is_admitted() -> None:
    """Sessions that were used once are not written, so the tier below holds fewer than it could."""
    trace = conversations(300)
    chosen = replay(trace, 150, write="write_through_selective", admission="second_use")
    every = replay(trace, 150)
    assert 0 < chosen.moved_nbytes()["to_nvme"] < 0.7 * every.moved_nbytes()["to_nvme"]


def test_a_channel_does_one_after_the_other() -> None:
    channel = Channel(10.0)
    assert [channel.takes(20, 0.0), channel.takes(10, 1.0), channel.takes(10, 9.0)] == [2.0, 3.0, 10.0]
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_the_command_shows_prefetch_beside_none(tmp_path: Path) -> None:
    path = write(conversations(60), tmp_path / "trace.jsonl")
    asked = ("--tiers", "40,400", "--policy", "default", "--prefetch", "best_effort,off")
    ran = replayed(str(path), *asked, "--json")
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(ran.stdout)["runs"]
    assert [row["tiers"]["prefetch"] for row in rows] == ["best_effort", "off"]
    assert all(row["capacity_blocks"] == 40 and row["tiers"]["nvme_blocks"] == 400 for row in rows)
    assert rows[0]["ready_on_start"] > rows[1]["ready_on_start"]
    assert all(row["wasted_prefetch_bytes"] >= 0 and row["start_delay_ms_p50"] >= 0 for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(MOONCAKE not in os.environ, reason=f"{MOONCAKE} names no trace file")
def test_nine_blocks_of_ten_of_the_published_trace_are_on_time() -> None:
    tiers = TierSetting(50_000, 12.0, 5.0, "best_effort", 1.0, "write_through", "always", 160 << 20)
    setting = {
        "policy": "default", "capacity_blocks": 5_860, "cold_codec": "lossless", "by": "request",
        "tiers": dataclasses.asdict(tiers),
    }  # fmt: skip
    row = run(os.environ[MOONCAKE], (0.0, 1.0), setting)
    assert row["ready_on_start"] >= 90.0
    assert row["block_hit"] >= 17.5

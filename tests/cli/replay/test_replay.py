"""`kvstrata replay`: the real core, driven by a trace, hits what it must; the JSON's shape is a contract."""

from __future__ import annotations

import json
import os
import random
import subprocess
from array import array
from pathlib import Path
from typing import Any

import pytest

from cli.replay.drive import Replay
from cli.replay.offline import belady, ideal
from cli.replay.plot import draw_svg
from cli.replay.runs import policy_of, run
from cli.replay.trace import BLOCK_TOKENS, Request, Trace, read_trace
from kvstore.errors import ConfigError
from kvstore.policies import POLICIES
from tests.serving import command

MOONCAKE = "KVSTRATA_TRACE_MOONCAKE"
ROW = {
    "policy", "capacity_blocks", "cold_codec", "by", "block_hit", "token_hit", "request_hit", "opt_block_hit",
    "perplexity_increase", "ready_on_start", "start_delay_ms_p50", "wasted_prefetch_bytes", "seconds",
    "cpu_seconds", "tiers",
}  # fmt: skip
# LRU, FIFO and LFU as others replay this trace, and an infinite cache; in percent of block accesses.
YARDSTICK = {"lru": 13.6, "fifo": 12.7, "lfu": 9.7}
YARDSTICK_BLOCKS = 5_860


def conversations(sessions: int, seed: int = 5) -> Trace:
    """Sessions that grow turn by turn behind one shared block; two of three end after their first turn."""
    random_ = random.Random(seed)
    requests: list[Request] = []
    fresh, at_s = 1, 0.0
    open_: list[list[int]] = []
    for _ in range(sessions):
        at_s += random_.random() * 20
        continues = bool(open_) and random_.random() < 0.5
        blocks = open_.pop(random_.randrange(len(open_))) if continues else [0]
        more = random_.randrange(2, 8)
        blocks = [*blocks, *range(fresh, fresh + more)]
        fresh += more
        requests.append(
            Request(at_s, len(blocks) * BLOCK_TOKENS - random_.randrange(500), array("q", blocks))
        )
        if continues or random_.random() < 0.33:
            open_.append(blocks)
    return Trace("conversations", tuple(requests))


def write(trace: Trace, path: Path) -> Path:
    lines = [
        json.dumps(
            {
                "timestamp": request.at_s * 1000,
                "input_length": request.input_tokens,
                "output_length": 1,
                "hash_ids": list(request.hash_ids),
            }
        )
        for request in trace.requests
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def lru_by_hand(trace: Trace, capacity: int) -> float:
    """The textbook's: an ordered dictionary of blocks."""
    order: dict[int, None] = {}
    hits = 0
    for request in trace.requests:
        for block in request.hash_ids:
            if block in order:
                hits += 1
                del order[block]
            elif len(order) >= capacity:
                del order[next(iter(order))]
            order[block] = None
    return hits / trace.blocks


def test_an_infinite_cache_is_what_the_core_does_with_room_for_all() -> None:
    trace = conversations(300)
    best = ideal(trace)
    tally = Replay(POLICIES["default"], trace.blocks, 1).run(trace)
    assert tally.run_blocks / tally.blocks == pytest.approx(best.block)
    assert tally.run_tokens / tally.tokens == pytest.approx(best.token)
    assert tally.run_shares / tally.requests == pytest.approx(best.request)
    assert belady(trace, trace.blocks) == pytest.approx(best.block)


@pytest.mark.parametrize(("capacity", "off"), [(5, 0.0), (9, 0.0), (50, 0.02), (400, 0.02)])
def test_lru_by_block_is_the_textbooks(capacity: int, off: float) -> None:
    """To the last hit where a piece is one block; larger pieces keep what they are about to use."""
    trace = conversations(300)
    tally = Replay(POLICIES["lru"], capacity, 1).run(trace, by_block=True)
    assert tally.resident_blocks / tally.blocks == pytest.approx(lru_by_hand(trace, capacity), abs=off)


@pytest.mark.parametrize("policy", ["default", "lru", "s3fifo", "arc", "fifo", "lfu", "gdsf"])
def test_no_policy_beats_the_one_that_knows_the_future(policy: str) -> None:
    trace = conversations(300)
    replay = Replay(policy_of(policy), 150, 1)
    tally = replay.run(trace)
    replay.core.check_integrity()
    assert 0.02 < tally.run_blocks / tally.blocks <= belady(trace, 150)


def test_the_default_is_better_than_lru_where_most_sessions_end_at_once() -> None:
    trace = conversations(1_500)
    default, lru = (Replay(POLICIES[name], 400, 1).run(trace).run_blocks for name in ("default", "lru"))
    assert default > lru


def test_a_codec_makes_room(tmp_path: Path) -> None:
    path = write(conversations(200), tmp_path / "trace.jsonl")
    hits = {}
    for codec in ("lossless", "int4-hadamard"):
        setting = {"policy": "default", "capacity_blocks": 60, "cold_codec": codec, "by": "request"}
        row = run(str(path), (0.0, 1.0), setting)
        assert set(row) == ROW
        hits[codec] = row["block_hit"]
    assert hits["int4-hadamard"] > hits["lossless"]


def replayed(*arguments: str) -> subprocess.CompletedProcess[str]:
    asked = command("replay", *arguments)
    return subprocess.run(asked, capture_output=True, text=True, timeout=100, check=False)


def test_the_command_prints_the_one_document_and_draws(tmp_path: Path) -> None:
    path, picture = write(conversations(60), tmp_path / "trace.jsonl"), tmp_path / "hits.svg"
    asked = ("--capacity", "20,200", "--policy", "lru,default", "--jobs", "2", "--plot", str(picture))
    ran = replayed(str(path), *asked, "--json")
    assert ran.returncode == 0, ran.stderr
    document: dict[str, Any] = json.loads(ran.stdout)
    assert set(document) == {"ideal", "runs"}
    assert set(document["ideal"]) == {"block", "token", "request"}
    named = [(row["policy"], row["capacity_blocks"], row["by"]) for row in document["runs"]]
    assert named == [
        ("lru", 20, "block"), ("default", 20, "request"), ("lru", 200, "block"), ("default", 200, "request"),
    ]  # fmt: skip
    assert all(set(row) == ROW for row in document["runs"])
    assert picture.read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policy", "clock"), "policy 'clock' is unknown"),
        (("--cold-codec", "zip"), "codec 'zip' is unknown"),
        (("--capacity", "0"), "holds nothing"),
        (("--plot", "hits.png"), "ends in .svg"),
        (("--tiers", "10,20", "--prefetch", "always"), "--prefetch 'always' is unknown"),
        (("--tiers", "10,20", "--by", "block"), "--by block is for caches of one tier"),
    ],
)
def test_a_wrong_option_is_one_line_that_says_what_to_do(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    ran = replayed(str(write(conversations(3), tmp_path / "trace.jsonl")), *arguments)
    assert ran.returncode == 1
    assert said in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "line",
    [
        "{", "{}", '{"timestamp": 0, "input_length": 512, "hash_ids": []}',
        '{"timestamp": 0, "input_length": 513, "hash_ids": [1]}',
        '{"timestamp": -1, "input_length": 512, "hash_ids": [1]}',
        '{"timestamp": 0, "input_length": 512, "hash_ids": [-1]}',
        '{"timestamp": 0, "input_length": 512, "hash_ids": ["a"]}',
    ],
)  # fmt: skip
def test_a_line_that_is_no_request_is_named(line: str, tmp_path: Path) -> None:
    good = '{"timestamp": 0, "input_length": 512, "hash_ids": [1]}\n'
    path = tmp_path / "trace.jsonl"
    path.write_text(good + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2"):
        read_trace(path)
    path.write_text(good.replace("0", "9", 1) + good, encoding="utf-8")
    with pytest.raises(ConfigError, match="sort the trace"):
        read_trace(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no request"):
        read_trace(path)


def test_points_over_perplexity_are_drawn(tmp_path: Path) -> None:
    rows = [
        {"policy": "lru", "capacity_blocks": 9, "cold_codec": codec, "block_hit": hit, "opt_block_hit": 40.0,
         "perplexity_increase": increase}
        for codec, hit, increase in (("lossless", 10.0, 0.0), ("int8", 20.0, 0.1), ("unmeasured", 30.0, None))
    ]  # fmt: skip
    draw_svg(tmp_path / "codecs.svg", ideal(conversations(3)), rows)
    drawn = (tmp_path / "codecs.svg").read_text(encoding="utf-8")
    assert "int8" in drawn
    assert "unmeasured" not in drawn


@pytest.mark.slow
@pytest.mark.skipif(MOONCAKE not in os.environ, reason=f"{MOONCAKE} names no trace file")
@pytest.mark.parametrize("policy", [*YARDSTICK, "default"])
def test_the_published_trace_hits_what_it_must(policy: str) -> None:
    path = os.environ[MOONCAKE]
    trace = read_trace(Path(path))
    assert round(100 * ideal(trace).block, 2) == 36.64
    by = "block" if policy in YARDSTICK else "request"
    setting = {"policy": policy, "capacity_blocks": YARDSTICK_BLOCKS, "cold_codec": "lossless", "by": by}
    hit = run(path, (0.0, 1.0), setting)["block_hit"]
    if policy == "default":
        assert hit >= 17.5
    else:
        assert hit == pytest.approx(YARDSTICK[policy], abs=0.1)

"""Runs of a trace, each in a process of its own: a setting in, a row of figures out.

`python -m cli.replay.runs` is such a process; it speaks in lines of JSON (cli/bench/jsonlines.py) and ends
with its standard input.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cli.bench.jsonlines import Child, answer
from cli.replay.baselines import BASELINES
from cli.replay.cold_codecs import PERPLEXITY_INCREASE, codec_named, encoded_nbytes
from cli.replay.drive import Replay, Tally
from cli.replay.offline import belady
from cli.replay.tiered import TieredReplay, TierSetting, TierTally, percentile
from cli.replay.trace import Trace, read_trace
from kvstore.core.seams import MakePolicy
from kvstore.errors import ConfigError
from kvstore.policies import POLICIES

RUN_S_MAX: Final = 3_600.0
BLOCK_NBYTES: Final = 1 << 20
"""Of an uncompressed block; only the ratio to a compressed one matters."""
FLAT: Final = frozenset(("lru", *BASELINES))
"""The classic policies: replayed as cache studies do, in the order of access and knowing no prefixes, unless
`--by` says otherwise."""
BY: Final = ("request", "block")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    policy: str
    capacity_blocks: int  # of the host, where there are tiers
    cold_codec: str
    by: str
    tiers: TierSetting | None = None

    def __post_init__(self) -> None:
        policy_of(self.policy)
        codec_named(self.cold_codec)
        if self.capacity_blocks < 1:
            raise ConfigError(f"a capacity of {self.capacity_blocks} blocks holds nothing: say 1 or more")
        if self.by not in BY:
            raise ConfigError(f"--by {self.by!r} is unknown: say request or block")
        if self.by == "block" and self.tiers is not None:
            raise ConfigError("--by block is for caches of one tier: leave out --tiers, or say --by request")


def policy_of(name: str) -> MakePolicy:
    """Raises ConfigError."""
    make = POLICIES.get(name) or BASELINES.get(name)
    if make is None:
        known = sorted({*POLICIES, *BASELINES})
        raise ConfigError(f"policy {name!r} is unknown: use one of {known}")
    return make


def settings(
    policies: Sequence[str],
    capacities: Sequence[int],
    codecs: Sequence[str],
    by: str | None,
    tiers: Sequence[TierSetting | None] = (),
) -> list[Setting]:
    """One of each, tiers outermost. Raises ConfigError."""
    return [
        Setting(
            policy, capacity, codec, by or ("block" if policy in FLAT and not below else "request"), below
        )
        for below, codec, capacity, policy in itertools.product(
            tiers or (None,), codecs, capacities, policies
        )
    ]


def run(path: str, part: Sequence[float], setting: Row) -> Row:
    """One run: the row of the report."""
    started, cpu = time.monotonic(), time.process_time()
    below = setting.get("tiers")
    of_run = Setting(**{**setting, "tiers": None if below is None else TierSetting(**below)})
    trace = read_trace(Path(path)).part(*part)
    row = _over_one_tier(of_run, trace) if of_run.tiers is None else _over_two(of_run, of_run.tiers, trace)
    return row | {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu}


def run_all(
    path: Path, part: Sequence[float], wanted: Sequence[Setting], jobs: int, done: Callable[[], None]
) -> list[Row]:
    """All runs, so many at once, in the order they were asked for. Raises ChildFailed."""
    with ThreadPoolExecutor(jobs) as pool:
        under_way = [pool.submit(_run_in_child, path, part, setting) for setting in wanted]
        for _ in _finished(under_way):
            done()
        return [future.result() for future in under_way]


def _finished(futures: Any) -> Iterator[None]:
    try:
        for future in as_completed(futures):
            future.result()
            yield
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _run_in_child(path: Path, part: Sequence[float], setting: Setting) -> Row:
    with Child.of_module("cli.replay.runs") as child:
        return child.ask(
            "run", RUN_S_MAX, path=str(path), part=list(part), setting=dataclasses.asdict(setting)
        )


def _over_one_tier(setting: Setting, trace: Trace) -> Row:
    budget = setting.capacity_blocks * BLOCK_NBYTES
    nbytes = encoded_nbytes(codec_named(setting.cold_codec), BLOCK_NBYTES)
    replay = Replay(policy_of(setting.policy), budget, nbytes)
    tally = replay.run(trace, by_block=setting.by == "block")
    replay.core.check_integrity()
    return _row(setting, tally, belady(trace, budget // nbytes))


def _over_two(setting: Setting, tiers: TierSetting, trace: Trace) -> Row:
    codec = codec_named(setting.cold_codec)
    below_nbytes = encoded_nbytes(codec, tiers.block_nbytes)
    replay = TieredReplay(policy_of(setting.policy), setting.capacity_blocks, tiers, codec, below_nbytes)
    tally = replay.run(trace)
    replay.core.check_integrity()
    held = setting.capacity_blocks + tiers.nvme_blocks * tiers.block_nbytes // below_nbytes
    found = max(1, tally.host_blocks + tally.nvme_blocks)
    return _row(setting, tally, belady(trace, held)) | {
        "ready_on_start": 100 * tally.host_blocks / found,
        "start_delay_ms_p50": 1e3 * percentile(tally.delays_s, 0.5),
        "wasted_prefetch_bytes": replay.wasted_nbytes(),
        "tiers": dataclasses.asdict(tiers) | _of_tiers(tally, replay),
    }


def _of_tiers(tally: TierTally, replay: TieredReplay) -> Row:
    return {
        "host_hit": 100 * tally.host_blocks / tally.blocks,
        "nvme_hit": 100 * tally.nvme_blocks / tally.blocks,
        "start_delay_ms_p99": 1e3 * percentile(tally.delays_s, 0.99),
        "start_delay_ms_mean": 1e3 * sum(tally.delays_s) / len(tally.delays_s),
        "moved_nbytes": replay.moved_nbytes(),
        "dropped_moves": replay.dropped_moves(),
    }


def _row(setting: Setting, tally: Tally, optimum: float) -> Row:
    found = tally.resident_blocks if setting.by == "block" else tally.run_blocks
    return {
        "policy": setting.policy,
        "capacity_blocks": setting.capacity_blocks,
        "cold_codec": setting.cold_codec,
        "by": setting.by,
        "block_hit": 100 * found / tally.blocks,
        "token_hit": 100 * tally.run_tokens / tally.tokens,
        "request_hit": 100 * tally.run_shares / tally.requests,
        "opt_block_hit": 100 * optimum,
        "perplexity_increase": PERPLEXITY_INCREASE[setting.cold_codec],
        "ready_on_start": None,  # of one tier all that is found is ready
        "start_delay_ms_p50": None,
        "wasted_prefetch_bytes": None,
        "tiers": None,
    }


if __name__ == "__main__":
    answer({"run": run})

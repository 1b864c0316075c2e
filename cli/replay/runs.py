"""Runs of a trace, each in a process of its own: a setting in, a row of figures out.

`python -m cli.replay.runs` is such a process; it speaks in lines of JSON (cli/bench/jsonlines.py) and ends
with its standard input.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cli.bench.jsonlines import Child, answer
from cli.replay.baselines import BASELINES
from cli.replay.codec_bits import LOSSLESS_BITS, of
from cli.replay.drive import Replay, Tally
from cli.replay.offline import belady
from cli.replay.trace import read_trace
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
    capacity_blocks: int
    cold_codec: str
    by: str

    def __post_init__(self) -> None:
        policy_of(self.policy)
        of(self.cold_codec)
        if self.capacity_blocks < 1:
            raise ConfigError(f"a capacity of {self.capacity_blocks} blocks holds nothing: say 1 or more")
        if self.by not in BY:
            raise ConfigError(f"--by {self.by!r} is unknown: say request or block")


def policy_of(name: str) -> MakePolicy:
    """Raises ConfigError."""
    make = POLICIES.get(name) or BASELINES.get(name)
    if make is None:
        known = sorted({*POLICIES, *BASELINES})
        raise ConfigError(f"policy {name!r} is unknown: use one of {known}")
    return make


def settings(
    policies: Sequence[str], capacities: Sequence[int], codecs: Sequence[str], by: str | None
) -> list[Setting]:
    """Raises ConfigError."""
    return [
        Setting(policy, capacity, codec, by or ("block" if policy in FLAT else "request"))
        for codec, capacity, policy in itertools.product(codecs, capacities, policies)
    ]


def run(path: str, part: Sequence[float], setting: Row) -> Row:
    """One run: the row of the report."""
    started, cpu = time.monotonic(), time.process_time()
    of_run = Setting(**setting)
    trace = read_trace(Path(path)).part(*part)
    budget = of_run.capacity_blocks * BLOCK_NBYTES
    encoded = of(of_run.cold_codec)
    nbytes = max(1, round(BLOCK_NBYTES * encoded.bits / LOSSLESS_BITS))
    replay = Replay(policy_of(of_run.policy), budget, nbytes)
    tally = replay.run(trace, by_block=of_run.by == "block")
    replay.core.check_integrity()
    optimum = belady(trace, budget // nbytes)
    spent = time.monotonic() - started, time.process_time() - cpu
    return _row(of_run, tally, optimum, encoded.perplexity_increase, spent)


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
    fields = {name: getattr(setting, name) for name in Setting.__slots__}
    with Child.of_module("cli.replay.runs") as child:
        return child.ask("run", RUN_S_MAX, path=str(path), part=list(part), setting=fields)


def _row(
    setting: Setting, tally: Tally, optimum: float, ppl: float | None, spent: tuple[float, float]
) -> Row:
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
        "perplexity_increase": ppl,
        "ready_on_start": None,  # of one tier all that is found is ready
        "start_delay_ms_p50": None,
        "wasted_prefetch_bytes": None,
        "seconds": spent[0],
        "cpu_seconds": spent[1],
    }


if __name__ == "__main__":
    answer({"run": run})

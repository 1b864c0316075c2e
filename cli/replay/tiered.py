"""A trace through the real core over two tiers: what moves takes its time, what waits for it is counted.

    known ----------------- lead_s -----------------> start ---- reads what lies below ----> written, let go
      |  announced (unless prefetch is off)             |  matched, pinned; wait_complete and timeout wait
      v                                                 v  before this for what was announced and is coming
    core.moves: one move a direction at a time, each as long as its bytes take at the disk's bandwidth

The trace's timestamps are when requests are known; each waits `lead_s` for its turn whatever happens. Which
blocks move, when, and who gives way is the core's own doing (ShardCore with Moves, admission, prediction);
simulated is only the disk: reads and writes each have its whole bandwidth, first come, first served. A block
that still lies below when its request starts is read from there, as sessions do, while the match has it
promoted as well: it is read twice, and both are counted.
"""

from __future__ import annotations

import heapq
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from cli.replay.drive import Reader, Tally, keys_of
from cli.replay.trace import Request, Trace
from kvstore.codecs import Codec
from kvstore.core.moves import Move
from kvstore.core.seams import MakePolicy
from kvstore.core.shard import ShardCore
from kvstore.core.state import (
    CoreConfig,
    CoreLimits,
    DemoteWhen,
    Encoding,
    Foresight,
    Matched,
    Tiering,
)
from kvstore.errors import ConfigError
from kvstore.nouns import BlockKey, Incarnation, Quality, ShardId, Tier
from kvstore.policies.admission import ADMISSIONS
from kvstore.policies.continuation import Continuation

PREFETCH: Final = ("best_effort", "wait_complete", "timeout", "off")
WRITE: Final = tuple(when.value for when in DemoteWhen)
_TICK_S: Final = 0.5  # as the driver's
_QUEUE_SHARE: Final = 0.25  # of the host: bytes that may wait for their move in either direction
_SPARE_SLOTS: Final = 1_024  # encoded versions on their way beside what they are made of
_UNJUDGED_S: Final = 600.0  # after the last request, until what nobody asked for is known to be wasted


@dataclass(frozen=True, slots=True)
class TierSetting:
    """What of a run is about its tiers."""

    nvme_blocks: int
    nvme_gb_s: float  # of 10^9 bytes, each way
    lead_s: float
    prefetch: str
    wait_s: float  # at most, under `timeout`
    write: str
    admission: str
    block_nbytes: int

    def __post_init__(self) -> None:
        for what, said, known in (
            ("prefetch", self.prefetch, PREFETCH),
            ("write", self.write, WRITE),
            ("admission", self.admission, sorted(ADMISSIONS)),
        ):
            if said not in known:
                raise ConfigError(f"--{what} {said!r} is unknown: use one of {list(known)}")
        if min(self.nvme_blocks, self.block_nbytes) < 1 or self.nvme_gb_s <= 0:
            raise ConfigError("an NVMe tier needs blocks, bytes in each and a bandwidth: say more than 0")
        if self.lead_s < 0 or self.wait_s < 0:
            raise ConfigError("--lead-s and --wait-s are times ahead: say 0 or more")


@dataclass(slots=True)
class TierTally(Tally):
    host_blocks: int = 0  # of matched runs, where their blocks lay when their requests started
    nvme_blocks: int = 0
    read_nbytes: int = 0  # from below, by requests that could not wait for the move
    delays_s: array[float] = field(default_factory=lambda: array("d"))  # one a request


class Channel:
    """One direction of the disk: what is asked for is done in turn."""

    def __init__(self, nbytes_s: float) -> None:
        self._nbytes_s = nbytes_s
        self._free_at_s = 0.0

    def takes(self, nbytes: int, now: float) -> float:
        """When so many bytes are through."""
        self._free_at_s = max(now, self._free_at_s) + nbytes / self._nbytes_s
        return self._free_at_s


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request between being known and its start."""

    number: int
    request: Request
    keys: list[BlockKey]
    due_s: float
    coming: deque[tuple[int, int]] = field(default_factory=deque)  # slots and generations, announced


class TieredReplay:
    """One shard with a host and an NVMe tier. `codec` is what the lower one keeps of lossless blocks."""

    def __init__(
        self,
        make_policy: MakePolicy,
        host_blocks: int,
        setting: TierSetting,
        codec: Codec,
        encoded_nbytes: int,
    ) -> None:
        nbytes = setting.block_nbytes
        encoding = Encoding(codec.quality, encoded_nbytes)
        cold_blocks = setting.nvme_blocks * nbytes // encoded_nbytes
        tiering = Tiering(
            setting.nvme_blocks * nbytes,
            DemoteWhen(setting.write),
            encode=None if codec.quality is Quality.LOSSLESS else lambda _: encoding,
            queue_nbytes_max=int(_QUEUE_SHARE * host_blocks * nbytes),
        )
        self._announces = setting.prefetch != "off"
        config = CoreConfig(
            ShardId("replay"),
            Incarnation(1),
            host_blocks * nbytes,
            CoreLimits(slots_max=host_blocks + cold_blocks + _SPARE_SLOTS, pause_s=float("inf")),
            tiering=tiering,
            foresight=Foresight() if self._announces else Foresight(share=0.0),
        )
        self.core = ShardCore(config, make_policy, Continuation, ADMISSIONS[setting.admission])
        self._reader = Reader(self.core, nbytes, codec.quality)
        self._setting = setting
        self._disk = {tier: Channel(setting.nvme_gb_s * 1e9) for tier in (Tier.HOST, Tier.NVME)}
        self._deeds: list[tuple[float, int, Callable[[float], None]]] = []
        self._named = 0  # deeds so far: of two at one moment the one named first comes first
        self._held_up: list[_Waiting] = []
        self.tally = TierTally()

    def run(self, trace: Trace) -> TierTally:
        """All requests, and what came of what was brought up for them."""
        for number, request in enumerate(trace.requests):
            waiting = _Waiting(number, request, [], request.at_s + self._setting.lead_s)
            self._at(request.at_s, lambda now, waiting=waiting: self._known(waiting, now))  # type: ignore[misc]
        tick_s = 0.0
        while self._deeds:
            now, _, deed = heapq.heappop(self._deeds)
            while tick_s < now:
                self._tick(tick_s)
                tick_s += _TICK_S
            deed(now)
            self._move(now)
        self._judge_the_rest(tick_s + _UNJUDGED_S)
        return self.tally

    def moved_nbytes(self) -> dict[str, int]:
        counters = self.core.counters
        return {
            "to_host": counters["moved_nbytes_to:host"],
            "to_nvme": counters["moved_nbytes_to:nvme"],
            "read_below": self.tally.read_nbytes,
        }

    def wasted_nbytes(self) -> int:
        """Of what was announced or predicted: gone again, or not asked for, or never let in."""
        return sum(self.core.counters[f"prefetch:{why}_wasted_nbytes"] for why in ("announced", "predicted"))

    def dropped_moves(self) -> dict[str, int]:
        """Blocks that were to move and did not: their queue was full, or nobody could give way."""
        names = (
            "promotions_dropped",
            "promotions_without_room",
            "demotions_dropped",
            "demotions_without_room",
        )
        return {name: self.core.counters[name] for name in names}

    # -- inside ------------------------------------------------------------------------------------

    def _at(self, when_s: float, deed: Callable[[float], None]) -> None:
        heapq.heappush(self._deeds, (when_s, self._named, deed))
        self._named += 1

    def _known(self, waiting: _Waiting, now: float) -> None:
        waiting.keys = keys_of(waiting.request.hash_ids)
        if self._announces:
            said = self.core.announce(self._reader.snapshot, waiting.keys)
            generations = self.core.index.versions.generations
            waiting.coming.extend((slot, generations[slot]) for slot in said.coming)
        self._at(waiting.due_s, lambda now: self._due(waiting))

    def _due(self, waiting: _Waiting) -> None:
        """Its turn: it starts, or waits for what is still coming."""
        prefetch = self._setting.prefetch
        if prefetch in ("best_effort", "off") or not self._is_coming(waiting):
            self._start(waiting, waiting.due_s)
            return
        self._held_up.append(waiting)
        if prefetch == "timeout":
            self._at(waiting.due_s + self._setting.wait_s, lambda now: self._waited(waiting, now))

    def _is_coming(self, waiting: _Waiting) -> bool:
        """Is anything of it still on its way?"""
        table, moves, coming = self.core.index.versions, self.core.moves, waiting.coming
        while coming and not (table.is_current(*coming[0]) and moves.is_coming(coming[0][0])):
            coming.popleft()
        return bool(coming)

    def _waited(self, waiting: _Waiting, now: float) -> None:
        """Its time is over, unless it went already."""
        if waiting in self._held_up:
            self._held_up.remove(waiting)
            self._start(waiting, now)

    def _start(self, waiting: _Waiting, now: float) -> None:
        tally, request = self.tally, waiting.request
        matched = self._reader.match(waiting.keys, now)
        below = [
            nbytes for nbytes, tier in zip(matched.nbytes, matched.tiers, strict=True) if tier == Tier.NVME
        ]
        tally.nvme_blocks += len(below)
        tally.host_blocks += len(matched.slots) - len(below)
        tally.read_nbytes += sum(below)
        began = self._disk[Tier.HOST].takes(sum(below), now) if below else now
        tally.delays_s.append(began - waiting.due_s)
        self._at(began, lambda now: self._computed(waiting, matched, now))
        tally.add(request, len(matched.slots), 0)

    def _computed(self, waiting: _Waiting, matched: Matched, now: float) -> None:
        """How long that takes is another matter: what it computed is published at once."""
        behind = self._reader.write(waiting.keys, matched, (waiting.number, 0), now)
        self.tally.resident_blocks += len(matched.slots) + behind

    def _move(self, now: float) -> None:
        """Start what is to move, one block a direction at a time; who waits for nothing more starts."""
        if self.core.moves.any_wanted():
            for move in self.core.moves.start(now, 1):
                done_at = self._disk[move.to].takes(move.target.nbytes, now)
                self._at(done_at, lambda now, move=move: self._moved(move))  # type: ignore[misc]
            self.core.index.freed.clear()
        for waiting in [w for w in self._held_up if not self._is_coming(w)]:
            self._waited(waiting, now)

    def _moved(self, move: Move) -> None:
        self.core.moves.done(move)
        self.core.index.freed.clear()

    def _tick(self, now: float) -> None:
        self.core.reap(now)
        self.core.look_ahead(now)
        self._move(now)

    def _judge_the_rest(self, now: float) -> None:
        while len(self.core.foreseen):
            self.core.look_ahead(now)


def percentile(values: Sequence[float], share: float) -> float:
    """The least of the values that so large a share of them do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]

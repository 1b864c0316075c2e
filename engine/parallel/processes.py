"""The processes of ranks 1 and on, seen from rank 0: started, given the same steps, ended together.

    start()     each is started, loads its share of the weights, and says that it has
    connect()   all meet for sums (group.py)
    step(), ask_for(), give()     commands, in one order for all ranks; a rank answers where it is asked

A rank that ends, fails or does not answer in time is the end of all of them, since what they computed last is
not whole: `lost` says which and why, every later call raises the same error, and no process is left. Nothing
outlives rank 0: however it ends, the others' links end with it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from engine.batch import Batch
from engine.errors import RanksLost
from engine.parallel.group import RankGroup
from engine.parallel.link import Bytes, Head, RankLink, checked, with_checksum
from engine.parallel.step import packed_step
from kvstore.errors import ConfigError
from kvstore.nouns import WeightsDigest

__all__ = ["RankProcesses", "RankStart"]

START_TIMEOUT_S: Final = 600.0
"""To load: as long as weights are read and products proved."""
END_S: Final = 5.0
_ENDED_S: Final = 0.5  # for a rank that broke off a sum to be seen to have ended


@dataclass(frozen=True, slots=True)
class RankStart:
    """All that a rank is told. `config` is an EngineConfig as JSON."""

    rank: int
    folder: str
    config: str
    n_slots: int
    max_model_len: int


class _Rank:
    """One process and this end of its link."""

    def __init__(self, start: RankStart, timeout_s: float) -> None:
        ours, theirs = socket.socketpair()
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "engine.parallel.rank", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | environment,
            )
        self.link = RankLink(ours, timeout_s)
        self._failure: str | None = None
        self.link.send({"command": "start", **asdict(start)})

    def receive(self, timeout_s: float) -> tuple[Head, memoryview]:
        """Its next message; one that says what went wrong is kept for `last_words`."""
        head, body = self.link.receive(timeout_s)
        if "error" in head:
            self._failure = f"failed: {head['error']}"
        return head, body

    def how_it_ended(self) -> str | None:
        """None: it has not."""
        try:
            code = self.process.wait(_ENDED_S)
        except subprocess.TimeoutExpired:
            return None
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def last_words(self) -> str | None:
        """What it says went wrong, if it says so."""
        try:
            while self._failure is None:
                self.receive(_ENDED_S)
        except RanksLost:
            return None
        return self._failure


class RankProcesses:
    """Rank 0's, of its engine's thread."""

    def __init__(self, starts: Sequence[RankStart], timeout_s: float) -> None:
        self.ranks = len(starts) + 1
        self.group = RankGroup(0, self.ranks, timeout_s)
        self._timeout_s = timeout_s
        self._lost: str | None = None
        self._others: list[_Rank] = []
        self._finalizer = weakref.finalize(self, _end, self._others, self.group, 0.0)
        try:
            for start in starts:
                self._others.append(_Rank(start, timeout_s))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Of ranks 1 and on."""
        return [rank.process.pid for rank in self._others]

    def connect(self, digest: WeightsDigest) -> None:
        """Wait until all have loaded these weights, then meet. Raises ConfigError for what the machine does
        not allow them, RanksLost."""
        for number, rank in enumerate(self._others, 1):
            head, _ = self._receive(number, START_TIMEOUT_S)
            if head.get("kind") == ConfigError.__name__:
                raise ConfigError(str(head["error"]))
            if head.get("digest") != digest:
                raise self.lost(f"rank {number} (pid {rank.process.pid}) has other weights than rank 0")
        with TemporaryDirectory(prefix="kvstrata-ranks-") as folder:
            meeting = Path(folder) / "rendezvous"
            self._tell({"command": "connect", "rendezvous": str(meeting)})
            try:
                self.group.connect(meeting)
            except RanksLost as error:
                raise self.lost(str(error)) from error

    def check(self) -> None:
        """Raises RanksLost when one has ended. From any thread."""
        ended = [rank.process.pid for rank in self._others if rank.process.poll() is not None]
        if self._lost is not None or ended:
            raise RanksLost(
                self._lost or f"the model's ranks of pids {ended} have ended: start the engine again"
            )

    def step(self, batch: Batch) -> None:
        """Let the others compute it, too. They do as this rank goes on to do."""
        self._tell(*packed_step(batch))

    def ask_for(self, slots: Sequence[int], tokens: int) -> None:
        """Of each slot its first tokens: `take_from` every rank next."""
        self._tell({"command": "read", "slots": list(slots), "tokens": tokens})

    def take_from(self, rank: int, nbytes: int) -> memoryview:
        """A rank's answer to `ask_for`, slot by slot."""
        head, body = self._receive(rank, self._timeout_s)
        if len(body) != nbytes:
            raise self.lost(f"rank {rank} answers {len(body)} bytes of KV, not {nbytes}")
        try:
            return checked(head, body)
        except RanksLost as error:
            raise self.lost(str(error)) from error

    def give(self, rank: int, slot: int, tokens: int, share: memoryview) -> None:
        """KV for a rank's slot."""
        head = with_checksum({"command": "write", "slot": slot, "tokens": tokens}, share)
        self._send(rank, head, share)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """A slot's first tokens into another, in every rank."""
        self._tell({"command": "copy", "source": source, "target": target, "tokens": tokens})

    def lost(self, why: str) -> RanksLost:
        """End all; the error to raise, from here on always."""
        if self._lost is None:
            told = [each for number in range(1, self.ranks) if (each := self._fate(number)) is not None]
            reason = "; ".join(told) or why
            self._lost = f"the model's {self.ranks} ranks cannot go on: {reason}. Start the engine again"
            self.close(0.0)
        return RanksLost(self._lost)

    def close(self, timeout_s: float = END_S) -> None:
        """End them: they have so long to do it themselves. Idempotent."""
        if self._lost is None:
            self._lost = "the engine was closed"
        if self._finalizer.detach() is not None:
            _end(self._others, self.group, timeout_s)

    def _fate(self, number: int) -> str | None:
        if number > len(self._others):
            return None
        rank = self._others[number - 1]
        what = rank.last_words() or rank.how_it_ended()
        return None if what is None else f"rank {number} (pid {rank.process.pid}) {what}"

    def _tell(self, head: Head, body: Bytes = b"") -> None:
        for number in range(1, self.ranks):
            self._send(number, head, body)

    def _send(self, number: int, head: Head, body: Bytes) -> None:
        if self._lost is not None:
            raise RanksLost(self._lost)
        try:
            self._others[number - 1].link.send(head, body)
        except RanksLost as error:
            raise self.lost(str(error)) from error

    def _receive(self, number: int, timeout_s: float) -> tuple[Head, memoryview]:
        if self._lost is not None:
            raise RanksLost(self._lost)
        try:
            head, body = self._others[number - 1].receive(timeout_s)
        except RanksLost as error:
            raise self.lost(str(error)) from error
        if "error" in head and head.get("kind") != ConfigError.__name__:
            raise self.lost("a rank failed")
        return head, body


def _end(others: list[_Rank], group: RankGroup, timeout_s: float) -> None:
    """Close the links, which tells them to end; kill who has not within `timeout_s`."""
    group.close()
    for rank in others:
        rank.link.close()
    for rank in others:
        try:
            rank.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()

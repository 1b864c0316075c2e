"""What the NVMe tier is told at start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvstore.errors import ConfigError
from kvstore.tiers.nvme.layout import BLOCK_NBYTES

SEGMENTS_MIN: Final = 8
"""Segments a directory must have room for: two open ones, one to reclaim into, and some to choose from."""


@dataclass(frozen=True, slots=True)
class NvmeConfig:
    directories: tuple[Path, ...]  # one a disk; the budget is shared among them equally
    disk_nbytes: int  # what all files together may take
    segment_nbytes: int = 256 << 20
    batch_nbytes: int = 16 << 20  # the most one write submits
    queue_nbytes_max: int = 64 << 20  # frames that wait to be written; beyond it `write` waits
    read_nbytes_max: int = 128 << 20  # reads in flight; beyond it `read` waits
    utilisation: float = 0.72  # of the budget, what live frames may fill: see reclaiming.py
    io_threads: int = 8
    write_wait_s: float = 10.0  # for room, before a write fails with ENOSPC
    direct: bool = True  # O_DIRECT where the file system takes it
    owner: str = ""  # the shard; directories of another one are refused. Empty: whoever opens them

    def __post_init__(self) -> None:
        if not self.directories:
            raise ConfigError("the nvme tier has no directory: name at least one")
        if len({path.absolute() for path in self.directories}) != len(self.directories):
            raise ConfigError("the nvme tier names a directory twice: name each disk once")
        if self.segment_nbytes % BLOCK_NBYTES or self.segment_nbytes < 8 * BLOCK_NBYTES:
            raise ConfigError(
                f"segment_nbytes must be a multiple of {BLOCK_NBYTES}, 8 times it at least: "
                f"{self.segment_nbytes} is not"
            )
        if self.directory_nbytes < SEGMENTS_MIN * self.segment_nbytes:
            raise ConfigError(
                f"disk_nbytes leaves {self.directory_nbytes} bytes a directory, and {SEGMENTS_MIN} segments "
                f"of {self.segment_nbytes} have to fit: raise it, or lower segment_nbytes"
            )
        if not 0.1 <= self.utilisation <= 0.9:
            raise ConfigError(f"utilisation must be 0.1 to 0.9, not {self.utilisation}")
        if min(self.batch_nbytes, self.queue_nbytes_max, self.read_nbytes_max, self.io_threads) < 1:
            raise ConfigError(
                "batch_nbytes, queue_nbytes_max, read_nbytes_max and io_threads must be positive"
            )
        if self.write_wait_s < 0:
            raise ConfigError("write_wait_s must not be negative")

    @property
    def directory_nbytes(self) -> int:
        return self.disk_nbytes // len(self.directories)

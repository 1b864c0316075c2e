"""Whether files are still those that this process, or one that it started, has read when it began.

A digest is made some time after vLLM has read its files, so it says what vLLM computes with only where
nothing was written in between. The times of change of inodes say so: unlike times of modification nobody can
set them, and copies that preserve times do not hide behind them. They are held against the start of the
process, which is before anything was read. Cost: two stats a file. A time that is later than now is of a
clock that was set back, and says nothing.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from kvstore.clock import wall_clock_seconds

__all__ = ["newer_than_process", "process_started_s"]

_STARTED_AT: Final = 19  # of the fields of /proc/self/stat behind the program's name


def newer_than_process(files: Iterable[Path]) -> Path | None:
    """The first that was written, replaced or pointed elsewhere since the process began. Raises OSError."""
    started_s, now_s = process_started_s(), wall_clock_seconds() + 1
    for file in files:
        changed = [(file, file.stat().st_ctime)]
        changed += [(each, each.lstat().st_ctime) for each in (file, *_links_to(file))]
        for each, changed_s in changed:
            if started_s < changed_s <= now_s:
                return each
    return None


@functools.cache
def process_started_s() -> float:
    """Wall-clock seconds, as files' times are; up to a second too early. Raises OSError without /proc."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[_STARTED_AT]) / os.sysconf("SC_CLK_TCK")
    return wall_clock_seconds() - age_s


def _links_to(file: Path) -> Iterator[Path]:
    """Folders on the way that are symbolic links: /models/current may be another version's by now."""
    return (folder for folder in file.absolute().parents if folder.is_symlink())

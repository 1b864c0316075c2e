"""Runs work that starts processes of its own, and sees to it that none of them outlives it. Linux only.

    kvstrata up  (the guardian: no threads, no Ray)
      |  fork
      +-- host   imports Ray, starts the cluster, serves
            +-- gcs_server, raylet -> workers ...

Both are child subreapers: what a descendant leaves behind becomes their child, so the tree below is all
there is to end, however deep and whatever state a Ctrl-C met it in. The guardian waits for signals without
handlers (blocked, taken by sigtimedwait), so no moment is wrong. The first signal ends everything; later
ones are ignored. Should the guardian itself be killed, the kernel signals the host (PR_SET_PDEATHSIG),
which then ends the tree.

Costs one fork. Fails with OSError where there is no prctl.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NoReturn

import psutil

__all__ = ["guarded"]

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_STOP_SIGNALS: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
_TMP: Final = Path("/tmp")  # noqa: S108  only mkdtemp writes there
_TICK_S: Final = 0.2
_TERMINATE_S: Final = 2.0
_SWEEP_S: Final = 20.0


def guarded(
    work: Callable[[Path], int], *, also_remove: Callable[[Path], Path], grace_s: float = 15.0
) -> int:
    """Run `work(workdir)` in a child process; its exit code, or 128 + the signal that ended us.

    `workdir` is a fresh private folder with a short path. `work` gets SIGTERM when it is to end, and has
    `grace_s` for it. When this returns, no process that it started is left, nor the folder, nor
    `also_remove(folder)`.
    """
    waited = _STOP_SIGNALS | {signal.SIGCHLD}
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    workdir = Path(tempfile.mkdtemp(prefix=f"kvs-{os.getpid()}-", dir=_short_tmp()))
    folders = (workdir, also_remove(workdir))
    try:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        host = _fork(work, folders, previous)
        code, caught = _watch(host, waited, grace_s)
        return code if caught is None else 128 + caught
    finally:
        _sweep()
        _remove(folders)
        # Signals that came meanwhile asked for what was just done.
        while signal.sigtimedwait(waited, 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _short_tmp() -> str:
    """The shortest there is: a folder deep in TMPDIR makes the paths of sockets too long."""
    return str(_TMP) if os.access(_TMP, os.W_OK) else tempfile.gettempdir()


def _fork(work: Callable[[Path], int], folders: tuple[Path, Path], mask: Iterable[int]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    guardian = os.getpid()
    pid = os.fork()
    if pid:
        return pid

    def leave(code: int) -> NoReturn:
        """No interpreter shutdown: threads of Ray may be anywhere, and nothing of ours is left to do."""
        if os.getppid() != guardian:  # it was killed: nobody else tidies up
            _sweep()
            _remove(folders)
        sys.stderr.flush()
        os._exit(code)

    code = 1
    try:
        os.setsid()  # the terminal's Ctrl-C is the guardian's to hear
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # should the guardian be killed, the tree hangs from here
        # Until the work installs its own way to end: the guardian ends what was started so far.
        signal.signal(signal.SIGTERM, lambda _signal, _frame: leave(128 + signal.SIGTERM))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = work(folders[0])
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        leave(code)


def _remove(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _watch(host: int, waited: frozenset[signal.Signals], grace_s: float) -> tuple[int, int | None]:
    """Wait for the host to end. (its exit code, the first signal that asked us to end it)."""
    caught: int | None = None
    deadline = float("inf")
    while True:
        info = signal.sigtimedwait(waited, _TICK_S)
        if info is not None and info.si_signo in _STOP_SIGNALS and caught is None:
            caught = info.si_signo
            deadline = time.monotonic() + grace_s
            print("\nending ...", file=sys.stderr, flush=True)
            os.kill(host, signal.SIGTERM)
        code = _reap(host)
        if code is not None:
            return code, caught
        if time.monotonic() > deadline:
            return 1, caught  # the sweep ends it


def _reap(host: int) -> int | None:
    """Collect whichever children ended; the host's exit code once it is among them."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == 0:
            return None
        if pid == host:
            return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1


def _sweep() -> None:
    """End every descendant: politely, then by force, until none is left. Bounded by _SWEEP_S."""
    began = time.monotonic()
    while time.monotonic() - began < _SWEEP_S:
        _reap(-1)
        left = psutil.Process().children(recursive=True)
        if not left:
            return
        polite = time.monotonic() - began < _TERMINATE_S
        for process in left:
            try:
                process.terminate() if polite else process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=_TICK_S)
    print("some processes did not end; `ps` shows them under this one", file=sys.stderr)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")

"""Promise of `up`: whatever it starts ends with it, however deep, detached or deaf to signals."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

START_S = 20.0
END_S = 30.0
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from cli.guardian import guarded

def also(workdir):
    return Path(sys.argv[1]) / workdir.name

def work(workdir):
    also(workdir).mkdir()
    (workdir / "file").touch()
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    popen = f"subprocess.Popen([sys.executable, '-c', {deaf!r}], start_new_session=True)"
    subprocess.run([sys.executable, "-c", "import subprocess, sys; " + popen], check=True)
    print(os.getpid(), workdir, flush=True)
    {body}

sys.exit(guarded(work, also_remove=also, grace_s=5.0))
"""


def begin(tmp_path: Path, body: str) -> tuple[subprocess.Popen[str], int, Path]:
    """The guardian, the host's pid and the work folder, once the work has started its daemons."""
    program = PROGRAM.replace("{body}", body)
    guardian = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert guardian.stdout is not None
    pid, workdir = guardian.stdout.readline().split()
    return guardian, int(pid), Path(workdir)


def assert_nothing_left(tmp_path: Path, below: list[psutil.Process], workdir: Path) -> None:
    assert [process for process in below if process.is_running()] == []
    assert not workdir.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("body", "code"), [("return 3", 3), ("raise RuntimeError", 1), ("os._exit(9)", 9)])
def test_the_works_end_is_the_end_of_what_it_left(tmp_path: Path, body: str, code: int) -> None:
    guardian, _, workdir = begin(tmp_path, body)
    below = psutil.Process(guardian.pid).children(recursive=True)
    assert guardian.wait(END_S) == code
    assert_nothing_left(tmp_path, below, workdir)
    guardian.communicate()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_and_a_second_one_changes_nothing(tmp_path: Path, sent: signal.Signals) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    guardian, _, workdir = begin(tmp_path, deaf)
    below = psutil.Process(guardian.pid).children(recursive=True)
    assert len(below) == 2
    assert len(below) == 2
    guardian.send_signal(sent)
    assert guardian.stderr is not None
    while guardian.stderr.readline() != "ending ...\n":
        pass
    guardian.send_signal(signal.SIGINT)
    guardian.send_signal(signal.SIGTERM)
    assert guardian.wait(END_S) == 128 + sent
    assert_nothing_left(tmp_path, below, workdir)
    guardian.communicate()


def test_the_work_may_end_in_its_own_way(tmp_path: Path) -> None:
    body = """
    def end(*_):
        print("ended well", flush=True)
        os._exit(0)
    signal.signal(signal.SIGTERM, end)
    print("waiting", flush=True)
    time.sleep(600)"""
    guardian, _, workdir = begin(tmp_path, body)
    assert guardian.stdout is not None
    assert guardian.stdout.readline() == "waiting\n"
    guardian.send_signal(signal.SIGINT)
    assert guardian.stdout.readline() == "ended well\n"
    assert guardian.wait(END_S) == 128 + signal.SIGINT
    assert_nothing_left(tmp_path, [], workdir)
    guardian.communicate()


def test_a_killed_guardian_takes_the_tree_with_it(tmp_path: Path) -> None:
    guardian, _, workdir = begin(tmp_path, "time.sleep(600)")
    below = psutil.Process(guardian.pid).children(recursive=True)
    try:
        guardian.kill()
        guardian.wait(END_S)
        _, alive = psutil.wait_procs(below, timeout=START_S)
        assert alive == []
        assert_nothing_left(tmp_path, below, workdir)
    finally:
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        guardian.communicate()

"""A real service for tests: `kvstrata up` as a user runs it, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

START_S = 120.0
END_S = 45.0
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Up:
    process: subprocess.Popen[str]
    url: str
    model: str

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = httpx.get(f"{self.url}/kvstrata/status", timeout=30).json()
        return document


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cli.main", *arguments]


def start(arguments: Sequence[str], stderr: IO[str] | int) -> subprocess.Popen[str]:
    """`kvstrata up` with its own idea of what to say on standard output."""
    return subprocess.Popen(
        command("up", *arguments), stdout=subprocess.PIPE, stderr=stderr, text=True, env=os.environ
    )


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Up]:
    """Up and serving; ended by SIGINT, as Ctrl-C does."""
    with tempfile.TemporaryFile("w+") as stderr:
        process = start(["--port", "0", "--json", *arguments], stderr)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                process.wait(END_S)
                stderr.seek(0)
                raise AssertionError(f"the service did not come up: {stderr.read()}")
            document = json.loads(line)
            yield Up(process, document["url"], document["model"])
        finally:
            end(process)


def end(process: subprocess.Popen[str]) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    code = process.wait(END_S)
    process.communicate()
    return code


def below(pid: int) -> list[psutil.Process]:
    """Every process under `pid`; [] once it has ended."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def folders(pid: int) -> list[Path]:
    """Work folders and shared memory of the private cluster of the command with this pid."""
    return [*Path("/tmp").glob(f"kvs-{pid}-*"), *SHARED_MEMORY.glob(f"kvstrata-kvs-{pid}-*")]

"""A real store for tests: `kvstrata store` as a user runs it, in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.serving import END_S, command


@dataclass
class RunningStore:
    process: subprocess.Popen[str]
    state: Path
    document: dict[str, Any]
    ended: int | None = field(default=None)

    @property
    def shards(self) -> list[dict[str, Any]]:
        shards: list[dict[str, Any]] = self.document["shards"]
        return shards

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {"KVSTRATA_STATE": str(self.state)}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another kvstrata command of the same user."""
        return subprocess.run(
            command(*arguments), capture_output=True, text=True, timeout=60, check=False, env=self.env
        )

    def status(self) -> list[dict[str, Any]]:
        """The shards' rows of `kvstrata status --store default --json`."""
        done = self.run("status", "--store", "default", "--json")
        assert done.returncode in (0, 1), done.stderr
        rows: list[dict[str, Any]] = json.loads(done.stdout)["shards"]
        return rows

    def end(self, *signals: signal.Signals) -> int:
        """Its exit code after these signals."""
        for sent in signals:
            self.process.send_signal(sent)
        return self.process.wait(END_S)


@contextlib.contextmanager
def running_store(state: Path, *arguments: str) -> Iterator[RunningStore]:
    """Serving on free ports; ended by SIGINT, as Ctrl-C does, and nothing of it is left."""
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            command("store", "--port", "0", "--json", *arguments),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"KVSTRATA_STATE": str(state)},
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                process.wait(END_S)
                stderr.seek(0)
                raise AssertionError(f"the store did not come up: {stderr.read()}")
            yield RunningStore(process, state, json.loads(line))
        finally:
            below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            try:
                process.wait(END_S)
            finally:
                process.kill()
                process.communicate()
                for left in below:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        left.kill()

"""Processes of the bench: one JSON line asks, one answers. Plain values only, every wait bounded.

The child's standard output is kept for answers: whatever a library prints there goes to standard error,
whose tail is part of the message when the child fails. A child ends when its standard input does, so none
outlives the bench however that ends. Standard library only: peers use it in an environment of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, Final

END_S: Final = 10.0
_STDERR_TAIL: Final = 400


class ChildFailed(Exception):
    """A process of the bench died, broke off, did not answer in time, or said that it could not."""


class Child:
    """`python -m module`, or any command that speaks as `answer` does."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the child
        self._buffer = b""
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **(env or {})},
        )

    @classmethod
    def of_module(cls, module: str) -> Child:
        """A module of ours in this interpreter, which finds what this process finds."""
        paths = os.pathsep.join(path for path in sys.path if path)
        return cls(module, [sys.executable, "-m", module], {"PYTHONPATH": paths})

    def ask(self, what: str, timeout_s: float, **fields: object) -> dict[str, Any]:
        """Send one line and wait for its answer. Raises ChildFailed."""
        line = json.dumps({"ask": what, **fields}).encode() + b"\n"
        pipe = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(line)
            pipe.flush()
            answer: dict[str, Any] = json.loads(self._line(timeout_s))
        except (OSError, ValueError) as error:
            raise ChildFailed(f"{self.name} broke off: {error}{self._tail()}") from None
        if "failed" in answer:
            raise ChildFailed(f"{self.name}: {answer['failed']}{self._tail()}")
        return answer

    def close(self) -> None:
        """Let it end by itself, or make it."""
        pipe = self._process.stdin
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        out, deadline = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise OSError(f"no answer within {timeout_s:.0f} s")
            piece = os.read(out, 1 << 16)
            if not piece:
                raise OSError("it ended")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _tail(self) -> str:
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()
        return f" (its last words: {said[-_STDERR_TAIL:]})" if said else ""


@contextlib.contextmanager
def private_output() -> Iterator[IO[str]]:
    """Standard output for answers alone; from here on what anybody prints goes to standard error."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        yield out


def put(out: IO[str], answer: Mapping[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()


def answer(handlers: Mapping[str, Callable[..., Mapping[str, Any]]]) -> None:
    """The child's side: answer line after line until standard input ends."""
    with private_output() as out:
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                put(out, handlers[asked.pop("ask")](**asked))
            except Exception as error:  # whatever it is, whoever asked must hear of it
                put(out, {"failed": f"{type(error).__name__}: {error}"})

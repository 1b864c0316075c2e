"""vLLM's OpenAI server, and the proxy of examples/vllm_pd, as a user starts them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, Final

import httpx

from cli.bench.peers.vllm_environment import vllm_folder
from tests.vllm.engines import REPO, environment

END_S: Final = 30.0
START_S: Final = 180.0
PROXY: Final = REPO / "examples/vllm_pd/proxy.py"


@contextlib.contextmanager
def vllm_server(folder: Path, transfer: Mapping[str, Any]) -> Iterator[str]:
    """Its URL once it answers."""
    port = free_port()
    command = [
        str(vllm_folder() / "bin/python"), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(folder), "--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1",
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8",
        "--kv-transfer-config", json.dumps(transfer),
    ]  # fmt: skip
    with _running(command, environment(), f"http://127.0.0.1:{port}", "/health") as url:
        yield url


@contextlib.contextmanager
def proxy(prefill: str, decode: str) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, str(PROXY), "--prefill", prefill, "--decode", decode, "--port", str(port)]
    with _running(command, {}, f"http://127.0.0.1:{port}", "/v1/models") as url:
        yield url


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port: int = chosen.getsockname()[1]
        return port


def _answers(process: subprocess.Popen[bytes], url: str) -> bool:
    """False: it ended, or START_S have passed."""
    deadline = monotonic() + START_S
    while monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(url, timeout=END_S).is_success
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
            return False
    return False


@contextlib.contextmanager
def _running(command: Sequence[str], env: Mapping[str, str], url: str, path: str) -> Iterator[str]:
    """Ended by SIGINT, as Ctrl-C does; killed with all it started where that does not do."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env={**os.environ, **env}, start_new_session=True
        )
        try:
            if not _answers(process, f"{url}{path}"):
                said.seek(0)
                raise AssertionError(f"{command[:3]} does not serve: {said.read()[-4000:]}")
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(END_S)
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(END_S)

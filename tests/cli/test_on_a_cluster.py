"""Promise of `up --address auto`: the service stays in the cluster until `down`; both show Ray its token."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.serving import below, command
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.serving, pytest.mark.timeout(180)]

START_S = 60.0
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """A running head that asks for the token in its user's home. The environment of that user."""
    home = Path(tempfile.mkdtemp(prefix="kvs-ray-", dir="/tmp"))  # short: a socket's path has 107 bytes
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("ab" * 32)
    make_tiny_model(home / "tiny")
    ports = free_ports(3)
    address = f"127.0.0.2:{ports[0]}"
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {
        "HOME": str(home),
        "RAY_ADDRESS": address,
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    process = start_head(home, ports, env)
    try:
        assert process.stdout is not None
        said = []
        while "--block" not in (line := process.stdout.readline()):
            said.append(line)
            assert line, "".join(said)
        yield env
    finally:
        ended = below(process.pid)
        for each in [*ended, psutil.Process(process.pid)]:
            each.kill()
        process.communicate()
        psutil.wait_procs(ended, 10)
        shutil.rmtree(home)


def start_head(home: Path, ports: list[int], env: dict[str, str]) -> subprocess.Popen[str]:
    options = {
        "port": ports[0],
        "ray-client-server-port": ports[1],
        "dashboard-agent-listen-port": ports[2],
        "temp-dir": home / "ray",
        "node-ip-address": "127.0.0.2",
        "num-cpus": 2,
        "include-dashboard": "false",
        "object-store-memory": 100 << 20,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return subprocess.Popen(
        [RAY, "start", "--head", "--block", *arguments],
        env={**env, "RAY_ADDRESS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.2", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def run(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=START_S, check=False, env=env
    )


def test_it_stays_until_down(head: dict[str, str]) -> None:
    up = ("up", "--address", "auto", "--model", f"{head['HOME']}/tiny", "--shards", "1", "--port", "0")
    began = run(head, *up, "--json")
    assert began.returncode == 0, began.stderr
    url = json.loads(began.stdout)["url"]
    again = run(head, *up)
    assert (again.returncode, again.stdout) == (1, "")
    assert "a service runs in this cluster already: end it first with `kvstrata down`" in again.stderr
    status = run(head, "status", "--url", url, "--json")
    assert status.returncode == 0
    assert json.loads(status.stdout)["ready"]
    for was_there in (True, False):
        ended = run(head, "down", "--json", "--drain", "0")
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout) == {"ended": was_there}
    assert run(head, "status", "--url", url).returncode == 1


def test_the_wrong_token_is_told(head: dict[str, str]) -> None:
    refused = run(head | {"RAY_AUTH_TOKEN": "cd" * 32}, "down")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith(
        f"error: the Ray cluster at {head['RAY_ADDRESS']} does not let this process in"
    )


def test_down_is_not_for_a_local_service() -> None:
    refused = run(dict(os.environ), "down", "--address", "local")
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: a local service ends with Ctrl-C where it runs; `down` is for clusters: auto or host:port\n"
    )

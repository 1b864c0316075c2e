"""Promise of `up`: what is wrong is told before anything starts; it ends without a trace at any moment."""

from __future__ import annotations

import importlib.metadata
import json
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import httpx
import pytest

from tests.serving import END_S, below, command, end, folders, running, start
from tests.tiny_model import make_tiny_model

SMALL = ("--shards", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(folder)
    return str(folder)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, check=False)


def test_help_names_every_command() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    for name in ("up", "down", "chat", "status", "demo", "model"):
        assert f" {name} " in shown.stdout


def test_the_version_is_the_packages() -> None:
    shown = run("--version")
    assert shown.returncode == 0
    assert shown.stdout == f"kvstrata {importlib.metadata.version('kvstrata')}\n"


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("up", "--prefill", "0").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (("up", "--host", "0.0.0.0"), "--insecure"),
        (("up", "nowhere.toml"), "give the path of a TOML file"),
        (("up", "."), "give the path of a TOML file"),
        (("status", "--url", "http://127.0.0.1:9"), "kvstrata up"),
        (("status", "--json", "--url", "localhost:9"), "write http://localhost:9"),
        (("chat", "--url", "http://127.0.0.1:9"), "kvstrata up"),
        (("model", "pull", "nope"), "smollm2-135m"),
    ],
)
def test_an_error_is_one_line_with_its_cure(arguments: tuple[str, ...], cure: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert cure in line


def test_a_taken_port_is_told_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("up", "--port", port)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: port {port} is taken: stop what listens there or choose another with --port\n"
    )


@pytest.mark.serving
def test_a_missing_model_is_told() -> None:
    done = run("up", "--port", "0", "--model", "/nowhere/model")
    assert done.returncode == 1
    assert "there is no model '/nowhere/model'" in done.stderr


@pytest.mark.serving
@pytest.mark.timeout(180)
def test_it_serves_says_so_in_json_and_ends_without_a_trace(tiny: str) -> None:
    with running("--model", tiny, *SMALL) as up:
        processes = below(up.process.pid)
        assert len(processes) > 5
        assert len(folders(up.process.pid)) == 2
        assert httpx.get(f"{up.url}/health").status_code == 200
        port = int(up.url.rpartition(":")[2])
        second = run("up", "--port", str(port))
        assert "is taken" in second.stderr
        assert run("status", "--url", up.url, "--json").returncode == 0
        name = f"up-{up.url.rpartition(':')[2]}"
        shards = json.loads(run("status", "--store", name, "--json").stdout)["shards"]
        assert {shard["state"] for shard in shards} == {"running"}
        purged = run("purge", "--store", name, "--model", "nobody", "--yes", "--json")
        assert purged.returncode == 1, "the admin's port answered, and no such model is there"
        assert "nobody" in purged.stderr
    assert [process for process in processes if process.is_running()] == []
    assert folders(up.process.pid) == []
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.serving
@pytest.mark.timeout(180)
@pytest.mark.parametrize("after", ["starting shard", "shard-0 is up"])
@pytest.mark.parametrize("sent", [signal.SIGINT])
def test_ctrl_c_at_any_moment_leaves_nothing(tiny: str, after: str, sent: signal.Signals) -> None:
    process = start(["--port", "0", "--model", tiny, *SMALL], subprocess.PIPE)
    assert process.stderr is not None
    try:
        while not (line := process.stderr.readline()).startswith(after):
            assert line, "it ended before"
        processes = below(process.pid)
        process.send_signal(sent)
        code = process.wait(END_S)
    finally:
        end(process)
    assert code == 128 + sent
    assert [process for process in processes if process.is_running()] == []
    assert folders(process.pid) == []


@pytest.mark.serving
@pytest.mark.timeout(120)
@pytest.mark.parametrize("delay_s", [0.3, 1.5])
def test_ctrl_c_while_ray_starts_leaves_nothing(tiny: str, delay_s: float) -> None:
    with tempfile.TemporaryFile("w+") as stderr:
        process = start(["--port", "0", "--model", tiny, *SMALL], stderr)
        try:
            process.wait(delay_s)
        except subprocess.TimeoutExpired:
            processes = below(process.pid)
        code = end(process)
    assert code != 0
    assert [process for process in processes if process.is_running()] == []
    assert folders(process.pid) == []


def test_model_list_is_one_json_document(tmp_path: Path) -> None:
    done = run("model", "list", "--json")
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert '"smollm2-135m"' in done.stdout

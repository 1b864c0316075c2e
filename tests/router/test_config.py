"""One file configures all; flags win; what exposes the service must be said aloud."""

from __future__ import annotations

import errno
import re
import socket
from pathlib import Path

import pytest

from kvstore.config import load_config
from kvstore.errors import ConfigError
from router.config import RouterConfig, ServiceConfig, check_exposure, served_name
from router.listener import end_unread, listen


def test_defaults_need_no_file() -> None:
    config = load_config(ServiceConfig, None, env={})
    assert (config.model, config.router.host, config.router.port) == ("smollm2-135m", "127.0.0.1", 8000)


def test_a_chat_that_does_not_say_ends_after_a_thousand_tokens() -> None:
    assert RouterConfig().max_tokens_default == 1024


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    path = tmp_path / "kvstrata.toml"
    path.write_text("[router]\nport = 1\n[prefill]\nworkers = 2\n[decode]\nworkers = 2\n")
    env = {"KVSTRATA_PREFILL__WORKERS": "3", "KVSTRATA_DECODE__WORKERS": "3"}
    config = load_config(ServiceConfig, path, {"decode.workers": 4, "router.host": None}, env)
    assert (config.router.port, config.prefill.workers, config.decode.workers) == (1, 3, 4)


@pytest.mark.parametrize("text", ["[router]\nprot = 1\n", "[rooter]\nport = 1\n"])
def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kvstrata.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"did you mean (port|router)"):
        load_config(ServiceConfig, path, env={})


def test_listening_beyond_loopback_must_be_said() -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        check_exposure(RouterConfig(host="0.0.0.0"))
    check_exposure(RouterConfig(host="0.0.0.0", insecure=True))


def test_a_taken_port_names_the_cure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} is taken.*--port"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("203.0.113.7", 0, "203.0.113.7 is no address of this machine: choose another with --host"),
        ("example.invalid", 0, "example.invalid is no address, nor a known name: choose another with --host"),
        ("a..b", 0, "a..b is no address, nor a known name: choose another with --host"),
        ("127.0.0.1", 1, r"cannot listen on 127.0.0.1:1 \(Permission denied\): choose another with"),
    ],
)
def test_why_it_cannot_listen_is_told_in_one_sentence(
    host: str, port: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if port:  # root may
        monkeypatch.setattr(socket, "create_server", denied)
    with pytest.raises(ConfigError) as error:
        listen(host, port)
    assert re.fullmatch(says + ".*", str(error.value))


def denied(*_args: object, **_options: object) -> socket.socket:
    raise PermissionError(errno.EACCES, "in words of its own (while attempting to bind on address)")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel has no such option")
def test_the_kernel_ends_a_connection_that_nobody_reads() -> None:
    with listen("127.0.0.1", 0) as listener:
        end_unread(listener, 0.2)
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            accepted.settimeout(10)
            with accepted, pytest.raises(TimeoutError) as caught:
                accepted.sendall(bytes(32 << 20))
            assert caught.value.errno == errno.ETIMEDOUT  # the kernel's, not the test's bound


def test_the_api_key_never_shows() -> None:
    config = load_config(ServiceConfig, None, {"router.api_key": "open sesame"}, {})
    assert "open sesame" not in repr(config)


def test_the_model_is_served_under_the_last_part_of_its_path() -> None:
    assert served_name(ServiceConfig(model="/models/tiny/")) == "tiny"
    assert served_name(ServiceConfig(router=RouterConfig(served_model_name="x"))) == "x"

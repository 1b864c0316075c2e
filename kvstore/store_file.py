"""What a store without Ray leaves on disk for its own user: who it is, where it listens, what it asks for.

    ~/.local/state/kvstrata/stores/NAME/     below $KVSTRATA_STATE or $XDG_STATE_HOME/kvstrata, where set
        secret       0600   keys every namespace id: it never leaves the shards
        token        0600   what clients show: the trusted role
        store.json   0600   shards, addresses, process ids; written when it serves, and when one comes back
        lock                held while the store runs

All of one user; others can neither read nor write there. A file that others can read is refused, as ssh does.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from kvstore.errors import ConfigError, Unavailable
from kvstore.nouns import ShardId
from kvstore.tls import ClientTls
from kvstore.topology import ShardEntry, Topology

SECRET_NBYTES: Final = 32
FILE_VERSION: Final = 1
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class ShardPlace:
    shard: str
    address: str
    admin: str
    pid: int


@dataclass(frozen=True, slots=True)
class StoreFile:
    """`store.json`: all a client of the same user needs."""

    name: str
    shards: tuple[ShardPlace, ...]
    token_file: str
    tls: dict[str, str] | None = None  # a client's PEM files: ca, and cert and key with mTLS

    def topology(self, *, admin: bool = False) -> Topology:
        """The shards by the addresses of everybody's calls, or of the admin's."""
        return Topology(
            1, tuple(ShardEntry(ShardId(s.shard), s.admin if admin else s.address) for s in self.shards)
        )

    def token(self) -> str:
        return read_private(Path(self.token_file)).decode().strip()

    def client_tls(self) -> ClientTls | None:
        """None where the shards do without TLS."""
        return None if self.tls is None else ClientTls(**{name: Path(p) for name, p in self.tls.items()})

    def write(self, path: Path) -> None:
        document = {"version": FILE_VERSION, **asdict(self)}
        write_private(path, json.dumps(document, indent=2).encode() + b"\n")

    @classmethod
    def read(cls, path: Path) -> StoreFile:
        """Raises Unavailable where there is none, ConfigError for what is no such file."""
        try:
            document: dict[str, Any] = json.loads(path.read_bytes())
            if document.pop("version") != FILE_VERSION:
                raise ConfigError(f"{path} was written by another version of kvstrata: start the store again")
            shards = tuple(ShardPlace(**shard) for shard in document.pop("shards"))
            return cls(shards=shards, **document)
        except FileNotFoundError:
            raise Unavailable(
                f"no store runs here by that name ({path} is missing): start one with `kvstrata store`, or "
                "give a running one's address"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path} is no store's file ({error}): give one that kvstrata wrote") from None


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """Where the store of that name keeps its files."""

    path: Path

    @classmethod
    def of(cls, name: str) -> StoreFolder:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is no name of a store: at most 64 letters, digits, '-', '_', '.'")
        return cls(state_root() / "stores" / name)

    @property
    def file(self) -> Path:
        return self.path / "store.json"

    def secret(self) -> bytes:
        """The cluster's secret, made the first time."""
        return secret_in(self.path / "secret")

    def token_file(self) -> Path:
        """The file with the token, made the first time."""
        kept(self.path / "token", secrets.token_urlsafe(SECRET_NBYTES))
        return self.path / "token"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Held while the store runs. Raises ConfigError when one of that name does already."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.path / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"a store named {self.path.name} runs already: end it with Ctrl-C where it runs, or give "
                    "this one another name with --name"
                ) from None
            try:
                yield
            finally:
                self.file.unlink(missing_ok=True)


def state_root() -> Path:
    chosen = os.environ.get("KVSTRATA_STATE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "kvstrata"


def secret_in(path: Path) -> bytes:
    """The cluster's secret in a file, made if it is not there. Raises ConfigError."""
    return kept(path, secrets.token_hex(SECRET_NBYTES))


def kept(path: Path, fresh: str) -> bytes:
    """What the private file holds; `fresh` from now on, where there is none."""
    if not path.exists():
        try:
            write_private(path, fresh.encode() + b"\n")
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be made: {error.strerror}. Give a path that can be written"
            ) from None
    return read_private(path).strip()


def read_private(path: Path) -> bytes:
    """Raises ConfigError for a file that is missing, empty, or that others can read."""
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give a file that you can read") from None
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        raise ConfigError(f"{path} can be read by others: chmod 600 {path}")
    if not data.strip():
        raise ConfigError(f"{path} is empty: remove it, or write what it should hold")
    return data


def write_private(path: Path, data: bytes) -> None:
    """Whole or not at all, and readable by its owner alone from the first moment."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

"""PEM files of a peer, and the credentials gRPC makes of them.

With mTLS a client's certificate says who it is: `peer_names` reads the names that gRPC verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvstore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a shard. With `ca`, a client must show a certificate that it signed (mTLS)."""

    cert: Path
    key: Path
    ca: Path | None = None

    def server_credentials(self) -> grpc.ServerCredentials:
        """Raises ConfigError for a file that cannot be read."""
        pair = (_pem(self.key), _pem(self.cert))
        root = _pem(self.ca) if self.ca else None
        return grpc.ssl_server_credentials([pair], root, require_client_auth=root is not None)


@dataclass(frozen=True, slots=True)
class ClientTls:
    """PEM files of a client. `ca` signed the shards' certificates (None: the system's roots); `cert` and
    `key` are its own, where shards ask for one."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ConfigError("a client's certificate needs its key, and the key its certificate: give both")

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Raises ConfigError for a file that cannot be read."""
        root, key, cert = (_pem(path) if path else None for path in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(root, key, cert)


def peer_names(auth_context: Mapping[str, Sequence[bytes]]) -> frozenset[str]:
    """Common name and alternative names of the client certificate that the handshake verified."""
    shown = (
        *auth_context.get("x509_common_name", ()),
        *auth_context.get("x509_subject_alternative_name", ()),
    )
    return frozenset(name.decode("utf-8", "replace") for name in shown)


def _pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give the path of a PEM file") from None

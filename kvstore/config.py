"""Settings: one TOML file, environment variables over it, command-line flags over both.

    # kvstrata.toml                 KVSTRATA_STORE__SHARDS=4 kvstrata up kvstrata.toml --prefill 2
    [store]
    capacity_nbytes = 4_294_967_296

A section is a frozen pydantic model owned by the room it configures; the service's file is the model that
holds them all (router/config.py). Unknown keys are refused, with the nearest known one in the message.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from kvstore.access import Tenant
from kvstore.core.state import CoreLimits, Tiering
from kvstore.driver_config import DriverConfig
from kvstore.errors import ConfigError
from kvstore.nouns import Quality, ShardId
from kvstore.nvme_section import NvmeSection
from kvstore.policies import POLICIES
from kvstore.server import ServerConfig, is_loopback
from kvstore.store_file import secret_in
from kvstore.tiers.arena import SLOTS_MAX
from kvstore.tls import ClientTls, TlsFiles

ENV_PREFIX: Final = "KVSTRATA_"
_NESTED: Final = "__"
_KINDS: Final = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
}
"""What a value should have been, by pydantic's name of the error."""

Model = TypeVar("Model", bound=BaseModel)


class TenantConfig(BaseModel):
    """`[store.tenants.NAME]`: one tenant that calls the shards itself, not through the service's router."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: SecretStr | None = Field(None, description="What it shows as a bearer token")
    token_file: Path | None = Field(None, description="The same, in a file on the shards' machine")
    certificate: str | None = Field(
        None, description="Common or alternative name of its client certificate, with store.tls_ca (mTLS)"
    )
    quota_nbytes: int | None = Field(None, ge=0, description="Bytes it may hold on each shard. None: all")
    may_bind_epochs: bool = Field(
        False, description="Allow it to bind epoch numbers of models, which counts for all tenants"
    )

    def tenant(self, name: str) -> Tenant:
        """Raises ConfigError for a token file that cannot be read or is empty."""
        token = self.token.get_secret_value() if self.token else None
        if self.token_file is not None:
            token = _token_in(self.token_file)
        return Tenant(name, token, self.certificate, self.may_bind_epochs)


class StoreConfig(BaseModel):
    """The `[store]` section: every shard of the service is started from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: int = Field(2, ge=1, le=1024, description="Home shards the service starts")
    resources: dict[str, float] = Field(
        default_factory=dict, description="Custom Ray resources each shard takes: binds shards to nodes"
    )
    capacity_nbytes: int = Field(1 << 30, ge=1 << 20, description="Host memory for frames, a shard")
    policy: str = Field("default", description="Replacement policy, by name; `default` is `hazard`")
    nvme: NvmeSection | None = Field(None, description="The tier below host memory. None: there is none")
    secret: SecretStr | None = Field(
        None, min_length=16, description="What keys namespace ids, where it comes from the environment"
    )
    secret_file: Path | None = Field(
        None,
        description="File with the secret that keys namespace ids; made if it is not there. Blocks on disk "
        "are found again under the same secret only. None: `secret` in the first of nvme.directories",
    )
    host: str = Field(
        "127.0.0.1", description="Address shards listen on; beyond loopback only with TLS or insecure"
    )
    port: int = Field(
        7400,
        ge=0,
        le=65535,
        description="For `kvstrata store`: the first shard's port, the next ones take the next. 0: free "
        "ones, as always on Ray",
    )
    insecure: bool = Field(False, description="Allow a listener beyond loopback without TLS")
    tls_cert: Path | None = Field(None, description="PEM certificate of the shards")
    tls_key: Path | None = Field(None, description="PEM key of the shards")
    tls_ca: Path | None = Field(None, description="PEM root that clients' certificates must come from (mTLS)")
    client_ca: Path | None = Field(
        None, description="PEM root that clients expect the shards' certificates of. None: the system's"
    )
    client_cert: Path | None = Field(None, description="PEM certificate clients show (mTLS)")
    client_key: Path | None = Field(None, description="PEM key of that certificate")
    admin_host: str = Field(
        "127.0.0.1", description="Address shards take admins' calls on; beyond loopback as for host"
    )
    admin_port: int = Field(0, ge=0, le=65535, description="Port for admins' calls. 0: one that is free")
    tenants: dict[str, TenantConfig] = Field(
        default_factory=dict, description="Tenants that call the shards themselves, by name"
    )
    concurrent_calls_max: int = Field(256, ge=1, description="Calls a shard works on at once")
    pipelines_max: int = Field(256, ge=1, description="Clients with control calls under way, a shard")
    watches_max: int = Field(64, ge=1, description="Watches open at once, a shard")
    inflight_nbytes_max: int = Field(
        512 << 20, ge=1 << 20, description="Bytes of writes a shard holds before storing"
    )
    slots_max: int | None = Field(
        None,
        ge=1,
        description="Blocks a shard holds at once on all tiers, however small. None: 65,536, or 1,048,576 "
        "with an nvme tier",
    )
    leases_max: int = Field(16_384, ge=1, description="Leases a shard grants at once")
    lease_s_max: float = Field(600.0, gt=0, description="Longest lease a shard grants, in seconds")
    reap_interval_s: float = Field(0.5, gt=0, le=1, description="How often a shard frees what expired")
    faults: bool = Field(False, description="Allow breaking blocks on purpose (the demo's negative control)")

    @model_validator(mode="after")
    def _can_start_a_shard(self) -> Self:
        """Told before a cluster is started for it. Raises ConfigError, which pydantic lets by."""
        if self.policy not in POLICIES:
            raise ConfigError(f"store.policy {self.policy!r} is unknown: use {' or '.join(sorted(POLICIES))}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("TLS needs both store.tls_cert and store.tls_key: set the other one too")
        if self.tls_ca is not None and self.tls_cert is None:
            raise ConfigError("store.tls_ca needs store.tls_cert and store.tls_key: set them too")
        if (self.client_cert is None) != (self.client_key is None):
            raise ConfigError("mTLS needs both store.client_cert and store.client_key: set the other one too")
        for name, host in (("host", self.host), ("admin_host", self.admin_host)):
            if not (is_loopback(host) or self.tls_cert or self.insecure):
                raise ConfigError(
                    f"store.{name} {host} is not loopback: set store.tls_cert and store.tls_key (--tls-cert, "
                    "--tls-key), or store.insecure = true (--insecure) if the network is yours alone"
                )
        if self.nvme is not None:
            self.nvme.files(ShardId("any"))  # raises for sizes that do not go together
        for name, tenant in self.tenants.items():
            self._check_tenant(f"store.tenants.{name}", tenant)
        return self

    def _check_tenant(self, place: str, tenant: TenantConfig) -> None:
        if tenant.token is not None and tenant.token_file is not None:
            raise ConfigError(f"{place}: token and token_file are both set: keep one")
        if not (tenant.token or tenant.token_file or tenant.certificate):
            raise ConfigError(
                f"{place}: nothing tells this tenant from others: set token_file or certificate"
            )
        if tenant.certificate and self.tls_ca is None:
            raise ConfigError(f"{place}.certificate is only seen with mTLS: set store.tls_ca")

    def client_tls(self) -> ClientTls | None:
        """How clients of these shards connect; None without TLS."""
        if self.tls_cert is None:
            return None
        return ClientTls(self.client_ca, self.client_cert, self.client_key)

    def client_files(self) -> dict[str, str] | None:
        """The PEM files a client of this machine uses; None without TLS. A certificate without a root is
        taken to be its own."""
        if self.tls_cert is None:
            return None
        files = {"ca": self.client_ca or self.tls_cert, "cert": self.client_cert, "key": self.client_key}
        return {name: str(path.absolute()) for name, path in files.items() if path is not None}

    @property
    def min_quality(self) -> Quality:
        """The least a block may be for workers of this service: what its own tiers make of it."""
        codec = self.nvme.cold_codec if self.nvme else None
        return codec.quality if codec else Quality.LOSSLESS

    def kept_secret(self) -> bytes | None:
        """The secret that outlives the service, made the first time; None where nothing needs it.

        Raises ConfigError for a file that cannot be read or made.
        """
        if self.secret is not None:
            return self.secret.get_secret_value().encode()
        path = self.secret_file
        if path is None and self.nvme is not None:
            path = self.nvme.directories[0] / "secret"
        return None if path is None else secret_in(path)

    def driver(self, shard: ShardId, cluster_secret: bytes, nvme_nbytes: int = 0) -> DriverConfig:
        """`nvme_nbytes`: what the tier below, as it was opened, can hold."""
        return DriverConfig(
            shard=shard,
            capacity_nbytes=self.capacity_nbytes,
            cluster_secret=cluster_secret,
            limits=CoreLimits(
                slots_max=self.slots_max or (SLOTS_MAX if self.nvme else CoreLimits().slots_max),
                leases_max=self.leases_max,
                lease_s_max=self.lease_s_max,
            ),
            quotas={n: t.quota_nbytes for n, t in self.tenants.items() if t.quota_nbytes is not None},
            policy=self.policy,
            tiering=self.nvme.tiering(nvme_nbytes) if self.nvme else Tiering(),
            encode_frame=self.nvme.encode_frame if self.nvme and self.nvme.cold_codec else None,
            admission=self.nvme.admission if self.nvme else "always",
            reap_interval_s=self.reap_interval_s,
            faults=self.faults,
        )

    def server(self, token: str | None, port: int = 0, admin_port: int | None = None) -> ServerConfig:
        """`token` is the cluster's. Raises ConfigError for a tenant's token file that cannot be read."""
        tls = TlsFiles(self.tls_cert, self.tls_key, self.tls_ca) if self.tls_cert and self.tls_key else None
        return ServerConfig(
            host=self.host,
            port=port,
            token=token,
            tls=tls,
            insecure=self.insecure,
            admin_host=self.admin_host,
            admin_port=self.admin_port if admin_port is None else admin_port,
            tenants=tuple(tenant.tenant(name) for name, tenant in self.tenants.items()),
            concurrent_calls_max=self.concurrent_calls_max,
            pipelines_max=self.pipelines_max,
            watches_max=self.watches_max,
            inflight_nbytes_max=self.inflight_nbytes_max,
        )


def load_config(
    model: type[Model],
    path: Path | None,
    overrides: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> Model:
    """The model filled from the file, then the environment, then `overrides` (dotted names; None: not given).

    Raises ConfigError that names the file or variable, the key, and what to do.
    """
    tree = _read(path) if path is not None else {}
    variables: dict[tuple[str, ...], str] = {}
    for name, value in sorted((os.environ if env is None else env).items()):
        parts = tuple(name.removeprefix(ENV_PREFIX).lower().split(_NESTED))
        # One word may be something else: KVSTRATA_CACHE, say.
        if name.startswith(ENV_PREFIX) and (len(parts) > 1 or parts[0] in model.model_fields):
            _set(tree, parts, value)
            variables[parts] = name
    for dotted, value in (overrides or {}).items():
        if value is not None:
            _set(tree, tuple(dotted.split(".")), value)
            variables.pop(tuple(dotted.split(".")), None)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        where = f"settings in {path}" if path else "settings"
        raise ConfigError("; ".join(_explain(model, e, where, variables) for e in error.errors())) from None


def _token_in(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token file {path} cannot be read: {error}") from None
    if not token:
        raise ConfigError(f"token file {path} is empty: write the tenant's token into it")
    return token


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: give the path of a TOML file, or none for the defaults"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder: give the path of a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _set(tree: dict[str, Any], parts: tuple[str, ...], value: Any) -> None:
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(parts)}: {part} is a value, not a section")
    tree[parts[-1]] = value


def _explain(model: type[BaseModel], error: Any, where: str, variables: Mapping[tuple[str, ...], str]) -> str:
    """One of pydantic's errors, with the variable or the place in the file that it came from."""
    loc = tuple(str(part) for part in error["loc"])
    variable = next((name for parts, name in variables.items() if _is_within(parts, loc)), None)
    place = variable or f"{where}: {'.'.join(loc)}"
    if error["type"] != "extra_forbidden":
        return f"{place}: {_worded(error, loc)}"
    near = difflib.get_close_matches(loc[-1], _names(model, error["loc"][:-1]), n=1)
    return f"{place} is not a setting" + (f": did you mean {near[0]}?" if near else "")


def _is_within(parts: tuple[str, ...], loc: tuple[str, ...]) -> bool:
    """Does one of the two begin with the other? Pydantic names a part of the value, or a section of it."""
    shorter = min(len(parts), len(loc))
    return parts[:shorter] == loc[:shorter]


def _worded(error: Any, loc: tuple[str, ...]) -> str:
    if error["type"] not in _KINDS:
        return str(error["msg"]).removeprefix("Value error, ")
    cure = ": give bytes, like 4_000_000_000" if loc[-1].endswith("nbytes") else ""
    return f"{error['input']!r} is not {_KINDS[error['type']]}{cure}"


def _names(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Field names of the section at `path`."""
    for part in path:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)

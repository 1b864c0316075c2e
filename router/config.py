"""The whole service's settings: one TOML file, one section a room.

model = "smollm2-135m"
[store]    shards, memory ...            kvstore.config.StoreConfig
[engine]   dtype, pool, steps ...        engine.config.EngineConfig, the same for both roles
[prefill]  [decode]                      how many workers, and what Ray shall give each
[router]   HTTP, bounds, supervision
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from engine.config import EngineConfig
from engine.worker_config import RoleLimits
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError

__all__ = ["RoleConfig", "RouterConfig", "ServiceConfig", "check_exposure", "served_name"]

DEFAULT_MODEL = "smollm2-135m"
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoleConfig(_Section):
    workers: int = Field(1, ge=1, le=1024, description="Workers of this role")
    num_cpus: float = Field(0, ge=0, description="CPUs Ray sets aside for each. 0: shared with all others")
    num_gpus: float = Field(0, ge=0, description="GPUs Ray sets aside for each")
    resources: dict[str, float] = Field(
        default_factory=dict, description="Custom Ray resources each takes: binds a role to nodes"
    )
    limits: RoleLimits = Field(default_factory=RoleLimits, description="Bounds of its queues and waits")


class RouterConfig(_Section):
    host: str = Field("127.0.0.1", description="Address to listen on; beyond loopback only with insecure")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on. 0: one that is free")
    insecure: bool = Field(False, description="Allow a listener beyond loopback: there is no TLS here yet")
    api_key: SecretStr | None = Field(None, description="What clients must send as a bearer token")
    served_model_name: str | None = Field(
        None,
        max_length=512,
        description="The model's name in the API. None: the last part of `model`",
    )
    running_max: int = Field(256, ge=1, description="Requests served at once; more are answered 429")
    max_tokens_default: int = Field(
        1024,
        ge=1,
        description="Where a chat without max_tokens ends, with the reason length. Decode "
        "expects the share of it that answers before used, so a far larger one does little harm",
    )
    body_nbytes_max: int = Field(4 << 20, ge=1024, description="Largest request body")
    attempts_max: int = Field(3, ge=1, le=16, description="Times a request is tried on other workers")
    prefill_timeout_s: float = Field(
        600.0,
        gt=0,
        description="For a prompt's first token, for decode's, and for the next one when preempted: it may "
        "wait for room and compute again what it cannot read",
    )
    call_timeout_s: float = Field(30.0, gt=0, description="For a handoff, and for decode to accept it")
    stall_timeout_s: float = Field(
        60.0, gt=0, description="Between two tokens of decode; then another worker goes on"
    )
    send_timeout_s: float = Field(
        60.0, gt=0, description="For a client to take a piece of its answer; then its connection ends"
    )
    recovery_timeout_s: float = Field(
        60.0, gt=0, description="For a lost worker to return, when none is left"
    )
    progress_timeout_s: float = Field(
        300.0, gt=0, description="Without a token of any running request for so long, /health is 503"
    )
    start_timeout_s: float = Field(300.0, gt=0, description="For one shard or worker to come up")
    ping_interval_s: float = Field(2.0, gt=0, description="Between two questions whether one lives")
    ping_timeout_s: float = Field(10.0, gt=0, description="For their answer")
    pings_missed_max: int = Field(3, ge=1, description="Answers missed in a row before one is replaced")
    restart_delay_s: float = Field(0.5, ge=0, description="Before one is brought back; doubles")
    restart_delay_s_max: float = Field(30.0, gt=0, description="The longest such wait")
    gather_timeout_s: float = Field(2.0, gt=0, description="For answers to a /metrics scrape")
    drain_timeout_s: float = Field(5.0, ge=0, description="For requests to finish when the service ends")


class ServiceConfig(_Section):
    model: str = Field(DEFAULT_MODEL, description="Registry name, local folder, GGUF file or hub id")
    epoch: int = Field(0, ge=0, description="Orders this set of weights among the model's others")
    store: StoreConfig = Field(default_factory=StoreConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    prefill: RoleConfig = Field(default_factory=RoleConfig)
    decode: RoleConfig = Field(default_factory=RoleConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)


def served_name(config: ServiceConfig) -> str:
    """The model's name in the API, and the name its KV is stored under."""
    return config.router.served_model_name or Path(config.model).expanduser().name


def check_exposure(config: RouterConfig) -> None:
    """Raises ConfigError for a listener beyond loopback that nobody said yes to."""
    if config.host not in _LOOPBACK and not config.insecure:
        raise ConfigError(
            f"listening on {config.host} lets others on the network in, unencrypted: say --insecure if that "
            "is meant (and set --api-key), or listen on 127.0.0.1"
        )

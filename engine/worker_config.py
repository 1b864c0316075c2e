"""Settings of one worker, prefill or decode: its model, its way to the store, the bounds of its waits.

A worker gets this once, from whoever starts it; the service's configuration file fills it.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.config import EngineConfig
from kvstore.nouns import Quality
from kvstore.tls import ClientTls
from kvstore.topology import Topology

__all__ = ["RoleLimits", "WorkerConfig"]


class RoleLimits(BaseModel):
    """Seconds and counts; every queue and wait of a worker has one of these. `RoleLimits()` suits most."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_max: int = Field(256, ge=1, description="Requests a worker holds in any state; more are refused")
    loading_max: int = Field(
        8,
        ge=1,
        description="Requests whose KV is on its way into the engine; others wait before it",
    )
    admit_timeout_s: float = Field(
        30.0, gt=0, description="For a request's turn to load, and again for room in the engine"
    )
    match_timeout_s: float = Field(2.0, gt=0, description="For the store to say what it has of a prompt")
    read_timeout_s: float = Field(
        5.0, gt=0, description="For blocks to arrive; what did not arrive by then is recomputed"
    )
    compute_timeout_s: float = Field(600.0, gt=0, description="From admission to a prompt's first token")
    handoff_timeout_s: float = Field(
        5.0,
        gt=0,
        description="For a handoff to wait for publications; decode recomputes what is missing",
    )
    lease_s: float = Field(60.0, gt=0, description="How long matched and published blocks stay pinned")
    parked_s: float = Field(
        30.0, gt=0, description="How long a computed prompt waits to be fetched before it is dropped"
    )
    sweep_s: float = Field(1.0, gt=0, description="How often parked prompts are looked over")
    publish_inflight_nbytes_max: int = Field(
        256 << 20,
        ge=0,
        description="Memory for blocks on their way to the store; beyond it they are dropped",
    )
    publish_timeout_s: float = Field(10.0, gt=0, description="For one batch of blocks to be stored")
    events_max: int = Field(65_536, ge=1, description="Tokens a decode worker keeps for those who poll")
    poll_timeout_s_max: float = Field(30.0, gt=0, description="The longest a poll waits")
    load_gate: bool = Field(
        True,
        description="Compute stored blocks where measured rates say that loading them takes longer. False: "
        "load all there are",
    )
    announcing_max: int = Field(
        64,
        ge=0,
        description="Queued prompts announced to the store at one time, so that what lies on NVMe comes up. "
        "0: none are",
    )
    connect_timeout_s: float = Field(5.0, gt=0, description="For the store to answer when it is first needed")


class WorkerConfig(BaseModel):
    """Everything a worker needs to start. Immutable; travels to an actor as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    worker_id: str = Field(min_length=1, description="Names the worker in logs, leases and metrics")
    model: str = Field(
        min_length=1, description="A local Hugging Face folder, a GGUF file, a registry name or a hub id"
    )
    model_id: str | None = Field(
        None,
        description="The name KV is stored under; workers that share KV agree on it. None: from `model`",
    )
    engine: EngineConfig = Field(default_factory=EngineConfig)
    topology: Topology = Field(description="The store's shards. Newer ones come by set_topology")
    token: str | None = Field(None, repr=False, description="What the shards ask a client for")
    store_tls: ClientTls | None = Field(None, description="PEM files to reach the shards with. None: no TLS")
    edge_host: str | None = Field(
        None,
        description="Loopback address on which other workers of this host may read the pool (Worker.pull). "
        "None: none may",
    )
    epoch_number: int = Field(0, ge=0, description="Orders this set of weights among the model's others")
    min_quality: Quality = Field(
        Quality.LOSSLESS,
        description="The least a block may be to be used; lossless keeps output exact",
    )
    stale_lag_max: int = Field(
        0,
        ge=0,
        description="How many epochs older than ours a block may be and still be used, where the model's "
        "policy allows it too (kvstrata epoch advance --policy)",
    )
    limits: RoleLimits = Field(default_factory=RoleLimits)

    @model_validator(mode="after")
    def _own_kv_is_good_enough(self) -> WorkerConfig:
        hot, quality = self.engine.hot_pool, self.engine.kv_quality
        if quality < self.min_quality:
            raise ValueError(
                f"engine.hot_pool {hot} makes KV of quality {quality.name}, which "
                f"min_quality {self.min_quality.name} refuses: lower min_quality, or hold KV as the model's"
            )
        return self

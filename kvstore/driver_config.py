"""What one shard's driver is told at start."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvstore.core.seams import MakePredictor
from kvstore.core.state import CoreConfig, CoreLimits, Foresight, Tiering
from kvstore.errors import ConfigError
from kvstore.mover import EncodeFrame
from kvstore.nouns import Incarnation, ShardId
from kvstore.policies import POLICIES
from kvstore.policies.admission import ADMISSIONS
from kvstore.policies.continuation import Continuation


def new_incarnation() -> Incarnation:
    return Incarnation(secrets.randbits(64))


@dataclass(frozen=True, slots=True)
class DriverConfig:
    shard: ShardId
    capacity_nbytes: int
    cluster_secret: bytes = field(repr=False)
    incarnation: Incarnation = field(default_factory=new_incarnation)
    limits: CoreLimits = field(default_factory=CoreLimits)
    quotas: Mapping[str, int] = field(default_factory=dict)  # bytes a tenant may hold here, by its name
    policy: str = "default"
    tiering: Tiering = field(default_factory=Tiering)
    admission: str = "predicted_reuse"  # what is worth a place on the tier below, by name
    encode_frame: EncodeFrame | None = None  # what the tier below keeps of a lossless frame; None: itself
    make_predictor: MakePredictor = Continuation  # how likely sessions go on
    foresight: Foresight = field(default_factory=Foresight)
    reap_interval_s: float = 0.5
    faults: bool = False  # allows flip_stored_byte: tests and the demo's negative control

    def core(self) -> CoreConfig:
        return CoreConfig(
            self.shard,
            self.incarnation,
            self.capacity_nbytes,
            self.limits,
            self.quotas,
            self.cluster_secret,
            self.tiering,
            self.foresight,
        )

    def __post_init__(self) -> None:
        if len(self.cluster_secret) < 16:
            raise ConfigError("the cluster secret needs at least 16 bytes: it keys every namespace id")
        if self.reap_interval_s > self.limits.pause_s / 2:
            raise ConfigError(
                f"a tick of {self.reap_interval_s} s would look like a pause of the shard, no lease would "
                f"ever end: reap_interval_s must be at most {self.limits.pause_s / 2}"
            )
        if self.policy not in POLICIES:
            raise ConfigError(f"policy {self.policy!r} is unknown: use one of {sorted(POLICIES)}")
        if self.admission not in ADMISSIONS:
            raise ConfigError(f"admission {self.admission!r} is unknown: use one of {sorted(ADMISSIONS)}")

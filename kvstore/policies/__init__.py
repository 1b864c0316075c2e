"""Replacement policies by name. One policy is one file that fills `core.seams.VictimQueue`."""

from __future__ import annotations

from typing import Final

from kvstore.core.seams import MakePolicy
from kvstore.policies.arc import arc
from kvstore.policies.hazard import hazard
from kvstore.policies.lru import lru
from kvstore.policies.s3fifo import s3fifo

POLICIES: Final[dict[str, MakePolicy]] = {
    "arc": arc,
    "default": hazard,
    "hazard": hazard,
    "lru": lru,
    "s3fifo": s3fifo,
}

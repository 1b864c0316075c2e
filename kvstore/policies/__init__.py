"""Replacement policies by name. One policy is one file that fills `core.seams.ReplacementPolicy`."""

from __future__ import annotations

from typing import Final

from kvstore.core.seams import MakePolicy
from kvstore.policies.lru import lru

POLICIES: Final[dict[str, MakePolicy]] = {"lru": lru}

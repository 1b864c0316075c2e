"""Replacement policies by name. One policy is one file that fills `core.seams.ReplacementPolicy`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvstore.core.seams import ReplacementPolicy
from kvstore.policies.lru import LRU

POLICIES: Final[dict[str, Callable[[], ReplacementPolicy]]] = {"lru": LRU}

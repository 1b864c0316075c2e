"""k4v3: keys as in k4v4, values rotated at 3.25 bits: 3.89 bits an element (32 tokens, head_dim 64).

Keys need their bits, values stand less (docs/benchmarks.md has what it loses).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvstore.codecs.k4v4 import K4V4
from kvstore.codecs.rotated_values import THREE_BITS, Levels
from kvstore.nouns import Quality


@dataclass(frozen=True, slots=True)
class K4V3(K4V4):
    name: ClassVar[str] = "k4v3"
    number: ClassVar[int] = 6
    quality: ClassVar[Quality] = Quality.K4V3
    levels: Levels = THREE_BITS

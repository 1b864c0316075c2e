"""Promise: a setting that cannot work is refused when it is read, by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from engine.config import EngineConfig


def test_the_defaults_are_the_safe_ones() -> None:
    config = EngineConfig()
    assert (config.dtype, config.batch_invariant, config.block_tokens) == ("float32", True, 32)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"threads": 0}, "threads"),
        ({"pool_blocks": 0}, "pool_blocks"),
        ({"page_size": 16}, "page_size"),
        ({"step_tokens_max": 32, "running_max": 33}, "raise step_tokens_max"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        EngineConfig(**settings)


def test_every_setting_says_what_it_is_for() -> None:
    assert all(field.description for field in EngineConfig.model_fields.values())

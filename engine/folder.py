"""Reading the JSON files of a Hugging Face style model folder, bounded and with errors that name a cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from engine.errors import ModelCorrupt, ModelNotFound

__all__ = ["CONFIG_FILE", "CONFIG_NBYTES_MAX", "read_json_object"]

CONFIG_FILE: Final = "config.json"
CONFIG_NBYTES_MAX: Final = 64 << 20
"""A tensor index of a very large model has about 10 MB; nothing sane has more than this."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelNotFound if it is absent, ModelCorrupt if it is not one."""
    try:
        if path.stat().st_size > CONFIG_NBYTES_MAX:
            raise ModelCorrupt(
                f"{path} has {path.stat().st_size} bytes, more than any config has ({CONFIG_NBYTES_MAX})",
                "Copy or download the model again",
            )
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelNotFound(
            f"there is no {path.name} in {path.parent}",
            "Give the folder that holds config.json, model.safetensors and tokenizer.json",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelCorrupt(f"{path} is not readable JSON ({error})", "Copy or download it again") from error
    if not isinstance(value, dict):
        raise ModelCorrupt(
            f"{path} holds a JSON {type(value).__name__}, not an object", "Copy or download it again"
        )
    return value

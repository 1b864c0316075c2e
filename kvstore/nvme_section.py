"""`[store.nvme]`: the settings of the tier that survives."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from kvstore.codecs import CODECS, Codec
from kvstore.codecs.frames import encode_frame, encoded_frame_nbytes
from kvstore.core.state import DemoteWhen, Encoding, Tiering
from kvstore.errors import ConfigError
from kvstore.nouns import KVLayout, ShardId
from kvstore.policies.admission import ADMISSIONS
from kvstore.tiers.nvme.config import NvmeConfig

__all__ = ["NvmeSection"]


class NvmeSection(BaseModel):
    """`[store.nvme]`: a tier below each shard's host memory that survives restarts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directories: tuple[Path, ...] = Field(
        min_length=1, description="One a disk. Every shard has a folder of its own in each"
    )
    disk_nbytes: int = Field(gt=0, description="What one shard's files may take, all directories together")
    segment_nbytes: int = Field(256 << 20, description="Size of one file; space is reclaimed by files")
    write: DemoteWhen = Field(
        DemoteWhen.USED_AGAIN,
        description="What moves down: write_through (all), write_through_selective (what is worth it when it "
        "is let go of), write_back (what would leave a nearly full host)",
    )
    admission: str = Field(
        "predicted_reuse",
        description="What write_through_selective and write_back find worth a write: always, second_use, "
        "predicted_reuse (used twice, or likely to be)",
    )
    codec: str = Field(
        "lossless",
        description="What blocks are encoded with on their way down. Anything but lossless also lets this "
        "service's workers use them (min_quality); see docs/tiers.md for what each costs",
    )
    exclusive: bool = Field(False, description="Keep a block on one tier only, not on both")
    direct: bool = Field(True, description="Bypass the page cache (O_DIRECT) where the file system can")

    @field_validator("codec")
    @classmethod
    def _is_known(cls, codec: str) -> str:
        if codec not in CODECS:
            raise ConfigError(f"store.nvme.codec {codec!r} is unknown: use {' or '.join(CODECS)}")
        return codec

    @field_validator("admission")
    @classmethod
    def _is_a_policy(cls, admission: str) -> str:
        if admission not in ADMISSIONS:
            known = " or ".join(sorted(ADMISSIONS))
            raise ConfigError(f"store.nvme.admission {admission!r} is unknown: use {known}")
        return admission

    @property
    def cold_codec(self) -> Codec | None:
        """None where blocks go down as they are."""
        return None if self.codec == "lossless" else CODECS[self.codec]

    def tiering(self, nvme_nbytes: int) -> Tiering:
        encode = None if self.cold_codec is None else self._encoding
        return Tiering(nvme_nbytes, self.write, self.exclusive, encode)

    def encode_frame(self, frame: memoryview, layout: KVLayout) -> memoryview | None:
        """What the tier keeps of a lossless frame; None: its values cannot be encoded."""
        return encode_frame(frame, CODECS[self.codec], layout)

    def files(self, shard: ShardId) -> NvmeConfig:
        """Raises ConfigError for sizes that do not go together."""
        folders = tuple(directory / shard for directory in self.directories)
        return NvmeConfig(folders, self.disk_nbytes, self.segment_nbytes, direct=self.direct, owner=shard)

    def left_out(self, shards: Collection[str]) -> list[Path]:
        """Folders on this machine of shards that are none of these: nobody tells them of purges."""
        folders = (folder for directory in self.directories for folder in directory.glob("shard-*"))
        return sorted(folder for folder in folders if folder.name not in shards)

    def _encoding(self, layout: KVLayout) -> Encoding | None:
        """A layout that the codec cannot do goes down as it is."""
        codec = CODECS[self.codec]
        return Encoding(codec.quality, encoded_frame_nbytes(codec, layout)) if codec.fits(layout) else None

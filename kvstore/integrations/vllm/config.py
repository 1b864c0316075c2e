"""`kv_connector_extra_config` of vLLM: what the connector may be told. All of it has a default.

    --kv-transfer-config '{"kv_connector": "KVStrataConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "kvstore.integrations.vllm",
        "kv_connector_extra_config": {"store": "10.0.0.7:7400", "token_file": "/etc/kvstrata/token"}}'

Unknown keys are refused, with the nearest known one in the message.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from kvstore.errors import ConfigError
from kvstore.nouns import BLOCK_TOKENS, WEIGHTS_DIGEST_NBYTES, Quality
from kvstore.tls import ClientTls

__all__ = ["ConnectorConfig", "read_config"]


class ConnectorConfig(BaseModel):
    """Frozen; both halves of the connector read the same one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str | list[str] = Field(
        "default",
        description="Name of a store that `kvstrata store` runs on this machine, or addresses (host:port) of "
        "any of a store's shards",
    )
    token: SecretStr | None = Field(None, description="What the shards ask for; with addresses only")
    token_file: Path | None = Field(None, description="The same, in a file of this machine")
    tls_ca: Path | None = Field(
        None, description="PEM file that signed the shards' certificates. None: no TLS"
    )
    tls_cert: Path | None = Field(None, description="This client's own certificate, where shards ask for one")
    tls_key: Path | None = Field(None, description="Its key")
    shared_memory: bool = Field(
        True, description="Move the bytes of shards on this machine through shared memory, where that works"
    )
    tenant: str = Field("default", min_length=1, description="Whose KV it is; others never see it")

    model_id: str | None = Field(
        None, min_length=1, description="The name KV is stored under. None: the model folder's"
    )
    weights_digest: str | None = Field(
        None,
        description="32 hex digits that stand for the weights (`kvstrata vllm-config` prints our engine's). "
        "None: made of the model's files",
    )
    files_digest: str | None = Field(
        None,
        description="32 hex digits over the model's files (`kvstrata vllm-config` prints them): with other "
        "files nothing is shared. None: weights_digest is believed",
    )
    tokenizer_digest: str | None = Field(
        None, description="32 hex digits that stand for the tokenizer. None: made of its files"
    )
    epoch: Literal["weights", "store"] = Field(
        "weights",
        description="Which epoch KV is of: that of the weights' digest, or the model's current one in the "
        "store, for weights that a trainer changes in place",
    )
    block_tokens: int = Field(
        BLOCK_TOKENS, ge=1, le=4096, description="Tokens of a block in the store; engines that share agree"
    )
    min_quality: Quality = Field(
        Quality.LOSSLESS, description="The least a block may be to be loaded; lossless keeps output exact"
    )

    save: Literal["all", "prompt", "none"] = Field(
        "all", description="Which KV goes to the store: also what is generated, prompts alone, or none"
    )
    staging_nbytes: int = Field(
        1 << 30, ge=1 << 20, description="Memory a worker holds for blocks on their way to the store"
    )
    min_load_tokens: int = Field(
        64, ge=0, description="Shorter hits are computed: a load costs a request at least one step"
    )
    connect_timeout_s: float = Field(5.0, gt=0, description="For the store to answer when it is first needed")
    lookup_timeout_s: float = Field(1.0, gt=0, description="A look-up that takes longer is a hit of nothing")
    load_timeout_s: float = Field(10.0, gt=0, description="What is not loaded by then is a miss")
    save_timeout_s: float = Field(30.0, gt=0, description="What is not published by then is dropped")
    handoff_timeout_s: float = Field(
        30.0,
        gt=0,
        le=600,
        description="How long a decode instance waits for a prefill's KV, which is pinned for it as long",
    )
    any_vllm_version: bool = Field(False, description="Run with a vLLM that this was never tried with")

    @field_validator("weights_digest", "files_digest", "tokenizer_digest")
    @classmethod
    def _is_a_digest(cls, text: str | None) -> str | None:
        if text is None:
            return None
        try:
            digest = bytes.fromhex(text)
        except ValueError:
            digest = b""
        if len(digest) != WEIGHTS_DIGEST_NBYTES:
            raise ValueError(f"{text!r} is no digest: give {2 * WEIGHTS_DIGEST_NBYTES} hex digits")
        return digest.hex()

    @field_validator("min_quality", mode="before")
    @classmethod
    def _quality_by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                return Quality[value.upper()]
            except KeyError:
                names = ", ".join(quality.name.lower() for quality in Quality)
                raise ValueError(f"{value!r} is no quality: use one of {names}") from None
        return value

    @model_validator(mode="after")
    def _store_is_one_thing(self) -> Self:
        if isinstance(self.store, list) and not self.store:
            raise ValueError("store is an empty list: give at least one shard's address, like 127.0.0.1:7400")
        if self.token is not None and self.token_file is not None:
            raise ValueError("give the token or its file, not both")
        if not self.addresses and (self.token or self.token_file or self.tls_ca or self.tls_cert):
            raise ValueError(
                f"store {self.store!r} is the name of a store of this machine, whose file has token and TLS: "
                "leave these out, or give addresses (host:port)"
            )
        return self

    @property
    def addresses(self) -> list[str]:
        """Empty where `store` is a name."""
        if isinstance(self.store, list):
            return self.store
        return [self.store] if ":" in self.store else []

    def shown_token(self) -> str | None:
        """Raises ConfigError for a file that cannot be read or is empty."""
        if self.token_file is None:
            return self.token.get_secret_value() if self.token else None
        try:
            text = self.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"token_file {self.token_file} cannot be read: {error}") from None
        if not text:
            raise ConfigError(f"token_file {self.token_file} is empty: write the store's token into it")
        return text

    def client_tls(self) -> ClientTls | None:
        if self.tls_ca is None and self.tls_cert is None:
            return None
        return ClientTls(self.tls_ca, self.tls_cert, self.tls_key)


def read_config(extra: Mapping[str, Any]) -> ConnectorConfig:
    """Raises ConfigError that names the key and what to do."""
    try:
        return ConnectorConfig.model_validate(dict(extra))
    except ValidationError as error:
        raise ConfigError("; ".join(_worded(each) for each in error.errors())) from None


def _worded(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    place = f"kv_connector_extra_config.{key}" if key else "kv_connector_extra_config"
    if error["type"] != "extra_forbidden":
        return f"{place}: {str(error['msg']).removeprefix('Value error, ')}"
    near = difflib.get_close_matches(key, list(ConnectorConfig.model_fields), n=1)
    return f"{place} is not a setting" + (f": did you mean {near[0]}?" if near else "")

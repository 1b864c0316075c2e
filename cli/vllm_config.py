"""`kvstrata vllm-config`: what vLLM must be told so that it shares KV with our engines of the same model.

The identities are those that our own engine computes for the folder; it reads the weights twice (two
seconds a GB), once for a digest of the files, by which vLLM's connector knows others. Needs no vLLM, and no
running store.
"""

from __future__ import annotations

import enum
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli.at_store import Store, TlsCa, TokenFile
from cli.say import note, one_json, reported

if TYPE_CHECKING:
    from kvstore.nouns import NamespaceSpec

__all__ = ["Identity", "identity_of", "transfer_config", "vllm_config"]

CONNECTOR: Final = {
    "kv_connector": "KVStrataConnector",
    "kv_connector_module_path": "kvstore.integrations.vllm",
}


class Dtype(enum.StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Role(enum.StrEnum):
    BOTH = "both"
    PRODUCER = "producer"
    CONSUMER = "consumer"


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes KV of a model interchangeable, and what a prompt's ids may be."""

    model_id: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tokenizer_digest: bytes
    weights_digest: bytes
    files_digest: bytes  # of the files that weights_digest was made of

    def spec(self) -> NamespaceSpec:
        """The namespace of an engine in one process, with blocks of the usual size."""
        from kvstore.nouns import KVLayout, NamespaceSpec

        layout = KVLayout(self.layers, 0, self.kv_heads, self.head_dim, self.dtype)
        return NamespaceSpec(self.model_id, layout, self.tokenizer_digest)


def vllm_config(
    model: Annotated[
        str, typer.Argument(help="A model's folder, or a name as `kvstrata model list` has it.")
    ],
    dtype: Annotated[
        Dtype, typer.Option(help="What vLLM computes in: part of what names the weights.")
    ] = Dtype.BFLOAT16,
    store: Store = "default",
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    role: Annotated[
        Role,
        typer.Option(help="producer: a prefill instance, never loads; consumer: a decode one, never saves."),
    ] = Role.BOTH,
    model_id: Annotated[
        str | None, typer.Option(help="The name KV is stored under; the model's own unless said.")
    ] = None,
    json_out: Annotated[bool, typer.Option("--json", help="Only the JSON; on an error none.")] = False,
) -> None:
    """Print vLLM's --kv-transfer-config for a model, so that it and our engines share KV."""
    reach = _reach(store, token_file, tls_ca)
    raise typer.Exit(reported(lambda: _vllm_config(model, dtype, reach, role, model_id, json_out)))


def _vllm_config(
    model: str, dtype: Dtype, reach: Mapping[str, Any], role: Role, model_id: str | None, json_out: bool
) -> int:
    from router.model_folder import model_folder

    folder = model_folder(model)
    identity = identity_of(folder, dtype, model_id or Path(model).expanduser().name)
    document = transfer_config(identity, role, reach)
    if json_out:
        one_json(document)
        return 0
    name = reach.get("store", "default")
    if isinstance(name, str):
        note("on this machine, unless it runs already; and vLLM, with kvstrata in its environment:")
        print("kvstrata store" if name == "default" else f"kvstrata store --name {name}")
    line = json.dumps(document, separators=(",", ":"))
    print(f"vllm serve {shlex.quote(str(folder))} --dtype {dtype} --kv-transfer-config {shlex.quote(line)}")
    return 0


def identity_of(folder: Path, dtype: str, model_id: str) -> Identity:
    """As our engine has it for a Hugging Face style folder. Raises ModelError's kinds."""
    from engine.models.config import ModelConfig
    from engine.tokenizer import Tokenizer
    from engine.weights import DTYPES, weights_digest
    from kvstore.integrations.vllm.file_digests import files_digest, weight_files

    config = ModelConfig.from_folder(folder)
    return Identity(
        model_id=model_id,
        dtype=str(dtype),
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocab_size,
        tokenizer_digest=Tokenizer.from_folder(folder).digest,
        weights_digest=weights_digest(folder, config, DTYPES[dtype]),
        files_digest=files_digest(weight_files(folder)),
    )


def transfer_config(identity: Identity, role: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of vLLM's KVTransferConfig. `options`: of the connector, beside the identities.

    A load that fails is computed, in place of vLLM's default, which ends the request.
    """
    named = {
        "model_id": identity.model_id,
        "weights_digest": identity.weights_digest.hex(),
        "files_digest": identity.files_digest.hex(),
        "tokenizer_digest": identity.tokenizer_digest.hex(),
    }
    return {
        **CONNECTOR,
        "kv_role": f"kv_{role}",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {**named, **options},
    }


def _reach(store: str, token_file: Path | None, tls_ca: Path | None) -> dict[str, Any]:
    """The connector's options that say where the store is. Only what differs from its defaults."""
    if ":" not in store:
        if token_file is not None or tls_ca is not None:
            raise typer.BadParameter(
                f"they go with addresses; {store} is a store's name", param_hint="--store"
            )
        return {} if store == "default" else {"store": store}
    files = {"token_file": token_file, "tls_ca": tls_ca}
    addresses = [address.strip() for address in store.split(",") if address.strip()]
    return {"store": addresses} | {name: str(f.absolute()) for name, f in files.items() if f is not None}

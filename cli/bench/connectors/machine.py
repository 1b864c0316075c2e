"""What a run is made of on this machine: vLLM's processes in their environment, shards in ours.

Nothing is kept: shards, files of the example connector and what lay on disk go with the run.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import cli
import kvstore
from cli.bench.connectors.plan import CALL_S, START_S, STEP_TOKENS_MAX, TAIL_TOKENS, Plan
from cli.bench.connectors.run import FirstToken, Prompt
from cli.bench.connectors.shard import Shard
from cli.bench.engines.plan import prompts
from cli.bench.jsonlines import Child, ChildFailed
from cli.vllm_config import Identity, transfer_config

if TYPE_CHECKING:
    from kvstore.nouns import NamespaceSpec

__all__ = ["Setup", "ThisMachine"]

_SPARE_NBYTES: Final = 128 << 20
_ALLOCATOR: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""Of every vLLM. glibc raises the first by itself when somebody frees a large buffer, as a connector may:
then vLLM's steps have no page faults any more, and the connector would seem to make them faster."""
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - the example connector's files, as fast as files get


@dataclass(frozen=True, slots=True)
class Setup:
    folder: Path  # the model's
    identity: Identity  # what its KV is stored under
    vllm: Path  # vLLM's environment
    threads: int


class ThisMachine:
    """A `Machine`; what it started is closed by whoever asked for it, its folders when it is left."""

    def __init__(self, plan: Plan, setup: Setup) -> None:
        self._plan = plan
        self._setup = setup
        self._closing = contextlib.ExitStack()
        self._folders: dict[str, Path] = {}
        self._memory: Shard | None = None
        self._by_codec: dict[str, Shard] = {}

    def __enter__(self) -> ThisMachine:
        self._folder = self._temporary()
        for package in (cli, kvstore):  # its Python sees these of ours, and its own packages
            source = Path(package.__path__[0])
            (self._folder / source.name).symlink_to(source, target_is_directory=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def alone(self) -> VllmProcess:
        return self._vllm(None)

    def shard(self, codec: str | None) -> SavedShard:
        folder = self._temporary()
        if codec is None:
            rounds = self._plan.rounds + 1
            capacity = self._nbytes(rounds * sum(self._plan.lengths)) + _SPARE_NBYTES
            self._memory = Shard(folder, capacity)
            return SavedShard(self, self._memory)
        capacity = self._nbytes(max(self._plan.lengths)) + _SPARE_NBYTES
        segment = 64 << 20
        nvme = {
            "directories": [str(folder / "nvme")],
            "disk_nbytes": 8 * segment + 4 * capacity // segment * segment,
            "segment_nbytes": segment,
            "write": "write_through",
            "admission": "always",
            "codec": codec,
            "exclusive": True,  # so that what was written lies there and nowhere else
        }
        (folder / "nvme").mkdir()
        self._by_codec[codec] = Shard(folder, capacity, nvme)
        return SavedShard(self, self._by_codec[codec])

    def saving(self) -> VllmProcess:
        return self._vllm(self._ours(self._memory))

    def looking(self) -> VllmProcess:
        return self._vllm(self._ours(self._memory, save="none", shared_memory=False))

    def reading(self, codec: str) -> VllmProcess:
        from kvstore.codecs import CODECS

        quality = CODECS[codec].quality.name.lower()
        return self._vllm(self._ours(self._by_codec[codec], save="none", min_quality=quality))

    def example(self) -> VllmProcess:
        files = self._temporary(_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None)
        return self._vllm(
            {
                "kv_connector": "ExampleConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"shared_storage_path": str(files)},
            },
            self._plan.context_max,  # it fails on a prompt that takes more than one step
        )

    @property
    def spec(self) -> NamespaceSpec:
        """Where our connector should store: found by what `kvstrata vllm-config` prints, or not at all."""
        return self._setup.identity.spec()

    @property
    def weights_digest(self) -> bytes:
        return self._setup.identity.weights_digest

    @property
    def in_memory(self) -> Shard:
        assert self._memory is not None
        return self._memory

    def ids(self, prompt: Prompt) -> list[int]:
        (ids,) = prompts(1, prompt.tokens + TAIL_TOKENS, prompt.seed, self._setup.identity.vocabulary)
        return ids

    def _ours(self, shard: Shard | None, **options: Any) -> dict[str, Any]:
        assert shard is not None
        reach = {"store": [shard.address], "token_file": str(shard.token_file)}
        return transfer_config(self._setup.identity, "both", reach | options)

    def _vllm(self, transfer: dict[str, Any] | None, step_tokens: int = STEP_TOKENS_MAX) -> VllmProcess:
        env = {"PYTHONPATH": str(self._folder)}
        return VllmProcess(self._setup, env, self._plan.context_max, step_tokens, transfer)

    def _nbytes(self, tokens: int) -> int:
        """Of so many tokens' frames, with what pages and extents take."""
        layout = self.spec.layout
        return tokens // layout.block_tokens * (layout.block_nbytes + 8_192)

    def _temporary(self, below: Path | None = None) -> Path:
        made = tempfile.TemporaryDirectory(prefix="kvstrata-bench-", dir=below, ignore_cleanup_errors=True)
        return Path(self._closing.enter_context(made))


class SavedShard:
    """A `SavedTo`."""

    def __init__(self, machine: ThisMachine, shard: Shard) -> None:
        self._machine = machine
        self._shard = shard
        self._session = shard.session(machine.spec, machine.weights_digest)
        self._saved = 0

    def until_saved(self, prompts: Sequence[Prompt]) -> None:
        size = self._session.layout.block_tokens
        self._saved += sum(prompt.tokens // size for prompt in prompts)
        self._shard.until_saved(self._saved)

    def take(self, prompt: Prompt) -> None:
        machine = self._machine
        source = machine.in_memory.session(machine.spec, machine.weights_digest)
        self._shard.take(machine.ids(prompt)[: prompt.tokens], source, self._session)

    def close(self) -> None:
        self._shard.close()


class VllmProcess:
    """A `Vllm`."""

    def __init__(
        self,
        setup: Setup,
        env: dict[str, str],
        context_max: int,
        step_tokens: int,
        transfer: dict[str, Any] | None,
    ) -> None:
        python = setup.vllm / "bin/python"
        env |= _ALLOCATOR | {
            "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "OMP_NUM_THREADS": str(setup.threads),
        }
        self._vocabulary = setup.identity.vocabulary
        self._child = Child("vLLM", [str(python), "-m", "cli.bench.connectors.vllm_process"], env)
        try:
            started = self._child.ask(
                "start", START_S, folder=str(setup.folder), dtype=setup.identity.dtype, threads=setup.threads,
                context_max=context_max, step_tokens=step_tokens, transfer=transfer,
            )  # fmt: skip
        except ChildFailed:
            self._child.close()
            raise
        self.what = str(started["what"])

    def first_token(self, prompt: Prompt) -> FirstToken:
        got = self._child.ask(
            "first_token", CALL_S, tokens=prompt.tokens + TAIL_TOKENS, seed=prompt.seed,
            vocabulary=self._vocabulary,
        )  # fmt: skip
        return FirstToken(got["seconds"], got["cached"])

    def forget(self) -> None:
        if not self._child.ask("forget", CALL_S)["done"]:
            raise ChildFailed("vLLM's prefix cache is in use, and was not emptied")

    def close(self) -> None:
        self._child.close()

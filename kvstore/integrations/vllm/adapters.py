"""What an adapter's KV is called: the digest of its files, bound to vLLM's number for it at first sight.

vLLM may keep an adapter loaded while its files change, and read them again when it likes: from then on nobody
can say which of both it computes with. So an adapter whose files change, or that is loaded in place, has no
name any more, and its requests stay out of the store: those that come, and those that are under way, which
`still_named` is asked of before each save. So do those of an adapter that cannot be read, and of one whose
files changed after this process was started: vLLM may have read it before we did.

What remains: a request that has loaded KV by an adapter's name just before vLLM reads its files again goes on
over it, as vLLM's own requests under way do; nothing that it computes from then on is saved.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final, Protocol

import structlog

from kvstore.integrations.vllm.file_digests import (
    Signature,
    adapter_digest,
    adapter_files,
    adapter_signature,
)
from kvstore.integrations.vllm.file_times import newer_than_process

__all__ = ["Adapters", "LoraRequest"]

ADAPTERS_MAX: Final = 4_096

_Known = tuple[str, Signature, str | None]
"""Path, its files then, and the name."""

log = structlog.get_logger(__name__)


class LoraRequest(Protocol):
    """What is read of vLLM's own."""

    lora_int_id: int
    lora_path: str
    load_inplace: bool


class Adapters:
    """One event loop's; `still_named` may be asked from any thread."""

    def __init__(self) -> None:
        self._names: dict[int, _Known] = {}
        self._asking = asyncio.Lock()

    async def name_of(self, lora: LoraRequest | None) -> str | None:
        """32 hex digits; empty without an adapter; None for one whose KV has no name."""
        if lora is None:
            return ""
        async with self._asking:
            known = self._names.get(lora.lora_int_id)
            if known is not None and known[2] is None:
                return None
            try:
                name = await self._read(lora, known)
            except OSError as error:
                log.warning("an adapter's KV is not shared", adapter=lora.lora_path, error=str(error))
                return None
            return name

    def still_named(self, lora: LoraRequest | None) -> bool:
        """Whether what this adapter was called is what vLLM computes with. Costs two stats for each of three
        files, which a dead network file system may hold up."""
        known = self._names.get(lora.lora_int_id) if lora is not None else None
        if lora is None or known is None:
            return lora is None
        path, signature, name = known
        if name is None or lora.lora_path != path:
            return False
        try:
            return adapter_signature(Path(path)) == signature
        except OSError:
            return False  # gone, or out of reach: then nobody can say

    async def _read(self, lora: LoraRequest, known: _Known | None) -> str | None:
        if not lora.lora_path:
            raise FileNotFoundError("an adapter without a path")
        folder = Path(lora.lora_path)
        signature = adapter_signature(folder)
        if known is not None:
            if known[:2] == (lora.lora_path, signature) and not lora.load_inplace:
                return known[2]
            name = None
        elif lora.load_inplace or len(self._names) >= ADAPTERS_MAX:
            name = None
        else:
            name = await asyncio.to_thread(adapter_digest, folder)
            if adapter_signature(folder) != signature or newer_than_process(adapter_files(folder)):
                name = None  # it changed while it was read, or vLLM may have read it before
        if name is None:
            log.warning("nobody can say which files an adapter is of: not shared", adapter=lora.lora_path)
        if len(self._names) < ADAPTERS_MAX:
            self._names[lora.lora_int_id] = (lora.lora_path, signature, name)
        return name

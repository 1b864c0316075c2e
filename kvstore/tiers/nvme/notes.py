"""Notes as msgpack, and what of them still matters: the state that a journal is a history of.

    ["life", count, owner]                   a start of the store that wrote something, and whose it is
    ["namespace", id, model, tenant, layout] layout: layers, head begin, head end, head dim, dtype, tokens
    ["epoch", model, number, digest]
    ["advance", model, number, lag, drop]
    ["purge", namespace, epoch | nil, before, [key, ...] | nil]

A purge kills what is of its scope and has a sequence number below `before`: the first one that was not given
out when the purge was noted. Decoding is total: bytes that are none of these raise ConfigError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Protocol

import msgpack

from kvstore.errors import ConfigError
from kvstore.nouns import BlockKey, Epoch, EpochPolicy, KVLayout, NamespaceId, WeightsDigest
from kvstore.tiers.durable import AdvanceNote, EpochNote, NamespaceNote, Note, PurgeNote

StateNote = NamespaceNote | EpochNote | AdvanceNote
Scope = tuple[NamespaceId, int | None]
"""A namespace, or one of its epochs."""

NOTES_MAX: Final = 1 << 22
"""Of one entry."""
_KEYS_OF_A_NOTE: Final = 1 << 16


class Needed(Protocol):
    """What may be on the disks."""

    def is_needless(self, scope: Scope, before: int) -> bool:
        """Whether a purge of that scope can kill nothing."""
        ...

    def has_none_of(self, namespace: NamespaceId) -> bool:
        """Whether no record of that namespace is there."""
        ...


class Purges:
    """Who is dead: in each scope everything below a sequence number, or single keys."""

    def __init__(self) -> None:
        self.whole: dict[Scope, int] = {}
        self.keys: dict[Scope, dict[BlockKey, int]] = {}

    def __bool__(self) -> bool:
        return bool(self.whole or self.keys)

    def add(self, note: PurgeNote, before: int) -> None:
        scope = note.namespace, note.epoch
        if note.keys is None:
            self.whole[scope] = max(before, self.whole.get(scope, 0))
            return
        of_scope = self.keys.setdefault(scope, {})
        for key in note.keys:
            of_scope[key] = max(before, of_scope.get(key, 0))

    def kills(self, namespace: NamespaceId, epoch: int, key: BlockKey, sequence: int) -> bool:
        for scope in ((namespace, None), (namespace, epoch)):
            if sequence < self.whole.get(scope, 0):
                return True
            of_scope = self.keys.get(scope)
            if of_scope is not None and sequence < of_scope.get(key, 0):
                return True
        return False

    def namespaces(self) -> set[NamespaceId]:
        return {scope[0] for scope in (*self.whole, *self.keys)}

    def key_count(self) -> int:
        return sum(map(len, self.keys.values()))

    def added_by(self, note: PurgeNote) -> int:
        """How many keys more are remembered with it."""
        known = self.keys.get((note.namespace, note.epoch), {})
        return sum(key not in known for key in note.keys or ())

    def forget(self, needless: Callable[[Scope, int], bool]) -> None:
        """Drop what `needless(scope, before)` says can kill nothing any more. O(purges)."""
        self.whole = {scope: before for scope, before in self.whole.items() if not needless(scope, before)}
        kept: dict[Scope, dict[BlockKey, int]] = {}
        for scope, of_scope in self.keys.items():
            still = {key: before for key, before in of_scope.items() if not needless(scope, before)}
            if still:
                kept[scope] = still
        self.keys = kept

    def notes(self) -> Iterator[tuple[PurgeNote, int]]:
        for (namespace, epoch), before in self.whole.items():
            yield PurgeNote(namespace, None, epoch), before
        for (namespace, epoch), of_scope in self.keys.items():
            by_number: dict[int, list[BlockKey]] = {}
            for key, before in of_scope.items():
                by_number.setdefault(before, []).append(key)
            for before, keys in by_number.items():
                for first in range(0, len(keys), _KEYS_OF_A_NOTE):
                    some = tuple(keys[first : first + _KEYS_OF_A_NOTE])
                    yield PurgeNote(namespace, some, epoch), before


class NoteState:
    """All that was noted and still matters."""

    def __init__(self) -> None:
        self.lives = 0
        self.owner = ""  # the shard whose blocks these are; empty: nobody said
        self.purges = Purges()
        self._kept: dict[tuple[object, ...], StateNote] = {}  # in the order in which they were taken

    def add(self, note: Note, before: int) -> None:
        if isinstance(note, PurgeNote):
            self.purges.add(note, before)
        elif isinstance(note, NamespaceNote):
            self._kept["namespace", note.id] = note
        elif isinstance(note, EpochNote):
            self._kept["epoch", note.model_id, note.epoch.number] = note
        else:
            # The last one of a model counts, and the last one that dropped what is older.
            for kind in ("advance", "drop") if note.policy.drop_older else ("advance",):
                self._kept.pop((kind, note.model_id), None)
                self._kept[kind, note.model_id] = note

    def notes(self) -> list[StateNote]:
        """Namespaces, epochs and advances, without those that later ones replaced."""
        found: list[StateNote] = []
        for note in self._kept.values():
            if note not in found[-1:]:  # an advance that drops is kept twice, one behind the other
                found.append(note)
        return found

    def note_count(self) -> int:
        """Of notes that a rewrite keeps, without purges of single keys. At most."""
        return 1 + len(self._kept) + len(self.purges.whole)

    def forget(self, oldest: Needed) -> None:
        """Needless purges, and the namespaces that no record and no needed purge is of.

        Only before anybody was told which namespaces are known: who opens one again notes it again. What an
        epoch's number was bound to stays bound.
        """
        self.purges.forget(oldest.is_needless)
        purged = self.purges.namespaces()
        self._kept = {
            name: note
            for name, note in self._kept.items()
            if not isinstance(note, NamespaceNote) or note.id in purged or not oldest.has_none_of(note.id)
        }

    def documents(self) -> list[object]:
        """The whole state, as the first entry of a journal."""
        documents: list[object] = [["life", self.lives, self.owner]]
        documents += [encode_note(note, 0) for note in self.notes()]
        documents += [encode_note(note, before) for note, before in self.purges.notes()]
        return documents

    def apply(self, documents: Iterable[Any], name: str) -> None:
        """What one entry says. Raises ConfigError."""
        for document in documents:
            try:
                kind, *fields = document
                if kind == "life":
                    self.lives = int(fields[0])
                    self.owner = str(fields[1]) if len(fields) > 1 else ""
                else:
                    self.add(*_decode(kind, fields))
            except (TypeError, ValueError, LookupError, OverflowError) as error:
                raise ConfigError(
                    f"{name} holds a note this version cannot read ({error}): start the version that wrote "
                    "it, or empty the tier's directories"
                ) from None


def encode_note(note: Note, before: int) -> list[object]:
    if isinstance(note, NamespaceNote):
        at = note.layout
        layout = [at.layers, at.head_begin, at.head_end, at.head_dim, at.dtype, at.block_tokens]
        return ["namespace", note.id, note.model_id, note.tenant, layout]
    if isinstance(note, EpochNote):
        return ["epoch", note.model_id, note.epoch.number, note.epoch.weights_digest]
    if isinstance(note, AdvanceNote):
        return ["advance", note.model_id, note.number, note.policy.stale_lag_max, note.policy.drop_older]
    keys = None if note.keys is None else list(note.keys)
    return ["purge", note.namespace, note.epoch, before, keys]


def pack(documents: Sequence[object]) -> bytes:
    packed: bytes = msgpack.packb(list(documents), use_bin_type=True)
    return packed


def pack_one(document: object) -> bytes:
    packed: bytes = msgpack.packb(document, use_bin_type=True)
    return packed


def packed_list(documents: Sequence[bytes]) -> bytes:
    """What `pack` makes of documents that are not packed yet."""
    head: bytes = msgpack.Packer(autoreset=True).pack_array_header(len(documents))
    return b"".join((head, *documents))


def unpack(body: bytes | memoryview, name: str) -> list[Any]:
    """Raises ConfigError for what is no list of notes."""
    try:
        found = msgpack.unpackb(body, raw=False, max_array_len=NOTES_MAX, max_map_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        raise ConfigError(
            f"{name} holds an entry that is no msgpack ({error}): empty the directories"
        ) from None
    if not isinstance(found, list):
        raise ConfigError(f"{name} holds an entry that is no list of notes: empty the directories")
    return found


def _decode(kind: str, fields: list[Any]) -> tuple[Note, int]:
    if kind == "namespace":
        namespace, model_id, tenant, layout = fields
        return NamespaceNote(NamespaceId(bytes(namespace)), str(model_id), str(tenant), KVLayout(*layout)), 0
    if kind == "epoch":
        model_id, number, digest = fields
        return EpochNote(str(model_id), Epoch(int(number), WeightsDigest(bytes(digest)))), 0
    if kind == "advance":
        model_id, number, lag, drop = fields
        return AdvanceNote(str(model_id), int(number), EpochPolicy(int(lag), bool(drop))), 0
    if kind == "purge":
        namespace, epoch, before, keys = fields
        scope = None if keys is None else tuple(BlockKey(bytes(key)) for key in keys)
        note = PurgeNote(NamespaceId(bytes(namespace)), scope, None if epoch is None else int(epoch))
        return note, int(before)
    raise ValueError(f"unknown kind {kind!r}")

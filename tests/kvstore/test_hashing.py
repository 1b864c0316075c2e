"""Promise 1: identities are cryptographic and never drift. Golden vectors: a change here empties caches."""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.hashing import (
    STRIPE_BLOCKS,
    KeyChain,
    block_key,
    namespace_id,
    placement_keys,
    tenant_salt,
)
from kvstore.nouns import ROOT_KEY, BlockKey, KVLayout, NamespaceId, NamespaceSpec

NAMESPACE = NamespaceId(bytes(range(16)))
LAYOUT = KVLayout(30, 0, 3, 64, "float32")
SPEC = NamespaceSpec("smollm2-135m", LAYOUT, tokenizer_digest=bytes(range(16)))
SECRET = b"a cluster secret of some length"

FIRST = BlockKey(bytes.fromhex("f3935ae2d656627e23d7d6e9ca5c5c3f78064abcc96dd7de62afb9c62ce0207b"))
SECOND = BlockKey(bytes.fromhex("1f7c68fccf8996cf396d9b7a84ebe1b9fe1a819bb053dbe56e78ad6c60d7c611"))

KEYS = [
    (ROOT_KEY, [1, 2, 3, 4], bytes(32), FIRST.hex()),
    (FIRST, [5, 6, 7, 8], bytes(32), SECOND.hex()),
    (
        FIRST,
        [5, 6, 7, 8],
        bytes([1] * 32),
        "6a7a09e970057a1c51a6cc8e9a3b993f40c79fc04419fe8723f56ad38b8711ef",
    ),
    (ROOT_KEY, [2**32 - 1, 0], bytes(32), "086a350fa51897cc6cb7278c733439f2ed82e30e5a0768f4c13762ca0d69820d"),
]


@pytest.mark.parametrize(("parent", "tokens", "extra", "golden"), KEYS)
def test_key_golden_vectors(parent: BlockKey, tokens: list[int], extra: bytes, golden: str) -> None:
    assert block_key(parent, NAMESPACE, tokens, extra).hex() == golden


def test_a_key_is_what_the_design_says() -> None:
    spelled = (
        b"kvstrata.block\0" + b"\x01\x00" + bytes(32) + NAMESPACE + bytes(32) + struct.pack("<4I", 1, 2, 3, 4)
    )
    assert hashlib.sha256(spelled).digest() == FIRST


def test_layout_golden_vector() -> None:
    assert LAYOUT.fingerprint.hex() == "161a947e9cd8951b45bc09cf8f10907a"
    numbers = struct.pack("<5I", 30, 0, 3, 64, 32)
    assert LAYOUT.canonical() == b"kvstrata.layout.1\0" + numbers + b"float32\0"


def test_namespace_golden_vector() -> None:
    salt = tenant_salt(SECRET, "alice")
    assert salt.hex() == "e70762d7bab49fe69995d61a77d57f22f9f3b95708bd0d8ac9eed304f96945d0"
    assert namespace_id(salt, SPEC).hex() == "0216a8430ec6d290a607187df0a09968"


def test_a_namespace_is_what_the_design_says() -> None:
    fields = [b"smollm2-135m", bytes(16), bytes(range(16)), LAYOUT.canonical()]
    spelled = b"kvstrata.namespace.1\0" + b"".join(len(f).to_bytes(4, "little") + f for f in fields)
    salt = hmac.digest(SECRET, b"kvstrata.tenant.1\0alice", "sha256")
    assert namespace_id(salt, SPEC) == hmac.digest(salt, spelled, "sha256")[:16]


OTHERS = [
    ("model", replace(SPEC, model_id="smollm2-135n")),
    ("tokenizer", replace(SPEC, tokenizer_digest=bytes(16))),
    ("adapter", replace(SPEC, adapter_digest=bytes([1] * 16))),
    ("layers", replace(SPEC, layout=replace(LAYOUT, layers=31))),
    ("heads", replace(SPEC, layout=replace(LAYOUT, head_begin=1))),
    ("head dim", replace(SPEC, layout=replace(LAYOUT, head_dim=32))),
    ("block", replace(SPEC, layout=replace(LAYOUT, block_tokens=16))),
    ("dtype", replace(SPEC, layout=replace(LAYOUT, dtype="bfloat16"))),
]


@pytest.mark.parametrize(("field", "other"), OTHERS, ids=[name for name, _ in OTHERS])
def test_whatever_changes_the_bytes_changes_the_namespace(field: str, other: NamespaceSpec) -> None:
    salt = tenant_salt(SECRET, "alice")
    assert namespace_id(salt, other) != namespace_id(salt, SPEC), field


def test_tenants_and_clusters_never_share_a_namespace() -> None:
    salts = {tenant_salt(secret, who) for secret in (SECRET, SECRET + b"!") for who in ("alice", "bob")}
    assert len({namespace_id(salt, SPEC) for salt in salts}) == 4


def test_an_extra_digest_has_one_length() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        block_key(ROOT_KEY, NAMESPACE, [1], b"short")


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.lists(st.integers(1, 9), max_size=8))
def test_a_chain_does_not_care_how_tokens_arrive(tokens: list[int], cuts: list[int]) -> None:
    whole, pieces = KeyChain(NAMESPACE, 4), KeyChain(NAMESPACE, 4)
    whole.extend(tokens)
    rest = list(tokens)
    for cut in cuts:
        pieces.extend(rest[:cut])
        del rest[:cut]
    pieces.extend(rest)
    assert (pieces.keys, pieces.pending) == (whole.keys, whole.pending)
    assert len(whole.keys) == len(tokens) // 4


def test_a_stripe_shares_its_first_blocks_key() -> None:
    chain = KeyChain(NAMESPACE, 1)
    chain.extend(range(2 * STRIPE_BLOCKS + 1))
    assert chain.parent(0) == ROOT_KEY
    assert chain.parent(5) == chain.keys[4]
    assert placement_keys(chain.keys) == [chain.placement(i) for i in range(len(chain.keys))]
    assert chain.placement(STRIPE_BLOCKS - 1) == chain.keys[0]
    assert chain.placement(STRIPE_BLOCKS) == chain.keys[STRIPE_BLOCKS]

"""Promise 1, threat model: who calls is known before anything is done, and names only what is its own."""

from __future__ import annotations

import hmac

import pytest

from kvstore.access import (
    NAMESPACES_A_TENANT,
    TRUSTED,
    Caller,
    Callers,
    NamespaceOwners,
    Tenant,
    acting_tenant,
)
from kvstore.errors import (
    ConfigError,
    KVStrataError,
    NotFound,
    OverLimit,
    PermissionDenied,
    Unauthenticated,
)
from kvstore.nouns import NamespaceId, NamespaceSpec
from tests.kvstore.oracle import LAYOUT, SPEC

ALICE, BOB = Tenant("alice", "a-token", "alice.example"), Tenant("bob", "b-token", "bob.example")
CALLERS = Callers("c-token", [ALICE, BOB])


@pytest.mark.parametrize(
    ("authorization", "names", "is_"),
    [
        ("Bearer c-token", (), TRUSTED),
        ("Bearer a-token", (), Caller("alice", False)),
        ("Bearer b-token", ("someone.example",), Caller("bob", False)),
        ("", ("x", "alice.example"), Caller("alice", False)),
        ("Bearer a-token", ("alice.example",), Caller("alice", False)),
        ("Bearer c-token", ("alice.example",), TRUSTED),
        ("", (), Unauthenticated),
        ("", ("someone.example",), Unauthenticated),
        ("Bearer nobody's", ("alice.example",), Unauthenticated),
        ("Bearer a-token", ("bob.example",), Unauthenticated),
        ("", ("alice.example", "bob.example"), Unauthenticated),
        ("a-token", (), Unauthenticated),
        ("Bearer ", (), Unauthenticated),
        ("Bearer c-token ", (), Unauthenticated),
        ("Bearer \udcff", (), Unauthenticated),
    ],
)
def test_who_calls(authorization: str, names: tuple[str, ...], is_: Caller | type[KVStrataError]) -> None:
    if isinstance(is_, Caller):
        assert CALLERS.identify(authorization, names) == is_
    else:
        with pytest.raises(is_):
            CALLERS.identify(authorization, names)


def test_every_token_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """An early exit would tell by its time which tenant's token begins like the one shown."""
    compared: list[bytes] = []

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for shown in ("Bearer c-token", "Bearer b-token", "Bearer wrong", ""):
        compared.clear()
        CALLERS.by_token(shown)
        assert len(set(compared)) == 3
    assert {len(digest) for digest in compared} == {32}, "of one length, whatever the tokens are"


def test_a_shard_without_tokens_trusts_who_reaches_it() -> None:
    assert Callers(None).identify("") is TRUSTED
    assert Callers(None).identify("Bearer anything") is TRUSTED


@pytest.mark.parametrize(
    ("cluster", "tenants", "says"),
    [
        (None, [ALICE], "without one everybody is trusted"),
        ("a-token", [ALICE], "two callers with one token"),
        ("c", [ALICE, Tenant("carol", "x", "alice.example")], "one certificate name"),
        ("c", [ALICE, Tenant("alice", "x")], "listed twice"),
    ],
)
def test_callers_that_nothing_tells_apart_are_refused(
    cluster: str | None, tenants: list[Tenant], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        Callers(cluster, tenants)
    with pytest.raises(ConfigError, match="cannot be told from others"):
        Tenant("nobody")


def test_tokens_are_never_printed() -> None:
    assert "token" not in repr(ALICE).replace("token=", "")
    assert "a-token" not in repr(ALICE) + repr(CALLERS) + repr(vars(CALLERS))


def test_whom_a_call_is_made_for() -> None:
    alice = Caller("alice", False)
    assert [acting_tenant(TRUSTED, name) for name in ("alice", "")] == ["alice", "default"]
    assert [acting_tenant(alice, name) for name in ("alice", "", "default")] == ["alice"] * 3
    with pytest.raises(PermissionDenied, match="cannot act for another"):
        acting_tenant(alice, "bob")
    with pytest.raises(ConfigError, match="at most 256"):
        acting_tenant(TRUSTED, "x" * 257)


def test_a_namespace_is_its_tenants() -> None:
    owners, mine, theirs = NamespaceOwners(), NamespaceId(b"m" * 16), NamespaceId(b"t" * 16)
    owners.opened(mine, "alice", SPEC)
    owners.opened(theirs, "bob", SPEC)
    owners.check(Caller("alice", False), mine)
    with pytest.raises(PermissionDenied, match="not tenant alice's"):
        owners.check(Caller("alice", False), theirs)
    with pytest.raises(NotFound, match="open it first"):
        owners.check(Caller("alice", False), NamespaceId(bytes(16)))
    for namespace in (mine, theirs, NamespaceId(bytes(16))):
        owners.check(TRUSTED, namespace)


def test_a_tenant_leaves_room_for_others() -> None:
    owners, alice = NamespaceOwners(), Caller("alice", False)
    specs = [NamespaceSpec(f"m{i}", LAYOUT, bytes(16)) for i in range(NAMESPACES_A_TENANT)]
    for i, spec in enumerate(specs):
        owners.admit(alice, spec)
        owners.opened(NamespaceId(i.to_bytes(16, "big")), "alice", spec)
    with pytest.raises(OverLimit, match="256 namespaces"):
        owners.admit(alice, SPEC)
    owners.admit(alice, specs[3])  # open already
    owners.admit(Caller("bob", False), SPEC)
    owners.admit(TRUSTED, SPEC)

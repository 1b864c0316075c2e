"""Any bytes a peer sends give a value or one error of our tree: a row for every message of the wire."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.access import TRUSTED, Caller, NamespaceOwners
from kvstore.core.retention import Retention
from kvstore.errors import ERRORS, ConfigError, KVStrataError
from kvstore.nouns import (
    ROOT_KEY,
    BlockKey,
    ChangeKind,
    Epoch,
    NamespaceId,
    Quality,
    ShardId,
    WeightsDigest,
)
from kvstore.transport.base import BlockOffer
from kvstore.transport.grpc import faults, methods, wire, wire_history
from kvstore.transport.grpc.control_service import Call, ControlService, Served
from kvstore.transport.grpc.methods import Method
from kvstore.v1 import control_pb2 as control
from tests.kvstore.oracle import TIMEOUT, new_driver

BYTES = st.one_of(
    st.binary(max_size=80),
    st.sampled_from([b"", bytes(15), bytes(16), bytes(17), bytes(32), bytes(33), bytes(64), b"\xff" * 32]),
)
NUMBERS = {
    "TYPE_UINT64": st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)),
    "TYPE_FIXED64": st.one_of(st.integers(0, 8), st.integers(0, 2**64 - 1)),
    "TYPE_UINT32": st.one_of(st.sampled_from([0, 1, 2, 400, 700, 800, 1000]), st.integers(0, 2**32 - 1)),
    "TYPE_ENUM": st.integers(0, 5),
    "TYPE_BOOL": st.booleans(),
    "TYPE_DOUBLE": st.floats(),
}
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(["float32", "absent", "exists", "Match", "m" * 300]))


def messages(kind: type[Message]) -> st.SearchStrategy[Message]:
    """Messages of one type whose every field is anything its type allows, most often of a likely size."""

    @st.composite
    def draw_one(draw: Callable[[Any], Any]) -> Message:
        made = kind()
        for field in kind.DESCRIPTOR.fields:
            if not draw(st.integers(0, 9)):
                continue  # absent
            values = _values(field)
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                continue
            repeated: Any = getattr(made, field.name)
            if hasattr(repeated, "extend"):
                repeated.extend(draw(st.lists(values, max_size=3)))
            elif field.message_type is not None:
                getattr(made, field.name).CopyFrom(draw(values))
            else:
                setattr(made, field.name, draw(values))
        return made

    return draw_one()


def _values(field: Any) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(field.message_type._concrete_class)
    if field.type == field.TYPE_STRING:
        return TEXTS
    if field.type == field.TYPE_BYTES:
        return BYTES
    return next(made for name, made in NUMBERS.items() if field.type == getattr(field, name))


_TOPOLOGY: set[Method[Any, Any]] = {methods.GET_TOPOLOGY}
ASKED = sorted(methods.UNARY | _TOPOLOGY, key=lambda method: method.name)


def served() -> dict[str, Served]:
    made = ControlService(new_driver(), NamespaceOwners()).served
    return {method.name: one for method, one in made.items()}


def to_its_end(served: Served, request: bytes, caller: Caller) -> bytes:
    """Of a call that does not wait: none of an empty shard does."""
    answering = served.answer(request, Call(caller, TIMEOUT, admin=True))
    try:
        answering.send(None)
    except StopIteration as answered:
        answer: bytes = answered.value
        return answer
    finally:
        answering.close()
    raise AssertionError("it waits")


@pytest.mark.parametrize("name", [m.name for m in ASKED if m not in (methods.PURGE, methods.REPORT)])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_shard_answers_any_request_or_names_the_error(name: str, data: st.DataObject) -> None:
    one = served()[name]
    request = data.draw(
        st.one_of(st.binary(max_size=60), messages(one.method.asked).map(lambda m: m.SerializeToString()))
    )
    caller = data.draw(st.sampled_from([TRUSTED, Caller("alice", False)]))
    try:
        answer = to_its_end(one, request, caller)
    except tuple(ERRORS.values()):
        return
    one.method.answer.FromString(answer)


REQUESTS: dict[str, tuple[type[Message], Callable[[Any], object]]] = {
    "watch": (
        control.WatchRequest,
        lambda m: (wire_history.namespaces_in(m.namespace_ids), wire_history.after_in(m)),
    ),
    "purge": (control.PurgeRequest, wire_history.scope_in),
    "offers": (control.BeginRequest, wire.offers_in),
    "snapshot": (control.MatchRequest, wire.snapshot_in),
    "announcement": (control.AnnounceRequest, wire.snapshot_in),
    "spec": (control.OpenNamespaceRequest, wire.spec_in),
}


@pytest.mark.parametrize("what", REQUESTS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_request_is_a_value_or_a_config_error(what: str, data: st.DataObject) -> None:
    kind, decode = REQUESTS[what]
    with contextlib.suppress(ConfigError):
        decode(data.draw(messages(kind)))


ANSWERS: dict[str, tuple[type[Message], Callable[[Any], object]]] = {
    "match": (control.MatchResponse, lambda m: wire.match_result_in(m, 2)),
    "announce": (control.AnnounceResponse, lambda m: wire.announced_in(m, 2)),
    "begin": (control.BeginResponse, lambda m: wire.refusals_in(m.refusals)),
    "commit": (control.CommitResponse, lambda m: wire.commit_in(ShardId("s"), m)),
    "epochs": (control.ShowEpochsResponse, wire_history.epochs_in),
    "list": (control.ListResponse, wire_history.page_in),
    "watch": (control.WatchResponse, wire_history.batch_in),
    "purge": (control.PurgeResponse, wire_history.purged_in),
    "status": (control.StatusResponse, wire.status_in),
    "namespace": (control.OpenNamespaceResponse, lambda m: wire.namespace_in(m.namespace_id)),
}


@pytest.mark.parametrize("what", ANSWERS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_an_answer_is_a_value_or_not_understood(what: str, data: st.DataObject) -> None:
    """ValueError and ConfigError are what the transport turns into Unavailable."""
    kind, decode = ANSWERS[what]
    message = data.draw(messages(kind))
    try:
        value: Any = decode(message)
    except (ValueError, ConfigError):
        return
    if what == "match":
        assert len(value.pinned(ShardId("s"), [bytes(32)] * 9)) == len(value)


@given(st.text(max_size=20), st.text(max_size=20), st.integers(0, 2**32))
def test_any_named_error_is_one_of_ours(name: str, detail: str, retry_ms: int) -> None:
    for said in (name, *ERRORS):
        assert isinstance(faults.named(said, detail, retry_ms, "s"), KVStrataError)


def test_change_kinds_are_the_protos_own() -> None:
    numbers = {f"CHANGE_KIND_{kind.name}": int(kind) for kind in ChangeKind}
    assert dict(control.ChangeKind.items()) == numbers | {"CHANGE_KIND_UNSPECIFIED": 0}


def test_the_table_names_every_call_of_the_protos() -> None:
    own = control.DESCRIPTOR.services_by_name["ControlService"].methods_by_name
    assert {m.name for m in methods.UNARY} | {"Watch", "Pipeline"} == set(own)
    streams: set[Method[Any, Any]] = {methods.WATCH, methods.PIPELINE}
    for method in methods.UNARY | streams:
        assert own[method.name].input_type.full_name == method.asked.DESCRIPTOR.full_name
        assert own[method.name].output_type.full_name == method.answer.DESCRIPTOR.full_name


def begin_of(retentions: list[Retention | None]) -> control.BeginRequest:
    offers = [
        BlockOffer(BlockKey(bytes([i]) * 32), ROOT_KEY, 0, ROOT_KEY, 1, r) for i, r in enumerate(retentions)
    ]
    epoch = Epoch(1, WeightsDigest(bytes(16)))
    return wire.begin_out(NamespaceId(bytes(16)), epoch, Quality.LOSSLESS, offers, "w", 1.0, bytes(16))


RETENTIONS = st.none() | st.builds(
    Retention, st.integers(0, 100), st.none() | st.integers(1, 2_592_000_000).map(lambda ms: ms / 1000)
)


@given(st.lists(RETENTIONS, max_size=5))
def test_what_offers_are_worth_arrives_as_it_was_said(retentions: list[Retention | None]) -> None:
    arrived = control.BeginRequest.FromString(begin_of(retentions).SerializeToString())
    assert [offer.retention for offer in wire.offers_in(arrived)] == retentions


def test_a_peer_that_knows_nothing_of_retention_says_nothing_and_is_told_nothing() -> None:
    older = begin_of([None, None])
    assert (list(older.priorities), list(older.ttls_ms)) == ([], [])
    assert [offer.retention for offer in wire.offers_in(older)] == [None, None]


@pytest.mark.parametrize(
    ("priorities", "ttls_ms"),
    [([1], [0]), ([1, 1], []), ([], [0, 0]), ([102, 1], [0, 0]), ([1, 1], [0, 1 << 63])],
)
def test_columns_of_retention_that_do_not_fit_are_refused(priorities: list[int], ttls_ms: list[int]) -> None:
    request = begin_of([None, None])
    request.priorities.extend(priorities)
    request.ttls_ms.extend(ttls_ms)
    with pytest.raises(ConfigError):
        wire.offers_in(request)

"""Every RPC of the wire, typed, by its full name: what protoc's gRPC plugin would generate, in a page.

Client and server are both built from this table, so that they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from google.protobuf.message import Message

from kvstore.v1 import blocks_pb2 as blocks
from kvstore.v1 import control_pb2 as control
from kvstore.v1 import topology_pb2 as topology

Asked = TypeVar("Asked", bound=Message)
Answer = TypeVar("Answer", bound=Message)

CONTROL: Final = "kvstore.v1.ControlService"
BLOCKS: Final = "kvstore.v1.BlocksService"
TOPOLOGY: Final = "kvstore.v1.TopologyService"


@dataclass(frozen=True, slots=True)
class Method(Generic[Asked, Answer]):
    service: str
    name: str
    asked: type[Asked]
    answer: type[Answer]

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"

    def codec(self) -> dict[str, Any]:
        """Serialisers for a channel's multi-callable."""
        return {
            "request_serializer": self.asked.SerializeToString,
            "response_deserializer": self.answer.FromString,
        }


HELLO = Method(CONTROL, "Hello", control.HelloRequest, control.HelloResponse)
OPEN_NAMESPACE = Method(CONTROL, "OpenNamespace", control.OpenNamespaceRequest, control.OpenNamespaceResponse)
REGISTER_EPOCH = Method(CONTROL, "RegisterEpoch", control.RegisterEpochRequest, control.RegisterEpochResponse)
ADVANCE_EPOCH = Method(CONTROL, "AdvanceEpoch", control.AdvanceEpochRequest, control.AdvanceEpochResponse)
SHOW_EPOCHS = Method(CONTROL, "ShowEpochs", control.ShowEpochsRequest, control.ShowEpochsResponse)
SHOW_NAMESPACES = Method(
    CONTROL, "ShowNamespaces", control.ShowNamespacesRequest, control.ShowNamespacesResponse
)
MATCH = Method(CONTROL, "Match", control.MatchRequest, control.MatchResponse)
ANNOUNCE = Method(CONTROL, "Announce", control.AnnounceRequest, control.AnnounceResponse)
RENEW = Method(CONTROL, "Renew", control.RenewRequest, control.RenewResponse)
RELEASE = Method(CONTROL, "Release", control.ReleaseRequest, control.ReleaseResponse)
BEGIN = Method(CONTROL, "Begin", control.BeginRequest, control.BeginResponse)
COMMIT = Method(CONTROL, "Commit", control.CommitRequest, control.CommitResponse)
ABORT = Method(CONTROL, "Abort", control.AbortRequest, control.AbortResponse)
REPORT = Method(CONTROL, "Report", control.ReportRequest, control.ReportResponse)
LIST = Method(CONTROL, "List", control.ListRequest, control.ListResponse)
WATCH = Method(CONTROL, "Watch", control.WatchRequest, control.WatchResponse)
PURGE = Method(CONTROL, "Purge", control.PurgeRequest, control.PurgeResponse)
COMPACT = Method(CONTROL, "Compact", control.CompactRequest, control.CompactResponse)
STATUS = Method(CONTROL, "Status", control.StatusRequest, control.StatusResponse)
PIPELINE = Method(CONTROL, "Pipeline", control.PipelineRequest, control.PipelineResponse)
READ = Method(BLOCKS, "Read", blocks.ReadRequest, blocks.ReadResponse)
WRITE = Method(BLOCKS, "Write", blocks.WriteRequest, blocks.WriteResponse)
GET_TOPOLOGY = Method(TOPOLOGY, "GetTopology", topology.GetTopologyRequest, topology.GetTopologyResponse)

ADMIN: Final[frozenset[Method[Any, Any]]] = frozenset({ADVANCE_EPOCH, PURGE, COMPACT})
"""Answered on the admin listener only."""
UNARY: Final[frozenset[Method[Any, Any]]] = frozenset(
    {
        HELLO,
        OPEN_NAMESPACE,
        REGISTER_EPOCH,
        ADVANCE_EPOCH,
        SHOW_EPOCHS,
        SHOW_NAMESPACES,
        MATCH,
        ANNOUNCE,
        RENEW,
        RELEASE,
        BEGIN,
        COMMIT,
        ABORT,
        REPORT,
        LIST,
        PURGE,
        COMPACT,
        STATUS,
    }
)
"""What the control service answers with one message."""
PIPELINED: Final[frozenset[Method[Any, Any]]] = UNARY - {HELLO}

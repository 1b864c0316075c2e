from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChangeKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHANGE_KIND_UNSPECIFIED: _ClassVar[ChangeKind]
    CHANGE_KIND_COMMITTED: _ClassVar[ChangeKind]
    CHANGE_KIND_RETIRED: _ClassVar[ChangeKind]
    CHANGE_KIND_EPOCH: _ClassVar[ChangeKind]
    CHANGE_KIND_PURGED: _ClassVar[ChangeKind]
    CHANGE_KIND_MOVED: _ClassVar[ChangeKind]
CHANGE_KIND_UNSPECIFIED: ChangeKind
CHANGE_KIND_COMMITTED: ChangeKind
CHANGE_KIND_RETIRED: ChangeKind
CHANGE_KIND_EPOCH: ChangeKind
CHANGE_KIND_PURGED: ChangeKind
CHANGE_KIND_MOVED: ChangeKind

class HelloRequest(_message.Message):
    __slots__ = ("wire_versions", "client")
    WIRE_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    wire_versions: _containers.RepeatedScalarFieldContainer[int]
    client: str
    def __init__(self, wire_versions: _Optional[_Iterable[int]] = ..., client: _Optional[str] = ...) -> None: ...

class HelloResponse(_message.Message):
    __slots__ = ("wire_version", "disk_version", "shard", "incarnation", "shm_socket")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DISK_VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SHM_SOCKET_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    disk_version: int
    shard: str
    incarnation: int
    shm_socket: str
    def __init__(self, wire_version: _Optional[int] = ..., disk_version: _Optional[int] = ..., shard: _Optional[str] = ..., incarnation: _Optional[int] = ..., shm_socket: _Optional[str] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("layers", "head_begin", "head_end", "head_dim", "block_tokens", "dtype")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEAD_BEGIN_FIELD_NUMBER: _ClassVar[int]
    HEAD_END_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    layers: int
    head_begin: int
    head_end: int
    head_dim: int
    block_tokens: int
    dtype: str
    def __init__(self, layers: _Optional[int] = ..., head_begin: _Optional[int] = ..., head_end: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_tokens: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class Epoch(_message.Message):
    __slots__ = ("number", "weights_digest")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    number: int
    weights_digest: bytes
    def __init__(self, number: _Optional[int] = ..., weights_digest: _Optional[bytes] = ...) -> None: ...

class Revision(_message.Message):
    __slots__ = ("incarnation", "counter")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    counter: int
    def __init__(self, incarnation: _Optional[int] = ..., counter: _Optional[int] = ...) -> None: ...

class OpenNamespaceRequest(_message.Message):
    __slots__ = ("model_id", "layout", "tokenizer_digest", "adapter_digest", "tenant")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    layout: Layout
    tokenizer_digest: bytes
    adapter_digest: bytes
    tenant: str
    def __init__(self, model_id: _Optional[str] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., tokenizer_digest: _Optional[bytes] = ..., adapter_digest: _Optional[bytes] = ..., tenant: _Optional[str] = ...) -> None: ...

class OpenNamespaceResponse(_message.Message):
    __slots__ = ("namespace_id",)
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    def __init__(self, namespace_id: _Optional[bytes] = ...) -> None: ...

class RegisterEpochRequest(_message.Message):
    __slots__ = ("model_id", "epoch")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    epoch: Epoch
    def __init__(self, model_id: _Optional[str] = ..., epoch: _Optional[_Union[Epoch, _Mapping]] = ...) -> None: ...

class RegisterEpochResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AdvanceEpochRequest(_message.Message):
    __slots__ = ("model_id", "number", "stale_lag_max", "drop_older")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STALE_LAG_MAX_FIELD_NUMBER: _ClassVar[int]
    DROP_OLDER_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    number: int
    stale_lag_max: int
    drop_older: bool
    def __init__(self, model_id: _Optional[str] = ..., number: _Optional[int] = ..., stale_lag_max: _Optional[int] = ..., drop_older: bool = ...) -> None: ...

class AdvanceEpochResponse(_message.Message):
    __slots__ = ("revision",)
    REVISION_FIELD_NUMBER: _ClassVar[int]
    revision: Revision
    def __init__(self, revision: _Optional[_Union[Revision, _Mapping]] = ...) -> None: ...

class ShowEpochsRequest(_message.Message):
    __slots__ = ("model_id",)
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    def __init__(self, model_id: _Optional[str] = ...) -> None: ...

class ShowEpochsResponse(_message.Message):
    __slots__ = ("epochs", "current", "stale_lag_max", "oldest")
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    STALE_LAG_MAX_FIELD_NUMBER: _ClassVar[int]
    OLDEST_FIELD_NUMBER: _ClassVar[int]
    epochs: _containers.RepeatedCompositeFieldContainer[Epoch]
    current: int
    stale_lag_max: int
    oldest: int
    def __init__(self, epochs: _Optional[_Iterable[_Union[Epoch, _Mapping]]] = ..., current: _Optional[int] = ..., stale_lag_max: _Optional[int] = ..., oldest: _Optional[int] = ...) -> None: ...

class ShowNamespacesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShowNamespacesResponse(_message.Message):
    __slots__ = ("namespaces",)
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[KnownNamespace]
    def __init__(self, namespaces: _Optional[_Iterable[_Union[KnownNamespace, _Mapping]]] = ...) -> None: ...

class KnownNamespace(_message.Message):
    __slots__ = ("namespace_id", "model_id", "tenant", "block_nbytes")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_NBYTES_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    model_id: str
    tenant: str
    block_nbytes: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., model_id: _Optional[str] = ..., tenant: _Optional[str] = ..., block_nbytes: _Optional[int] = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("namespace_id", "epoch", "min_quality", "stale_lag_max", "revision", "keys", "owner", "lease_ms")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MIN_QUALITY_FIELD_NUMBER: _ClassVar[int]
    STALE_LAG_MAX_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    epoch: Epoch
    min_quality: int
    stale_lag_max: int
    revision: Revision
    keys: bytes
    owner: str
    lease_ms: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., epoch: _Optional[_Union[Epoch, _Mapping]] = ..., min_quality: _Optional[int] = ..., stale_lag_max: _Optional[int] = ..., revision: _Optional[_Union[Revision, _Mapping]] = ..., keys: _Optional[bytes] = ..., owner: _Optional[str] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class MatchResponse(_message.Message):
    __slots__ = ("slots", "generations", "qualities", "tiers", "nbytes", "lease", "miss", "revision", "epochs", "epoch_indexes")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    QUALITIES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_INDEXES_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    qualities: _containers.RepeatedScalarFieldContainer[int]
    tiers: _containers.RepeatedScalarFieldContainer[int]
    nbytes: _containers.RepeatedScalarFieldContainer[int]
    lease: int
    miss: str
    revision: Revision
    epochs: _containers.RepeatedCompositeFieldContainer[Epoch]
    epoch_indexes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, slots: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., qualities: _Optional[_Iterable[int]] = ..., tiers: _Optional[_Iterable[int]] = ..., nbytes: _Optional[_Iterable[int]] = ..., lease: _Optional[int] = ..., miss: _Optional[str] = ..., revision: _Optional[_Union[Revision, _Mapping]] = ..., epochs: _Optional[_Iterable[_Union[Epoch, _Mapping]]] = ..., epoch_indexes: _Optional[_Iterable[int]] = ...) -> None: ...

class AnnounceRequest(_message.Message):
    __slots__ = ("namespace_id", "epoch", "min_quality", "stale_lag_max", "revision", "keys", "wait_ms")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MIN_QUALITY_FIELD_NUMBER: _ClassVar[int]
    STALE_LAG_MAX_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    epoch: Epoch
    min_quality: int
    stale_lag_max: int
    revision: Revision
    keys: bytes
    wait_ms: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., epoch: _Optional[_Union[Epoch, _Mapping]] = ..., min_quality: _Optional[int] = ..., stale_lag_max: _Optional[int] = ..., revision: _Optional[_Union[Revision, _Mapping]] = ..., keys: _Optional[bytes] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class AnnounceResponse(_message.Message):
    __slots__ = ("tiers", "coming", "coming_nbytes", "promotion_nbytes_s")
    TIERS_FIELD_NUMBER: _ClassVar[int]
    COMING_FIELD_NUMBER: _ClassVar[int]
    COMING_NBYTES_FIELD_NUMBER: _ClassVar[int]
    PROMOTION_NBYTES_S_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedScalarFieldContainer[int]
    coming: int
    coming_nbytes: int
    promotion_nbytes_s: float
    def __init__(self, tiers: _Optional[_Iterable[int]] = ..., coming: _Optional[int] = ..., coming_nbytes: _Optional[int] = ..., promotion_nbytes_s: _Optional[float] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("leases", "lease_ms")
    LEASES_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedScalarFieldContainer[int]
    lease_ms: int
    def __init__(self, leases: _Optional[_Iterable[int]] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("held",)
    HELD_FIELD_NUMBER: _ClassVar[int]
    held: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, held: _Optional[_Iterable[bool]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, leases: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BeginRequest(_message.Message):
    __slots__ = ("namespace_id", "epoch", "quality", "keys", "parents", "placements", "chain_indexes", "nbytes", "owner", "lease_ms", "request_id", "priorities", "ttls_ms")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    CHAIN_INDEXES_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITIES_FIELD_NUMBER: _ClassVar[int]
    TTLS_MS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    epoch: Epoch
    quality: int
    keys: bytes
    parents: bytes
    placements: bytes
    chain_indexes: _containers.RepeatedScalarFieldContainer[int]
    nbytes: _containers.RepeatedScalarFieldContainer[int]
    owner: str
    lease_ms: int
    request_id: bytes
    priorities: _containers.RepeatedScalarFieldContainer[int]
    ttls_ms: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, namespace_id: _Optional[bytes] = ..., epoch: _Optional[_Union[Epoch, _Mapping]] = ..., quality: _Optional[int] = ..., keys: _Optional[bytes] = ..., parents: _Optional[bytes] = ..., placements: _Optional[bytes] = ..., chain_indexes: _Optional[_Iterable[int]] = ..., nbytes: _Optional[_Iterable[int]] = ..., owner: _Optional[str] = ..., lease_ms: _Optional[int] = ..., request_id: _Optional[bytes] = ..., priorities: _Optional[_Iterable[int]] = ..., ttls_ms: _Optional[_Iterable[int]] = ...) -> None: ...

class BeginResponse(_message.Message):
    __slots__ = ("txn", "refusals")
    TXN_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    txn: int
    refusals: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, txn: _Optional[int] = ..., refusals: _Optional[_Iterable[str]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("txn", "pin_for_ms")
    TXN_FIELD_NUMBER: _ClassVar[int]
    PIN_FOR_MS_FIELD_NUMBER: _ClassVar[int]
    txn: int
    pin_for_ms: int
    def __init__(self, txn: _Optional[int] = ..., pin_for_ms: _Optional[int] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("revision", "refusals", "slots", "generations", "lease")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    revision: Revision
    refusals: _containers.RepeatedScalarFieldContainer[str]
    slots: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    lease: int
    def __init__(self, revision: _Optional[_Union[Revision, _Mapping]] = ..., refusals: _Optional[_Iterable[str]] = ..., slots: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., lease: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("txn",)
    TXN_FIELD_NUMBER: _ClassVar[int]
    txn: int
    def __init__(self, txn: _Optional[int] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("incarnation", "slots", "generations", "namespace_id")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    namespace_id: bytes
    def __init__(self, incarnation: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., namespace_id: _Optional[bytes] = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ("retired",)
    RETIRED_FIELD_NUMBER: _ClassVar[int]
    retired: int
    def __init__(self, retired: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("namespace_id", "revision", "cursor", "limit")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    revision: Revision
    cursor: int
    limit: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., revision: _Optional[_Union[Revision, _Mapping]] = ..., cursor: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("revision", "keys", "epoch_numbers", "weights_digests", "qualities", "tiers", "created", "nbytes", "next_cursor")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_NUMBERS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    QUALITIES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    NEXT_CURSOR_FIELD_NUMBER: _ClassVar[int]
    revision: Revision
    keys: bytes
    epoch_numbers: _containers.RepeatedScalarFieldContainer[int]
    weights_digests: bytes
    qualities: _containers.RepeatedScalarFieldContainer[int]
    tiers: _containers.RepeatedScalarFieldContainer[int]
    created: _containers.RepeatedScalarFieldContainer[int]
    nbytes: _containers.RepeatedScalarFieldContainer[int]
    next_cursor: int
    def __init__(self, revision: _Optional[_Union[Revision, _Mapping]] = ..., keys: _Optional[bytes] = ..., epoch_numbers: _Optional[_Iterable[int]] = ..., weights_digests: _Optional[bytes] = ..., qualities: _Optional[_Iterable[int]] = ..., tiers: _Optional[_Iterable[int]] = ..., created: _Optional[_Iterable[int]] = ..., nbytes: _Optional[_Iterable[int]] = ..., next_cursor: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("namespace_ids", "after")
    NAMESPACE_IDS_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    namespace_ids: _containers.RepeatedScalarFieldContainer[bytes]
    after: Revision
    def __init__(self, namespace_ids: _Optional[_Iterable[bytes]] = ..., after: _Optional[_Union[Revision, _Mapping]] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("revision", "revisions", "kinds", "namespace_ids", "keys", "epoch_numbers", "qualities", "tiers")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_IDS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_NUMBERS_FIELD_NUMBER: _ClassVar[int]
    QUALITIES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    revision: Revision
    revisions: _containers.RepeatedScalarFieldContainer[int]
    kinds: _containers.RepeatedScalarFieldContainer[ChangeKind]
    namespace_ids: bytes
    keys: bytes
    epoch_numbers: _containers.RepeatedScalarFieldContainer[int]
    qualities: _containers.RepeatedScalarFieldContainer[int]
    tiers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, revision: _Optional[_Union[Revision, _Mapping]] = ..., revisions: _Optional[_Iterable[int]] = ..., kinds: _Optional[_Iterable[_Union[ChangeKind, str]]] = ..., namespace_ids: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., epoch_numbers: _Optional[_Iterable[int]] = ..., qualities: _Optional[_Iterable[int]] = ..., tiers: _Optional[_Iterable[int]] = ...) -> None: ...

class PurgeRequest(_message.Message):
    __slots__ = ("namespace_id", "keys", "epoch_number")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_NUMBER_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    keys: bytes
    epoch_number: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., epoch_number: _Optional[int] = ...) -> None: ...

class PurgeResponse(_message.Message):
    __slots__ = ("revision", "versions", "nbytes")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    revision: Revision
    versions: int
    nbytes: int
    def __init__(self, revision: _Optional[_Union[Revision, _Mapping]] = ..., versions: _Optional[int] = ..., nbytes: _Optional[int] = ...) -> None: ...

class CompactRequest(_message.Message):
    __slots__ = ("revision",)
    REVISION_FIELD_NUMBER: _ClassVar[int]
    revision: Revision
    def __init__(self, revision: _Optional[_Union[Revision, _Mapping]] = ...) -> None: ...

class CompactResponse(_message.Message):
    __slots__ = ("horizon",)
    HORIZON_FIELD_NUMBER: _ClassVar[int]
    horizon: Revision
    def __init__(self, horizon: _Optional[_Union[Revision, _Mapping]] = ...) -> None: ...

class PipelineRequest(_message.Message):
    __slots__ = ("calls",)
    CALLS_FIELD_NUMBER: _ClassVar[int]
    calls: _containers.RepeatedCompositeFieldContainer[PipelineCall]
    def __init__(self, calls: _Optional[_Iterable[_Union[PipelineCall, _Mapping]]] = ...) -> None: ...

class PipelineCall(_message.Message):
    __slots__ = ("id", "method", "request", "timeout_ms", "traceparent")
    ID_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    id: int
    method: str
    request: bytes
    timeout_ms: int
    traceparent: str
    def __init__(self, id: _Optional[int] = ..., method: _Optional[str] = ..., request: _Optional[bytes] = ..., timeout_ms: _Optional[int] = ..., traceparent: _Optional[str] = ...) -> None: ...

class PipelineResponse(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[PipelineAnswer]
    def __init__(self, answers: _Optional[_Iterable[_Union[PipelineAnswer, _Mapping]]] = ...) -> None: ...

class PipelineAnswer(_message.Message):
    __slots__ = ("id", "response", "error", "detail", "retry_after_ms")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    id: int
    response: bytes
    error: str
    detail: str
    retry_after_ms: int
    def __init__(self, id: _Optional[int] = ..., response: _Optional[bytes] = ..., error: _Optional[str] = ..., detail: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("shard", "incarnation", "revision", "capacity_nbytes", "live_nbytes", "staged_nbytes", "retired_nbytes", "ownerless_nbytes", "versions", "leases", "oldest_pin_s", "counters", "nvme_nbytes", "nvme_capacity_nbytes")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SHARD_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_NBYTES_FIELD_NUMBER: _ClassVar[int]
    LIVE_NBYTES_FIELD_NUMBER: _ClassVar[int]
    STAGED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    RETIRED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    OWNERLESS_NBYTES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    OLDEST_PIN_S_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    NVME_NBYTES_FIELD_NUMBER: _ClassVar[int]
    NVME_CAPACITY_NBYTES_FIELD_NUMBER: _ClassVar[int]
    shard: str
    incarnation: int
    revision: int
    capacity_nbytes: int
    live_nbytes: int
    staged_nbytes: int
    retired_nbytes: int
    ownerless_nbytes: int
    versions: int
    leases: int
    oldest_pin_s: float
    counters: _containers.ScalarMap[str, int]
    nvme_nbytes: int
    nvme_capacity_nbytes: int
    def __init__(self, shard: _Optional[str] = ..., incarnation: _Optional[int] = ..., revision: _Optional[int] = ..., capacity_nbytes: _Optional[int] = ..., live_nbytes: _Optional[int] = ..., staged_nbytes: _Optional[int] = ..., retired_nbytes: _Optional[int] = ..., ownerless_nbytes: _Optional[int] = ..., versions: _Optional[int] = ..., leases: _Optional[int] = ..., oldest_pin_s: _Optional[float] = ..., counters: _Optional[_Mapping[str, int]] = ..., nvme_nbytes: _Optional[int] = ..., nvme_capacity_nbytes: _Optional[int] = ...) -> None: ...

from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class ReadRequest(_message.Message):
    __slots__ = ("incarnation", "slots", "generations", "namespace_id", "takes_runs")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TAKES_RUNS_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    namespace_id: bytes
    takes_runs: bool
    def __init__(self, incarnation: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., namespace_id: _Optional[bytes] = ..., takes_runs: bool = ...) -> None: ...

class ReadResponse(_message.Message):
    __slots__ = ("index", "frame_nbytes", "data", "miss", "run_nbytes")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FRAME_NBYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    RUN_NBYTES_FIELD_NUMBER: _ClassVar[int]
    index: int
    frame_nbytes: int
    data: bytes
    miss: str
    run_nbytes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, index: _Optional[int] = ..., frame_nbytes: _Optional[int] = ..., data: _Optional[bytes] = ..., miss: _Optional[str] = ..., run_nbytes: _Optional[_Iterable[int]] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("txn", "index", "frame_nbytes", "data")
    TXN_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FRAME_NBYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    txn: int
    index: int
    frame_nbytes: int
    data: bytes
    def __init__(self, txn: _Optional[int] = ..., index: _Optional[int] = ..., frame_nbytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class WriteResponse(_message.Message):
    __slots__ = ("indexes", "refusals")
    INDEXES_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    indexes: _containers.RepeatedScalarFieldContainer[int]
    refusals: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, indexes: _Optional[_Iterable[int]] = ..., refusals: _Optional[_Iterable[str]] = ...) -> None: ...

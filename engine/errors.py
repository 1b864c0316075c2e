"""What can go wrong with a model, its folder, its tokenizer or its template; and with a request in a worker.

    KVStrataError (kvstore/errors.py)
    +-- ModelError             FAILED_PRECONDITION  anything below
        +-- ModelNotFound      NOT_FOUND            no such folder, file, registry name or hub id
        +-- ModelCorrupt       DATA_LOSS            truncated, wrong sha256, at odds with its config
        +-- ModelUnsupported   UNIMPLEMENTED        an architecture, rope scaling, dtype or file we do not run
        +-- ModelFetchFailed   UNAVAILABLE          no network, no pip, an index that does not have it
        +-- ModelBusy          ABORTED              another process is making the same folder and does not end
        +-- DiskFull           RESOURCE_EXHAUSTED   there is no room for it
        +-- ChatTemplateError  INVALID_ARGUMENT     the template is missing, wrong, or refuses the messages
    +-- RequestAborted         ABORTED              aborted, or superseded by a newer attempt, while it ran
    +-- Unavailable
        +-- RanksLost          UNAVAILABLE          a process with a share of the model ended, or hangs
        +-- WeightsChanged     UNAVAILABLE          the weights changed before it was in the engine

Every ModelError says what happened (`problem`) and what to do next (`cure`); str() gives both. Both are plain
strings in `args`, so that the errors travel between Ray actors unharmed.
"""

from __future__ import annotations

from kvstore.errors import KVStrataError, Unavailable

__all__ = [
    "ChatTemplateError",
    "DiskFull",
    "ModelBusy",
    "ModelCorrupt",
    "ModelError",
    "ModelFetchFailed",
    "ModelNotFound",
    "ModelUnsupported",
    "RanksLost",
    "RequestAborted",
    "WeightsChanged",
]


class ModelError(KVStrataError):
    """`problem`: what happened, to what. `cure`: what to do next. No full stop at the end of either."""

    status = "FAILED_PRECONDITION"

    def __init__(self, problem: str, cure: str) -> None:
        super().__init__(problem, cure)
        self.problem = problem
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.problem}. {self.cure}"


class ModelNotFound(ModelError):
    status = "NOT_FOUND"


class ModelCorrupt(ModelError):
    status = "DATA_LOSS"


class ModelUnsupported(ModelError):
    status = "UNIMPLEMENTED"


class ModelFetchFailed(ModelError):
    status = "UNAVAILABLE"


class ModelBusy(ModelError):
    status = "ABORTED"


class DiskFull(ModelError):
    status = "RESOURCE_EXHAUSTED"


class ChatTemplateError(ModelError):
    status = "INVALID_ARGUMENT"


class RequestAborted(KVStrataError):
    """The worker gave the request up because it was told to. All that it held is freed."""

    status = "ABORTED"


class RanksLost(Unavailable):
    """The model's ranks are no whole any more: this engine computes nothing from here on."""


class WeightsChanged(Unavailable):
    """What was matched and read for the request is of another epoch: it begins again. Told to no client."""

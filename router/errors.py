"""What can go wrong between an HTTP request and its tokens. One branch of the tree.

KVStrataError (kvstore/errors.py)
+-- RequestError                          answered over HTTP: knows its status, type, param and code
|   +-- BadRequest            400         the request is wrong: `param` names the field
|   +-- ModelUnknown          404         this service serves another model
|   +-- Overloaded            429         as many requests run as may, or all workers stay full; retry
|   +-- NotReady              503         starting, draining, or no worker of one epoch is alive
|   +-- DeadlinePassed        504         its own deadline passed before its first token
|   +-- GenerationFailed      500         every attempt failed; the last one's reason is told
+-- WorkerError                           one attempt is over; another worker may do it
|   +-- WorkerGone                        the worker is dead or unreachable
|   +-- WorkerSlow                        no answer, or no token, within the bound
|   +-- WorkerBusy                        it is full or drains: costs a wait, not an attempt
|   +-- WorkerFailed                      it answered that it could not, or broke the protocol
+-- StartFailed                           the service could not be brought up
"""

from __future__ import annotations

from typing import ClassVar

from kvstore.errors import KVStrataError

__all__ = [
    "BadRequest",
    "DeadlinePassed",
    "GenerationFailed",
    "ModelUnknown",
    "NotReady",
    "Overloaded",
    "RequestError",
    "StartFailed",
    "WorkerBusy",
    "WorkerError",
    "WorkerFailed",
    "WorkerGone",
    "WorkerSlow",
    "refused",
]


class RequestError(KVStrataError):
    """`param` is the field at fault, `code` OpenAI's machine-readable name of the error."""

    http_status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal_error"
    retry_after_s: ClassVar[int | None] = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class BadRequest(RequestError):
    status = "INVALID_ARGUMENT"
    http_status = 400
    kind = "invalid_request_error"


class ModelUnknown(RequestError):
    status = "NOT_FOUND"
    http_status = 404
    kind = "invalid_request_error"


class Overloaded(RequestError):
    status = "RESOURCE_EXHAUSTED"
    http_status = 429
    kind = "rate_limit_error"
    retry_after_s = 1


class NotReady(RequestError):
    status = "UNAVAILABLE"
    http_status = 503
    kind = "service_unavailable_error"
    retry_after_s = 2


class DeadlinePassed(RequestError):
    status = "DEADLINE_EXCEEDED"
    http_status = 504
    kind = "timeout_error"


class GenerationFailed(RequestError):
    status = "INTERNAL"


class WorkerError(KVStrataError):
    """Ends an attempt, never a request by itself."""

    status = "UNAVAILABLE"


class WorkerGone(WorkerError):
    pass


class WorkerSlow(WorkerError):
    status = "DEADLINE_EXCEEDED"


class WorkerBusy(WorkerError):
    """`full`: it has no room now (RESOURCE_EXHAUSTED); else it takes no requests now (UNAVAILABLE)."""

    def __init__(self, message: str, *, full: bool) -> None:
        super().__init__(message)
        self.full = full


class WorkerFailed(WorkerError):
    status = "INTERNAL"


def refused(message: str, status: str) -> WorkerError:
    """What an attempt ends with when a worker answered with an error of this gRPC status."""
    # ALREADY_EXISTS: EpochConflict. The worker has other weights than the attempt, as when they change.
    if status in ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "ALREADY_EXISTS"):
        return WorkerBusy(message, full=status == "RESOURCE_EXHAUSTED")
    return WorkerFailed(message)


class StartFailed(KVStrataError):
    status = "UNAVAILABLE"

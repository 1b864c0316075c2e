"""What changes the service itself: `/kvstrata/weights`. For the user who runs it, and for nobody else.

A client's API key is not enough: the header `X-Kvstrata-Admin` must hold the service's own token, which lies
in a folder of that user's that others cannot read (router/published.py).
"""

from __future__ import annotations

import hmac
from typing import Final, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from engine.types import UpdateMode
from kvstore.errors import KVStrataError
from router.api.backend import Backend
from router.api.errors import error_body
from router.updating import WantedWeights

__all__ = ["ADMIN_HEADER", "UpdateBody", "add_admin"]

ADMIN_HEADER: Final = "X-Kvstrata-Admin"
_TIMEOUT_S_MAX: Final = 86_400.0
_HTTP: Final = {
    "INVALID_ARGUMENT": 400,
    "ALREADY_EXISTS": 409,
    "NOT_FOUND": 404,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""By gRPC status; what is not here says of the files that they cannot be served: 422."""


class UpdateBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    path: str = Field(min_length=1, max_length=4096)
    epoch: int = Field(ge=0, lt=1 << 63)
    mode: Literal["drain", "abort", "keep", "recompute"]
    timeout_s: float = Field(600.0, gt=0, le=_TIMEOUT_S_MAX)


def add_admin(app: FastAPI, backend: Backend, token: str | None) -> None:
    @app.post("/kvstrata/weights")
    async def weights(request: Request, body: UpdateBody) -> Response:
        given = request.headers.get(ADMIN_HEADER, "")
        if token is None or not hmac.compare_digest(given.encode(), token.encode()):
            message = "this is for the user who runs the service: `kvstrata weights update`, as that user"
            return JSONResponse(error_body(message, "permission_error"), status_code=403)
        wanted = WantedWeights(body.path, body.epoch, UpdateMode(body.mode), body.timeout_s)
        try:
            return JSONResponse(await backend.operations.update_weights(wanted))
        except KVStrataError as error:
            # Its author reads this: the words are meant for who runs the service.
            status = _HTTP.get(error.status, 422)
            return JSONResponse(error_body(str(error), "update_failed"), status_code=status)

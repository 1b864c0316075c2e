"""Errors in OpenAI's shape, whoever raised them: `{"error": {"message", "type", "param", "code"}}`.

A traceback goes to the log, never to the client.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kvstore.errors import KVStrataError
from router.errors import BadRequest, GenerationFailed, RequestError

__all__ = ["as_request_error", "error_body", "install", "response_of"]

_CLIENT_CLOSED: Final = 499  # nginx's number; the client is not there to read it
_WORDS: Final = {
    "missing": "is missing: send it",
    "too_short": "is empty: send at least {min_length}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
}
"""For pydantic's names of errors, filled from their context; others are told in pydantic's words."""

log = structlog.get_logger(__name__)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response_of(error: RequestError) -> JSONResponse:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    body = error_body(str(error), error.kind, error.param, error.code)
    return JSONResponse(body, status_code=error.http_status, headers=headers)


def as_request_error(error: Exception) -> RequestError:
    """What the client is told of any error. What is not meant for it is logged, and told as our fault."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, KVStrataError) and error.status == "INVALID_ARGUMENT":
        return BadRequest(str(error))
    log.error("internal error", exc_info=error)
    return GenerationFailed("the server failed on this request; its log says why. Retry, or report it")


def install(app: FastAPI) -> None:
    """Make every error of the app take the shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        message, param = _worded(error.errors())
        return JSONResponse(error_body(message, BadRequest.kind, param), status_code=BadRequest.http_status)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        body = error_body(message, "invalid_request_error")
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(KVStrataError)
    async def ours(_request: Request, error: KVStrataError) -> Response:
        return response_of(as_request_error(error))

    @app.exception_handler(ClientGone)
    async def gone(_request: Request, _error: ClientGone) -> Response:
        return Response(status_code=_CLIENT_CLOSED)


class ClientGone(Exception):
    """The client left before there was anything to send."""


def _worded(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The first of pydantic's errors as one sentence, and the field it is about."""
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "not JSON")
        return f"the body is not valid JSON: {reason}", None
    param = _path(first["loc"])
    if param is None:
        if first["type"] == "missing":
            return "the body is empty: send a JSON object", None
        return "the body must be a JSON object, sent as application/json", None
    words = _WORDS.get(first["type"])
    message = words.format_map(first.get("ctx", {})) if words else str(first["msg"])
    given = first.get("input")
    shown = "" if first["type"] == "missing" or not _is_short(given) else f" (got {json.dumps(given)})"
    return f"{param}: {message.removeprefix('Value error, ')}{shown}", param


def _path(loc: Sequence[str | int]) -> str | None:
    """("body", "messages", 0, "role") -> messages[0].role"""
    path = ""
    for part in loc[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or None


def _is_short(value: object) -> bool:
    return (
        value is None
        or isinstance(value, bool | int | float)
        or (isinstance(value, str) and len(value) <= 64)
    )

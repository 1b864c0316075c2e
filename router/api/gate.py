"""What stands before every route: a request id, the API key, a bound on the body, and a last word on errors.

Plain ASGI, so that it costs a few microseconds and touches no stream that goes out.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.api.errors import as_request_error, error_body

__all__ = ["Gate"]

_OPEN_PATHS: Final = frozenset({"/health", "/metrics"})
"""Answered without a key: probes and scrapers carry none."""
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Gate:
    def __init__(
        self, app: ASGIApp, *, api_key: str | None, body_nbytes_max: int, body_timeout_s: float = 60.0
    ) -> None:
        self._app = app
        self._api_key = None if api_key is None else f"Bearer {api_key}".encode()
        self._body_nbytes_max = body_nbytes_max
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        send = _with_header(send, "X-Request-Id", _request_id(headers))
        if not self._may_enter(scope["path"], headers):
            message = "the API key is missing or wrong: send `Authorization: Bearer <key>`"
            await _answer(send, 401, message, "authentication_error", "invalid_api_key")
            return
        try:
            async with asyncio.timeout(self._body_timeout_s):
                body = await self._read(headers, receive)
        except TimeoutError:
            message = f"the body did not arrive within {self._body_timeout_s:.0f} s: send it again"
            await _answer(send, 408, message, "invalid_request_error", "body_timeout")
            return
        except _TooLarge:
            message = f"the body has more than {self._body_nbytes_max} bytes: send less"
            await _answer(send, 413, message, "invalid_request_error", "body_too_large")
            return
        response = _Response(send)
        try:
            await self._app(scope, _replay(body, receive), response.send)
        except Exception as error:
            if response.started:
                raise  # all that is left is to break off
            told = as_request_error(error)
            await _answer(send, told.http_status, str(told), told.kind, told.code)

    def _may_enter(self, path: str, headers: Headers) -> bool:
        if self._api_key is None or path in _OPEN_PATHS:
            return True
        return hmac.compare_digest(headers.get("authorization", "").encode(), self._api_key)

    async def _read(self, headers: Headers, receive: Receive) -> list[Message]:
        """The whole body's messages. Raises _TooLarge as soon as the bound is known to be passed."""
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self._body_nbytes_max:
            raise _TooLarge
        messages, nbytes = [], 0
        while True:
            message = await receive()
            messages.append(message)
            nbytes += len(message.get("body", b""))
            if nbytes > self._body_nbytes_max:
                raise _TooLarge
            if message["type"] != "http.request" or not message.get("more_body", False):
                return messages


class _TooLarge(Exception):
    pass


class _Response:
    """Whether anything was sent yet."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def send(self, message: Message) -> None:
        self.started = True
        await self._send(message)


def _request_id(headers: Headers) -> str:
    """The client's own, where it is harmless to echo and log; else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)


def _with_header(send: Send, name: str, value: str) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)[name] = value
        await send(message)

    return sending


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """Hand out what was read, then what comes after it (the client's going away)."""
    left = iter(messages)

    async def receiving() -> Message:
        return next(left, None) or await receive()

    return receiving


async def _answer(send: Send, status: int, message: str, kind: str, code: str | None) -> None:
    body = json.dumps(error_body(message, kind, code=code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

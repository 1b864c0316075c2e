"""One OpenAI address for two kinds of vLLM: some prefill, some decode, KV goes through the store.

    python examples/vllm_pd/proxy.py --prefill http://127.0.0.1:8001 --decode http://127.0.0.1:8002

A request goes to a prefill server first, for one token. Its answer's `kv_transfer_params` say what now lies
in the store; with these the request goes to a decode server, whose answer is streamed back as it comes.
Servers of a kind take turns. Where prefill fails, decode computes the prompt itself: slower, not wrong. A
client that hangs up ends the request at the server that works on it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

PREFILL_S: Final = 300.0
CONNECT_S: Final = 5.0
SILENCE_S: Final = 300.0  # between two pieces of an answer
STREAMS_MAX: Final = 512

# A prefill server answers with one token, whole: what makes sense for more tokens, or a stream, goes.
LEFT_OUT: Final = ("stream_options", "min_tokens", "n", "best_of", "logprobs", "top_logprobs", "echo")
FOR_PREFILL: Final = {"do_remote_decode": True, "do_remote_prefill": False}


class Proxy:
    """Which server is next, and a request's way over two of them."""

    def __init__(self, prefill: Sequence[str], decode: Sequence[str]) -> None:
        limits = httpx.Limits(max_connections=STREAMS_MAX)
        self.client = httpx.AsyncClient(timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S), limits=limits)
        self._prefill: Iterator[str] = itertools.cycle(prefill)
        self._decode: Iterator[str] = itertools.cycle(decode)

    async def complete(self, path: str, body: dict[str, Any]) -> Response:
        headers = {"X-Request-Id": body.pop("request_id", None) or uuid.uuid4().hex}
        params = await self._prefilled(path, body, headers)
        if params is not None:
            body = body | {"kv_transfer_params": params}
        asked = self.client.build_request("POST", f"{next(self._decode)}{path}", json=body, headers=headers)
        try:
            answer = await self.client.send(asked, stream=True)
        except httpx.HTTPError as error:
            return JSONResponse({"error": {"message": f"no decode server answers: {error!r}"}}, 502)
        media = answer.headers.get("content-type")
        return StreamingResponse(_pieces(answer), answer.status_code, media_type=media)

    async def models(self) -> Response:
        answer = await self.client.get(f"{next(self._decode)}/v1/models")
        return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))

    async def _prefilled(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
        """What decode needs to find the prompt's KV; None: nothing, decode does it all."""
        first = {name: value for name, value in body.items() if name not in LEFT_OUT}
        first |= {"stream": False, "max_tokens": 1, "kv_transfer_params": FOR_PREFILL}
        if "max_completion_tokens" in first:
            first["max_completion_tokens"] = 1
        server = next(self._prefill)
        try:
            answer = await self.client.post(f"{server}{path}", json=first, headers=headers, timeout=PREFILL_S)
            answer.raise_for_status()
            return answer.json().get("kv_transfer_params")
        except (httpx.HTTPError, ValueError) as error:
            print(f"prefill at {server} failed, decode computes the prompt: {error!r}", file=sys.stderr)
            return None


async def _pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    """As they come. Closed with the client's connection, and with it the server's request."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()


def application(prefill: Sequence[str], decode: Sequence[str]) -> FastAPI:
    proxy = Proxy(prefill, decode)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await proxy.client.aclose()

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await proxy.complete("/v1/completions", await request.json())

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await proxy.complete("/v1/chat/completions", await request.json())

    @app.get("/v1/models")
    async def models() -> Response:
        return await proxy.models()

    return app


def main() -> None:
    options = argparse.ArgumentParser(
        description="One OpenAI address for vLLM servers that prefill and decode."
    )
    options.add_argument("--prefill", action="append", required=True, metavar="URL", help="once a server")
    options.add_argument("--decode", action="append", required=True, metavar="URL", help="once a server")
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=8000)
    said = options.parse_args()
    uvicorn.run(application(said.prefill, said.decode), host=said.host, port=said.port, log_level="warning")


if __name__ == "__main__":
    main()

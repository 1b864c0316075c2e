"""The HTTP application: OpenAI's routes, and those a service is run by.

/v1/chat/completions /v1/completions /v1/models /tokenize /detokenize     clients
/health /metrics /kvstrata/status                                         operators
/kvstrata/weights                                                         the user who runs the service
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from router.api import errors
from router.api.admin import add_admin
from router.api.answers import answer
from router.api.backend import Backend
from router.api.forms import ChatForm, CompletionForm
from router.api.gate import Gate
from router.api.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from router.api.spelling import Spelling
from router.errors import BadRequest, NotReady

__all__ = ["build_app"]

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def build_app(
    backend: Backend, *, api_key: str | None, body_nbytes_max: int, admin_token: str | None = None
) -> FastAPI:
    """Routes over `backend`. With an API key, all but /health and /metrics ask for it. What changes the
    service asks for `admin_token` besides."""
    # No interactive pages: they fetch scripts from elsewhere.
    app = FastAPI(title="kvstrata", docs_url=None, redoc_url=None)
    errors.install(app)
    _generation(app, backend)
    _model(app, backend)
    _operation(app, backend)
    add_admin(app, backend, admin_token)
    app.add_middleware(Gate, api_key=api_key, body_nbytes_max=body_nbytes_max)
    return app


def _serving(backend: Backend) -> None:
    """Raises NotReady while the service starts or ends."""
    reason = backend.operations.not_ready()
    if reason is not None:
        raise NotReady(reason)


def _admitting(backend: Backend) -> None:
    """As _serving, counted: a request was not let in."""
    try:
        _serving(backend)
    except NotReady:
        backend.metrics.admission_rejections.labels("not_ready").inc()
        raise


def _generation(app: FastAPI, backend: Backend) -> None:
    spelling = Spelling(backend.tokenizer)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody) -> Response:
        _admitting(backend)
        jobs = await backend.chat_jobs(body)
        form = ChatForm(
            request_id=jobs[0].request_id,
            model=backend.model,
            spelling=spelling,
            with_ids=bool(body.return_token_ids),
            include_usage=body.include_usage,
        )
        return await answer(request, backend, jobs, form, n=body.n or 1, stream=bool(body.stream))

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionBody) -> Response:
        _admitting(backend)
        jobs = await backend.completion_jobs(body)
        form = CompletionForm(
            request_id=jobs[0].request_id,
            model=backend.model,
            spelling=spelling,
            with_ids=bool(body.return_token_ids),
            include_usage=body.include_usage,
        )
        return await answer(request, backend, jobs, form, n=body.n or 1, stream=bool(body.stream))


def _model(app: FastAPI, backend: Backend) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(backend)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        backend.check_model(name)
        return _card(backend)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        backend.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("prompt: send either prompt or messages", param="prompt")
        if body.messages is not None:
            ids = await backend.chat_ids(body.messages)
        else:
            ids = await backend.text_ids(body.prompt or "", add_special=body.add_special_tokens)
        texts = await asyncio.to_thread(_token_texts, backend, ids) if body.return_token_strs else None
        limit = backend.max_model_len
        return {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": texts}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        backend.check_model(body.model)
        text = await asyncio.to_thread(backend.tokenizer.decode, body.tokens, skip_special=False)
        return {"prompt": text}


def _token_texts(backend: Backend, ids: list[int]) -> list[str | None]:
    return [backend.tokenizer.id_to_token(token) for token in ids]


def _card(backend: Backend) -> dict[str, Any]:
    return {
        "id": backend.model,
        "object": "model",
        "created": backend.created,
        "owned_by": "kvstrata",
        "root": backend.model,
        "parent": None,
        "max_model_len": backend.max_model_len,
        "permission": [],
    }


def _operation(app: FastAPI, backend: Backend) -> None:
    @app.get("/health")
    async def health() -> Response:
        _serving(backend)
        return Response()

    @app.get("/metrics")
    async def metrics() -> Response:
        await backend.operations.gather()
        return Response(backend.metrics.exposition(), media_type=_METRICS_TYPE)

    @app.get("/kvstrata/status")
    async def status() -> Response:
        return JSONResponse(await backend.operations.status())

"""The service over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

import miaotui
from miaotui.serve.answers import Json, error_response, parse_object
from miaotui.serve.batches import Batches, add_batches
from miaotui.serve.limits import read_body
from miaotui.serve.metrics import CONTENT_TYPE, Metrics
from miaotui.serve.openai.errors import ApiError, no_such_model
from miaotui.serve.openai.response_schemas import ResponseRequest
from miaotui.serve.openai.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from miaotui.serve.page import add_card, add_page
from miaotui.serve.running import Abandoned, Running
from miaotui.serve.service import JOBS, LOOKUPS, Service
from miaotui.serve.settings import ServeSettings
from miaotui.serve.stored import add_responses

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponseRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
"""What the endpoints of JOBS and LOOKUPS take, for the OpenAPI document."""

_REF = "#/components/schemas/{model}"
_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_STREAM_HEADERS += [(b"x-accel-buffering", b"no")]


def create_app(
    service: Service, settings: ServeSettings, *, metrics: Metrics | None = None, batches: Batches | None = None
) -> FastAPI:
    """All routes. The model may be attached to the service later."""
    app = FastAPI(title="Miaotui", version=miaotui.__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, _api_error)
    for path in JOBS:
        _add_endpoint(app, path, service, JobResponse)
    for path in LOOKUPS:
        _add_endpoint(app, path, service, LookupResponse)
    add_responses(app, service)
    _add_models(app, service)
    _add_state(app, service)
    if metrics is not None:
        _add_metrics(app, metrics)
    if batches is not None:
        add_batches(app, batches, settings.max_file_bytes)
    add_page(app)
    add_card(app, lambda: service.artefact)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _add_endpoint(app: FastAPI, path: str, service: Service, kind: type[BodyResponse]) -> None:
    async def endpoint(request: Request) -> Response:
        return kind(service, path, request)

    schema = {"$ref": _REF.format(model=BODIES[path].__name__)}
    app.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        response_class=Response,
        summary=BODIES[path].__doc__,
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    )


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made when it is first asked for."""
    if app.openapi_schema is None:
        from fastapi.openapi.utils import get_openapi
        from pydantic.json_schema import models_json_schema

        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, bodies = models_json_schema([(body, "validation") for body in BODIES.values()], ref_template=_REF)
        document.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
        app.openapi_schema = document
    return app.openapi_schema


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        """The served model, under each of its names."""
        return Json({"object": "list", "data": service.models()})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One of them."""
        found = next((entry for entry in service.models() if entry["id"] == name), None)
        if found is None:
            raise no_such_model(name, service.settings.served_model_names)
        return Json(found)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health() -> Response:
        """200 as long as the server lives, also while it loads or drains."""
        failed = service.failed.is_set()
        return Json({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    @app.get("/ready")
    async def ready() -> Response:
        """200 when the model is loaded and the queue takes requests."""
        state = service.state
        return Json({"status": state}, 200 if state == "ready" else 503)

    @app.get("/version")
    async def version() -> Response:
        """This program's version."""
        return Json({"version": miaotui.__version__})


def _add_metrics(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/metrics", response_class=Response)
    async def figures() -> Response:
        """The server's figures, for Prometheus."""
        return Response(metrics.render(), media_type=CONTENT_TYPE)


async def _http_error(_: Request, error: Exception) -> Response:
    """What the framework refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    found = ApiError(error.status_code, f"{error.detail}.", headers=error.headers)
    return error_response(found)


async def _api_error(_: Request, error: Exception) -> Response:
    return error_response(error)


class BodyResponse(Response):
    """Reads the request's body itself and answers it: the whole of a request's life is in `__call__`."""

    def __init__(self, service: Service, path: str, request: Request) -> None:
        super().__init__()
        self._service = service
        self._path = path
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._respond(scope, receive, send)
        except (Abandoned, ClientDisconnect):
            pass  # nobody is there to be answered
        except Exception as error:
            await error_response(error)(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("a subclass responds")

    async def _read(self) -> Callable[[], dict[str, Any]]:
        """The body, still to be parsed.

        It must say that it is JSON: a page of another site cannot send that here without being asked for leave first.
        """
        kind = self._request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "The body must be JSON. Send the header content-type: application/json.")
        declared = self._request.headers.get("content-length")
        raw = await read_body(self._request.stream(), declared, self._service.settings.max_body_bytes)
        return lambda: parse_object(raw)


class LookupResponse(BodyResponse):
    """Answers from the tokenizer."""

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._service.look_up(self._path, await self._read())
        await Json(answer)(scope, receive, send)


class JobResponse(BodyResponse):
    """Answers from the engine, at once or as a stream. A client that goes away is cancelled."""

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        with service.admit() as seat:
            read = await self._read()
            with await service.begin(self._path, read, seat, timeout=service.settings.request_timeout) as running:
                watch = asyncio.create_task(_watch(receive, running))
                try:
                    if running.job.stream:
                        await _stream(running, send)
                    else:
                        await Json(await service.whole(running))(scope, receive, send)
                finally:
                    watch.cancel()
                    scope.setdefault("state", {}).update(running.tokens)


async def _watch(receive: Receive, running: Running) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    running.abandon()


async def _stream(running: Running, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
    async for wire in running.events():
        await send({"type": "http.response.body", "body": wire, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})

"""Responses that are kept: asked for again, and forgotten, by their ids."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

from miaotui.serve.answers import Json
from miaotui.serve.openai import responses
from miaotui.serve.openai.errors import refused
from miaotui.serve.service import Service


def add_responses(app: FastAPI, service: Service) -> None:
    """The routes under `/v1/responses/`."""

    @app.get("/v1/responses/{response_id}")
    async def response(response_id: str, request: Request) -> Response:
        """A response that is kept. They are, in memory and up to a bound, unless `store` was false."""
        for name in request.query_params:
            raise refused(f"Unknown or unsupported parameter: {name}. Leave it out.", name, "unsupported_parameter")
        return Json(responses.stored(service.attached, response_id))

    @app.delete("/v1/responses/{response_id}")
    async def forget(response_id: str) -> Response:
        """Forget it."""
        return Json(responses.forget(service.attached, response_id))

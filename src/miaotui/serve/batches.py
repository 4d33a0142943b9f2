"""`/v1/files` and `/v1/batches`: batch files over HTTP. Who keeps and runs them is given."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response
from pydantic import Field
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from miaotui.errors import ResourceError, UsageError
from miaotui.serve.answers import Json, parse_object
from miaotui.serve.limits import BODY_TIMEOUT, discard, read_body
from miaotui.serve.openai.errors import ApiError, refused
from miaotui.serve.openai.schemas import Strict, validate

_PAGE = 100
"""Entries that a list gives when it is not told."""
_MOST_BODY = 1 << 20
_FORM = 4096
"""Bytes of a form around its file."""


class Batches(Protocol):
    """What `miaotui.offline.store.BatchStore` gives. Raises UsageError for what cannot be, ResourceError when full."""

    async def add_file(self, content: IO[bytes], filename: str, purpose: str) -> dict[str, Any]: ...
    def files(self) -> list[dict[str, Any]]: ...
    def file(self, name: str) -> dict[str, Any] | None: ...
    def content(self, name: str) -> Path: ...
    async def delete_file(self, name: str) -> None: ...
    async def create(
        self, input_file: str, endpoint: str, window: str, metadata: Mapping[str, str] | None
    ) -> dict[str, Any]: ...
    def batches(self) -> list[dict[str, Any]]: ...
    def batch(self, name: str) -> dict[str, Any] | None: ...
    async def cancel(self, entry: dict[str, Any]) -> dict[str, Any]: ...


class BatchRequest(Strict):
    """Begin a batch."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(None, max_length=16)


def add_batches(app: FastAPI, batches: Batches, max_file_bytes: int) -> None:
    """All routes of files and batches."""
    _add_files(app, batches, max_file_bytes)
    _add_runs(app, batches)


def _add_files(app: FastAPI, batches: Batches, max_file_bytes: int) -> None:
    @app.post("/v1/files", response_class=Response)
    async def upload(request: Request) -> Response:
        """Upload a file of requests: multipart, with `file` and `purpose`."""
        return Json(await _upload(request, batches, max_file_bytes))

    @app.get("/v1/files", response_class=Response)
    async def files(request: Request) -> Response:
        """The files, the newest first."""
        wanted = request.query_params.get("purpose")
        found = [entry for entry in batches.files() if wanted in (None, entry["purpose"])]
        return Json(_page(found, request))

    @app.get("/v1/files/{name}", response_class=Response)
    async def file(name: str) -> Response:
        """One file's description."""
        return Json(_known(batches.file(name), "file", name))

    @app.get("/v1/files/{name}/content", response_class=FileResponse)
    async def content(name: str) -> FileResponse:
        """What stands in it."""
        _known(batches.file(name), "file", name)
        return FileResponse(batches.content(name), media_type="application/jsonl")

    @app.delete("/v1/files/{name}", response_class=Response)
    async def delete(name: str) -> Response:
        """Delete it."""
        _known(batches.file(name), "file", name)
        try:
            await batches.delete_file(name)
        except UsageError as error:
            raise ApiError(409, str(error), code="file_in_use") from None
        return Json({"id": name, "object": "file", "deleted": True})


def _add_runs(app: FastAPI, batches: Batches) -> None:
    @app.post("/v1/batches", response_class=Response)
    async def create(request: Request) -> Response:
        """Begin a batch over an uploaded file."""
        raw = await read_body(request.stream(), request.headers.get("content-length"), _MOST_BODY)
        asked = validate(BatchRequest, parse_object(raw))
        try:
            made = await batches.create(asked.input_file_id, asked.endpoint, asked.completion_window, asked.metadata)
        except UsageError as error:
            raise refused(str(error), None) from None
        except ResourceError as error:
            raise _full(error) from None
        return Json(made)

    @app.get("/v1/batches", response_class=Response)
    async def runs(request: Request) -> Response:
        """The batches, the newest first."""
        return Json(_page(batches.batches(), request))

    @app.get("/v1/batches/{name}", response_class=Response)
    async def run(name: str) -> Response:
        """One batch."""
        return Json(_known(batches.batch(name), "batch", name))

    @app.post("/v1/batches/{name}/cancel", response_class=Response)
    async def cancel(name: str) -> Response:
        """Stop it; what is done becomes its output."""
        return Json(await batches.cancel(_known(batches.batch(name), "batch", name)))


def _known(entry: dict[str, Any] | None, kind: str, name: str) -> dict[str, Any]:
    if entry is None:
        raise ApiError(404, f"There is no {kind} `{name[:80]}`.", param=f"{kind}_id", code="not_found")
    return entry


def _full(error: ResourceError) -> ApiError:
    return ApiError(429, str(error), type="rate_limit_error", code="too_many", headers={"retry-after": "60"})


def _page(entries: list[dict[str, Any]], request: Request) -> dict[str, Any]:
    """A part of a list, as OpenAI's clients turn its pages: `limit` entries behind the one called `after`."""
    limit, after = request.query_params.get("limit", str(_PAGE)), request.query_params.get("after")
    if not limit.isdecimal() or not 1 <= int(limit[:9]) <= 10000:
        raise refused("limit must be a number from 1 to 10000.", "limit")
    names = [entry["id"] for entry in entries]
    if after is not None:
        entries = entries[names.index(after) + 1 :] if after in names else []
    shown = entries[: int(limit[:9])]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, "has_more": len(entries) > len(shown), **ends}


async def _upload(request: Request, batches: Batches, most: int) -> dict[str, Any]:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(415, "A file is sent as multipart/form-data, with `file` and `purpose`.")
    chunks = _bounded(request.stream(), request.headers.get("content-length"), most)
    try:
        form = await MultiPartParser(request.headers, chunks, max_files=1, max_fields=8).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise refused(f"The form cannot be read: {error}.", None) from None
    try:
        for name in form:
            if name not in ("file", "purpose"):
                raise refused(f"Unknown parameter: `{name[:80]}`.", name[:80], "unknown_parameter")
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise refused("The form has no `file`.", "file")
        if purpose != "batch":
            raise refused("The purpose must be `batch`.", "purpose")
        filename = os.path.basename(file.filename or "")[:255] or "batch.jsonl"
        return await batches.add_file(file.file, filename, "batch")
    except ResourceError as error:
        raise _full(error) from None
    finally:
        await form.close()


async def _bounded(chunks: AsyncIterator[bytes], declared: str | None, most: int) -> AsyncGenerator[bytes, None]:
    """The chunks, until they are more than a file of `most` bytes and its form, or one keeps us waiting.

    `declared` is the content-length header. Raises ApiError 413 and 408.
    """
    size = int(declared) if declared is not None and declared.isdigit() else 0
    try:
        if size <= most + _FORM:
            size = 0
            while (chunk := await _soon(chunks)) is not None:
                size += len(chunk)
                if size > most + _FORM:
                    break
                yield chunk
    except TimeoutError:
        raise ApiError(408, f"Nothing of the file arrived for {BODY_TIMEOUT:g} s.") from None
    if size > most + _FORM:
        await discard(chunks)
        message = f"The file has more than {most} bytes. Split it, or raise --max-file-bytes."
        raise ApiError(413, message, code="file_too_large", headers={"connection": "close"})


async def _soon(chunks: AsyncIterator[bytes]) -> bytes | None:
    async with asyncio.timeout(BODY_TIMEOUT):
        return await anext(chunks, None)

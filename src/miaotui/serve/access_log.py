"""A line of JSON on stderr for every request, and an id by which client and server mean the same one."""

from __future__ import annotations

import contextlib
import re
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import Any, TextIO

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET = frozenset({"/health", "/ready", "/ping", "/metrics"})
"""What monitors ask every second: logged only when it fails."""


class AccessLog:
    """ASGI middleware: `x-request-id` is taken over or made, sent back, and logged with the request's figures.

    What is asked and answered is never logged, unless `prompts` says so; then the request's body is.
    """

    def __init__(self, app: ASGIApp, *, lines: bool = True, prompts: bool = False, to: TextIO | None = None) -> None:
        self._app = app
        self._lines = lines
        self._prompts = prompts
        self._to = to

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        entry: dict[str, Any] = {"status": 0, "bytes": 0, "whole": False, "left": False}
        body = bytearray()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry["status"] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif message["type"] == "http.response.body":
                entry["bytes"] += len(message.get("body", b""))
                entry["whole"] = not message.get("more_body", False)
            await send(message)

        async def receiving() -> Message:
            message = await receive()
            if self._prompts:
                body.extend(message.get("body", b""))
            if message["type"] == "http.disconnect":
                entry["left"] = not entry["whole"]
            return message

        scope.setdefault("state", {})["request_id"] = request_id
        try:
            await self._app(scope, receiving, sending)
        finally:
            if self._lines and not (scope["path"] in _QUIET and entry["status"] < 400):
                self._write(scope, request_id, begin, entry, bytes(body))

    def _write(self, scope: Scope, request_id: str, begin: float, entry: dict[str, Any], body: bytes) -> None:
        state = scope["state"]
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": request_id,
            "client": scope["client"][0] if scope.get("client") else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": entry["status"] or 499,  # nothing was sent: the client had gone
            "seconds": round(time.monotonic() - begin, 4),
            "bytes": entry["bytes"],
        }
        if entry["status"] and (entry["left"] or not entry["whole"]):
            line["cut_short"] = True  # the client left in the middle, or the server failed there
        line |= {name: state[name] for name in ("key", "prompt_tokens", "completion_tokens") if name in state}
        if self._prompts and body:
            line["body"] = body.decode("utf-8", "replace")
        out = self._to or sys.stderr
        with contextlib.suppress(OSError, ValueError):  # the log's reader has gone; requests are answered all the same
            out.write(orjson.dumps(line).decode() + "\n")
            out.flush()

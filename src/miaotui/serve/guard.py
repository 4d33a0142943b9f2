"""What stands around the routes: the access log, other sites' leave to ask, and API keys."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from miaotui.errors import UsageError
from miaotui.serve.access_log import AccessLog
from miaotui.serve.answers import error_response
from miaotui.serve.auth import Keys, RequireKey
from miaotui.serve.openai.errors import ApiError
from miaotui.serve.page import page_paths

OPEN_PATHS = frozenset({"/health", "/ready", "/ping"}) | page_paths()
"""What needs no key: signs of life, and the page's own files.

vLLM asks for one under /v1 alone. Here the figures and whatever else a client can find out are behind it too.
"""

_ORIGIN = re.compile(r"https?://[^\s/?#]+")
_SHOWN = ["x-request-id", "retry-after"]
"""Headers of ours that a page of another site may read."""


def guarded(
    app: ASGIApp,
    *,
    keys: Keys | None = None,
    metrics_without_key: bool = False,
    allowed_origins: Sequence[str] = (),
    access_log: bool = True,
    log_prompts: bool = False,
) -> ASGIApp:
    """`app` behind all of them. No keys: everybody may ask. `allowed_origins`: pages of other sites that may."""
    if keys is not None:
        app = RequireKey(app, keys, OPEN_PATHS | {"/metrics"} if metrics_without_key else OPEN_PATHS)
    if "*" not in allowed_origins:
        app = OwnSite(app, frozenset(allowed_origins))
    if allowed_origins:
        app = CORSMiddleware(
            app, allow_origins=list(allowed_origins), allow_methods=["*"], allow_headers=["*"], expose_headers=_SHOWN
        )
    return AccessLog(app, lines=access_log, prompts=log_prompts)


def check_origins(origins: Sequence[str]) -> None:
    """Raise UsageError for an origin that no browser sends: one with a path, or without its scheme."""
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise UsageError(
                f"{origin!r} is no origin.", "Write it like https://example.org or http://localhost:3000; * is all."
            )


class OwnSite:
    """ASGI middleware: refuses what a page of another site sends, unless its origin is `allowed`.

    Without CORS a browser keeps the answer from such a page; an upload or a form it sends all the same, and a server
    without keys would act on it. Browsers say in Sec-Fetch-Site whose page it is; other clients do not send that.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str] = ()) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            headers = Headers(scope=scope)
            foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
            if foreign and headers.get("origin") not in self._allowed:
                message = "Pages of other sites may not ask here. Allow yours with --allowed-origins."
                await error_response(ApiError(403, message, code="origin_not_allowed"))(scope, receive, send)
                return
        await self._app(scope, receive, send)

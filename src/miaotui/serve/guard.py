"""What stands around the routes: the access log, other sites' leave to ask, and API keys."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from miaotui.serve.access_log import AccessLog
from miaotui.serve.auth import Keys, RequireKey
from miaotui.serve.page import page_paths

OPEN_PATHS = frozenset({"/health", "/ready", "/ping"}) | page_paths()
"""What needs no key: signs of life, and the page's own files. `/metrics` does need one."""


def guarded(
    app: ASGIApp,
    *,
    keys: Keys | None = None,
    allowed_origins: Sequence[str] = (),
    access_log: bool = True,
    log_prompts: bool = False,
) -> ASGIApp:
    """`app` behind all of them. No keys: everybody may ask. `allowed_origins`: pages of other sites that may."""
    if keys is not None:
        app = RequireKey(app, keys, OPEN_PATHS)
    if allowed_origins:
        app = CORSMiddleware(app, allow_origins=list(allowed_origins), allow_methods=["*"], allow_headers=["*"])
    return AccessLog(app, lines=access_log, prompts=log_prompts)

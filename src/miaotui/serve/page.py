"""The page at `/`: files of the folder `web`, each at its own path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI, HTTPException
from starlette.responses import FileResponse

from miaotui.checkpoint.beside import CARD, REPORT, find_beside

WEB = Path(__file__).parent / "web"
_INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
}
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def add_page(app: FastAPI, folder: Path = WEB) -> None:
    """Serve what lies in `folder` now, and its index.html at `/`. Nothing else of the disk can be reached."""
    for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if file.suffix in _TYPES and file.is_file():
            _add_file(app, "/" + file.relative_to(folder).as_posix(), file)


def page_paths(folder: Path = WEB) -> frozenset[str]:
    """What the page consists of; nothing in it is secret."""
    files = {"/" + file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.suffix in _TYPES}
    return frozenset(files | {"/"})


def add_card(app: FastAPI, artefact: Callable[[], Path | None]) -> None:
    """Serve the model's card at `/card.json` and its report at `/report.html`, where `artefact` has them beside it.

    404 else, and the page shows none. A report is whoever's who made the model: it gets an origin of its own, in which
    it can neither ask this server nor read what the page keeps.
    """

    def find(name: str) -> Path | None:
        path = artefact()
        return None if path is None else find_beside(path, name)

    @app.get("/card.json", response_class=FileResponse, responses={404: {"description": "The model has no card."}})
    async def send() -> FileResponse:
        """What was measured of the model when it was made, against the original."""
        path = find(CARD)
        if path is None:
            raise HTTPException(404, "The model has no card")
        headers = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}
        if find(REPORT) is not None:
            headers["link"] = '<report.html>; rel="alternate"'
        return FileResponse(path, headers=headers, media_type="application/json")

    @app.get("/report.html", response_class=FileResponse, responses={404: {"description": "The model has no report."}})
    async def report() -> FileResponse:
        """The same as a page with charts."""
        path = find(REPORT)
        if path is None:
            raise HTTPException(404, "The model has no report")
        return FileResponse(path, headers=_HEADERS | _ALONE, media_type=_TYPES[".html"])


_ALONE = {
    "content-security-policy": (
        "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
}


def _add_file(app: FastAPI, path: str, file: Path) -> None:
    async def send() -> FileResponse:
        return FileResponse(file, headers=_HEADERS, media_type=_TYPES[file.suffix])

    app.add_api_route(path, send, include_in_schema=False)
    if path == f"/{_INDEX}":
        app.add_api_route("/", send, include_in_schema=False)

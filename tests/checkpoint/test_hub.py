"""Downloading, against a small hub of our own on localhost that speaks as much of the protocol as is used."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.checkpoint.making import random, write_folder

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves one repository, `tiny/model`, from a folder; counts what was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder = folder
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        names = sorted(p.name for p in self.server.folder.iterdir())
        if path.startswith("/api/models/tiny/gated"):
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/models/tiny/model/tree/"):
            rows = [
                {"type": "file", "oid": "0" * 40, "size": (self.server.folder / n).stat().st_size, "path": n}
                for n in names
            ]
            return self.answer(200, json.dumps(rows).encode())
        if path.startswith("/api/models/tiny/model"):
            siblings = [{"rfilename": n, "size": (self.server.folder / n).stat().st_size} for n in names]
            return self.answer(200, json.dumps({"id": "tiny/model", "sha": COMMIT, "siblings": siblings}).encode())
        name = path.rsplit("/", 1)[-1]
        if path.startswith("/tiny/model/resolve/") and name in names:
            if self.command == "GET":
                self.server.fetched.append(name)
            data = (self.server.folder / name).read_bytes()
            return self.answer(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_folder(tmp_path / "repository", {"x": random((2, 3))})
    for name in ("README.md", "pytorch_model.bin"):
        (folder / name).write_text("not wanted")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


RESOLVE = """
import sys
from miaotui.checkpoint import open_checkpoint, resolve
from miaotui.errors import MiaotuiError
try:
    path = resolve(sys.argv[1])
    print(open_checkpoint(path).names(), path)
except MiaotuiError as error:
    print(type(error).__name__, error)
"""


def ask(model: str, url: str, home: Path, **environment: str) -> str:
    """`resolve` in a process of its own: the hub's client reads its settings once, when it is imported."""
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    source = Path(__file__).resolve().parents[2] / "src"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, model],
        env={**kept, "PYTHONPATH": str(source), **settings, **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_is_downloaded_once_and_then_works_offline(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "hf"
    assert ask("tiny/model", hub.url, home).startswith("['x']")
    assert sorted(hub.fetched) == ["config.json", "model.safetensors"]
    assert ask("tiny/model", hub.url, home).startswith("['x']")
    assert len(hub.fetched) == 2
    assert ask("tiny/model", hub.url, home, HF_HUB_OFFLINE="1").startswith("['x']")
    assert ask("tiny/model", "http://127.0.0.1:9", home).startswith("['x']")


def test_absent_gated_and_offline_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "hf"
    answer = ask("tiny/absent", hub.url, home)
    assert answer.startswith("ModelNotFoundError The hub has no model tiny/absent")
    assert "HF_TOKEN" in answer
    assert "gated" in ask("tiny/gated", hub.url, home)
    answer = ask("tiny/other", hub.url, home, HF_HUB_OFFLINE="1")
    assert answer.startswith("ModelNotFoundError")
    assert "HF_HUB_OFFLINE is set" in answer
    answer = ask("tiny/other", "http://127.0.0.1:9", home)
    assert "the hub cannot be reached" in answer

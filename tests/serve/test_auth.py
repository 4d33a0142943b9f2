"""API keys: who is let in, until when and how often; what never shows."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AuthenticationError, OpenAI, RateLimitError

from miaotui.cli.main import main
from miaotui.errors import UsageError
from miaotui.serve.app import create_app
from miaotui.serve.auth import Key, Keys, Rates, digest, read_keys, write_keys
from miaotui.serve.guard import OPEN_PATHS, guarded
from miaotui.serve.service import Service
from miaotui.serve.settings import ServeSettings
from tests.serve.serving import MODEL, Server, serving

SECRET = "mt-a-secret-of-this-test"


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def server(demo_gguf: Path, keys_file: Path) -> Iterator[Server]:
    write_keys(keys_file, [Key("slow", digest("mt-slow"), requests_per_minute=2)])
    keys = Keys([SECRET], keys_file)

    def make(service: Service, settings: ServeSettings) -> Any:
        return guarded(
            create_app(service, settings), keys=keys, allowed_origins=["https://one.example"], access_log=False
        )

    with serving(demo_gguf, make_app=make, max_num_seqs=4, max_model_len=256) as started:
        yield started


def _ask(server: Server, key: str) -> str:
    with OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0) as client:
        return client.completions.create(model=MODEL, prompt="One", max_tokens=2).choices[0].text


def test_a_key_opens(server: Server) -> None:
    assert _ask(server, SECRET)


@pytest.mark.parametrize("wrong", ["mt-wrong", SECRET[:-1], SECRET + "x", digest(SECRET), "mt-é"])
def test_others_stay_out(server: Server, wrong: str) -> None:
    status, headers, answer = server.post(
        "/v1/completions", {}, authorization=f"Bearer {wrong.encode().decode('latin1')}"
    )
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    assert headers["www-authenticate"] == "Bearer"
    assert wrong not in json.dumps(answer)


def test_the_client_knows_the_error(server: Server) -> None:
    with pytest.raises(AuthenticationError):
        _ask(server, "mt-wrong")


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/card.json", "/openapi.json", "/metrics", "/nothing"])
def test_all_else_needs_a_key(server: Server, path: str) -> None:
    assert server.get(path)[0] == 401


def test_what_is_open(server: Server) -> None:
    assert {"/", "/app.js", "/style.css", "/health", "/ready", "/ping"} <= OPEN_PATHS
    assert server.get("/health")[0] == 200
    assert server.get("/ready")[0] == 200


def test_a_key_has_its_rate(server: Server) -> None:
    assert _ask(server, "mt-slow")
    assert _ask(server, "mt-slow")
    with pytest.raises(RateLimitError) as refused:
        _ask(server, "mt-slow")
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30
    status, _, _ = server.ask(_get(server, "/v1/models", "mt-slow"))
    assert status == 200, "looking does not count"
    assert _ask(server, SECRET), "and others are not held up"


def test_the_file_is_read_again(server: Server, keys_file: Path) -> None:
    before = read_keys(keys_file)
    write_keys(
        keys_file, [*before, Key("late", digest("mt-late")), Key("old", digest("mt-old"), expires=time.time() - 1)]
    )
    assert _ask(server, "mt-late")
    with pytest.raises(AuthenticationError, match="expired"):
        _ask(server, "mt-old")
    keys_file.write_text("{ broken")
    with pytest.raises(AuthenticationError):
        _ask(server, "mt-late")
    write_keys(keys_file, before)
    with pytest.raises(AuthenticationError):
        _ask(server, "mt-late")


def test_other_sites_ask_by_leave(server: Server) -> None:
    for origin, allowed in (("https://one.example", True), ("https://two.example", False)):
        request = _get(server, "/health", SECRET)
        request.add_header("origin", origin)
        _, headers, _ = server.ask(request)
        assert ("access-control-allow-origin" in headers) is allowed


def _get(server: Server, path: str, key: str) -> Any:
    from urllib.request import Request

    return Request(server.url + path, headers={"authorization": f"Bearer {key}"})


# -- without a server ------------------------------------------------------------------------------------
def test_a_bucket_fills_evenly() -> None:
    key, rates = Key("k", "", requests_per_minute=60), Rates()
    assert [rates.take(key, 0.0) for _ in range(60)] == [0.0] * 60
    assert rates.take(key, 0.0) == pytest.approx(1.0)
    assert rates.take(key, 0.5) == pytest.approx(0.5)
    assert rates.take(key, 1.5) == 0.0
    assert rates.take(key, 1000.0) == 0.0
    assert [rates.take(key, 1000.0) for _ in range(59)] == [0.0] * 59
    assert rates.take(key, 1000.0) > 0, "no more than a minute's worth is saved up"


def test_commands_make_list_and_revoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    assert (
        main(["keys", "create", "team", "--file", str(file), "--expires-in", "30d", "--requests-per-minute", "9"]) == 0
    )
    secret = capsys.readouterr().out.strip()
    assert secret.startswith("mt-")
    assert len(secret) > 40
    assert secret not in file.read_text()
    assert os.stat(file).st_mode & 0o777 == 0o600
    found = Keys(file=file).find(secret)
    assert found is not None
    assert (found.name, found.requests_per_minute) == ("team", 9)
    assert found.expires == pytest.approx(time.time() + 30 * 86400, abs=60)
    assert digest(secret) not in repr(found)
    assert main(["keys", "create", "team", "--file", str(file)]) == 2
    assert main(["keys", "list", "--file", str(file)]) == 0
    assert capsys.readouterr().out.startswith("team: until ")
    assert main(["keys", "revoke", "nobody", "--file", str(file)]) == 2
    assert main(["keys", "revoke", "team", "--file", str(file)]) == 0
    assert Keys(file=file).find(secret) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"keys": {}}',
        '{"keys": [1]}',
        '{"keys": [{"name": "a"}]}',
        '{"keys": [{"name": "a", "sha256": "short"}]}',
        json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "more": 1}]}),
        json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "requests_per_minute": 0}]}),
        json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "expires": "soon"}]}),
        json.dumps({"keys": [{"name": "a", "sha256": "0" * 64}] * 2}),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(UsageError):
        read_keys(file)


def test_an_empty_key_is_none() -> None:
    with pytest.raises(UsageError, match="empty"):
        Keys([" "])

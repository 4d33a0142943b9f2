"""API keys: who is let in, until when and how often; what never shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from openai import AuthenticationError, OpenAI, RateLimitError

from miaotui.cli.main import main
from miaotui.errors import UsageError
from miaotui.serve.app import create_app
from miaotui.serve.auth import Key, Keys, Rates, digest, read_keys, write_keys
from miaotui.serve.guard import OPEN_PATHS, check_origins, guarded
from miaotui.serve.metrics import Metrics
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


def test_the_file_is_read_again(server: Server, keys_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = read_keys(keys_file)
    write_keys(
        keys_file, [*before, Key("late", digest("mt-late")), Key("old", digest("mt-old"), expires=time.time() - 1)]
    )
    assert _ask(server, "mt-late")
    with pytest.raises(AuthenticationError, match="expired"):
        _ask(server, "mt-old")
    caplog.clear()
    keys_file.write_text("{ broken")
    for _ in range(2):
        with pytest.raises(AuthenticationError):
            _ask(server, "mt-late")
    assert _ask(server, SECRET), "what does not stand in the file holds on"
    assert [record.getMessage() for record in caplog.records if "is not JSON" in record.getMessage()], "and it is said"
    assert len(caplog.records) == 1
    write_keys(keys_file, before)
    with pytest.raises(AuthenticationError):
        _ask(server, "mt-late")


def test_other_sites_ask_by_leave(server: Server) -> None:
    for origin, allowed in (("https://one.example", True), ("https://two.example", False)):
        request = _get(server, "/health", SECRET)
        request.add_header("origin", origin)
        _, headers, _ = server.ask(request)
        assert ("access-control-allow-origin" in headers) is allowed


@pytest.mark.parametrize(
    ("site", "origin", "allowed"),
    [
        ("cross-site", "https://one.example", True),
        ("cross-site", "https://two.example", False),
        ("same-site", "http://127.0.0.1:1", False),
        ("cross-site", None, False),
        ("same-origin", "http://127.0.0.1", True),
        ("none", None, True),
    ],
)
def test_a_page_of_another_site_changes_nothing(server: Server, site: str, origin: str | None, allowed: bool) -> None:
    """A form or an upload needs no leave of the browser's to be sent. It is refused before it is looked at."""
    headers = {"sec-fetch-site": site, "authorization": f"Bearer {SECRET}"} | ({"origin": origin} if origin else {})
    status, _, answer = server.post("/v1/completions", {"model": MODEL, "prompt": 1.5}, **headers)
    assert (status, answer["error"]["code"]) == ((400, "invalid_value") if allowed else (403, "origin_not_allowed"))


def test_leave_is_asked_for_without_a_key(server: Server) -> None:
    from urllib.request import Request

    asked = {"origin": "https://one.example", "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "authorization, content-type"
    request = Request(server.url + "/v1/chat/completions", headers=asked, method="OPTIONS")
    with urlopen(request) as answer:
        assert answer.status == 200
        assert "authorization" in answer.headers["access-control-allow-headers"]


@pytest.mark.parametrize("open_metrics", [False, True])
def test_figures_may_be_opened(open_metrics: bool) -> None:
    def make(service: Service, settings: ServeSettings) -> Any:
        app = create_app(service, settings, metrics=Metrics(MODEL))
        return guarded(app, keys=Keys([SECRET]), metrics_without_key=open_metrics, access_log=False)

    with serving(None, make_app=make) as started:
        try:
            with urlopen(started.url + "/metrics") as answer:
                status = answer.status
        except HTTPError as error:
            with error:
                status = error.code
        assert status == (200 if open_metrics else 401)
        assert started.get("/v1/models")[0] == 401
        assert started.get("/metrics/")[0] == 401


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
        json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "expires": float("nan")}]}),
        json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "requests_per_minute": True}]}),
        json.dumps({"keys": [{"name": "a\n", "sha256": "0" * 64}]}),
        json.dumps({"keys": [{"name": "a", "sha256": "é" * 64}]}),
        json.dumps({"keys": [{"name": "a", "sha256": "0" * 64}] * 2}),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(UsageError):
        read_keys(file)


@pytest.mark.parametrize("secret", ["", " ", "two words", " mt-x", "mt-é", "mt-\udcff", "mt-\n"])
def test_a_key_that_cannot_be_sent_is_none(secret: str) -> None:
    with pytest.raises(UsageError, match="empty"):
        Keys([secret])


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "https://", "ftp://example.org", "null"])
def test_an_origin_that_no_browser_sends(origin: str) -> None:
    with pytest.raises(UsageError, match="origin"):
        check_origins(["https://good.example:8443", "*", origin])


@pytest.mark.parametrize("name", ["", "two words", "line\nbreak", "x" * 65, 'quo"te'])
def test_a_name_that_would_blur_a_log(tmp_path: Path, name: str) -> None:
    assert main(["keys", "create", name, "--file", str(tmp_path / "keys.json")]) == 2
    assert not list(tmp_path.iterdir())


def test_the_list_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    write_keys(file, [Key("团队", digest("a"), 5.0, time.time() - 1, 7), Key("b", digest("b"), 6.5)])
    assert main(["keys", "list", "--json", "--file", str(file)]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["name"], first["expired"], first["requests_per_minute"]) == ("团队", True, 7)
    assert second == {"name": "b", "created": 6.5, "expires": None, "requests_per_minute": None, "expired": False}


def test_keys_made_at_once_are_all_there(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    command = [sys.executable, "-m", "miaotui.cli.main", "keys", "create", "--file", file]
    going = [subprocess.Popen([*command, f"k{i}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for i in range(6)]
    for process in going:
        assert process.communicate(timeout=60)[1].startswith(b"Written"), process.returncode
    assert {key.name for key in read_keys(Path(file))} == {f"k{i}" for i in range(6)}
    assert os.stat(file).st_mode & 0o777 == 0o600

"""`miaotui serve` as others reach it: HTTPS, a key that nobody sees, what it says of itself."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest

SECRET = "mt-not-to-be-seen-anywhere"
BODY = json.dumps({"prompt": "a private matter", "max_tokens": 2}).encode()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody else vouches for, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the command openssl is not here")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@contextmanager
def _served(arguments: Sequence[str], environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The process, once it is ready, and the lines it has said on stderr."""
    command = [sys.executable, "-m", "miaotui.cli.main", "serve", *arguments, "--port", "0"]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    assert started.stderr is not None
    said: list[str] = []
    try:
        while not said or not said[-1].startswith("Ready: "):
            said.append(started.stderr.readline())
            assert said[-1], said
        yield started, said
    finally:
        started.kill()
        started.communicate()


def test_a_key_over_https(demo_gguf: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    arguments = [str(demo_gguf), "--ssl-certfile", str(cert), "--ssl-keyfile", str(key)]
    with _served(arguments, {"MIAOTUI_API_KEY": SECRET}) as (process, said):
        url = said[0].split()[2]
        assert url.startswith("https://127.0.0.1:")
        assert SECRET not in Path(f"/proc/{process.pid}/cmdline").read_text()
        trusting = ssl.create_default_context(cafile=str(cert))
        headers = {"content-type": "application/json", "authorization": f"Bearer {SECRET}", "x-request-id": "r-1"}
        with urlopen(Request(f"{url}/v1/completions", BODY, headers), context=trusting, timeout=30) as answer:
            assert (answer.status, answer.headers["x-request-id"]) == (200, "r-1")
        with pytest.raises(HTTPError, match="401") as refused:
            urlopen(
                Request(f"{url}/v1/models", headers={"authorization": "Bearer guess"}), context=trusting, timeout=30
            )
        refused.value.close()
        with pytest.raises(URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urlopen(f"{url}/health", timeout=30)
        with pytest.raises(OSError):
            urlopen(f"http://{url.removeprefix('https://')}/health", timeout=30)
        process.terminate()
        out, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out == "", "stdout is for data"
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert [(line["path"], line["status"], line.get("key")) for line in lines] == [
        ("/v1/completions", 200, "key-1"),
        ("/v1/models", 401, None),
    ]
    for secret in (SECRET, "guess", "private matter"):
        assert secret not in "".join(said) + log


@pytest.mark.parametrize(
    ("host", "key", "warned"), [("0.0.0.0", "", True), ("0.0.0.0", SECRET, False), ("127.0.0.1", "", False)]
)
def test_it_warns_when_the_world_may_ask(demo_gguf: Path, host: str, key: str, warned: bool) -> None:
    with _served([str(demo_gguf), "--host", host, "--no-access-log"], {"MIAOTUI_API_KEY": key}) as (process, said):
        assert any(line.startswith("warning: ") and "API key" in line for line in said) is warned
        url = next(line for line in said if line.startswith("Listening")).split()[2].replace("0.0.0.0", "127.0.0.1")
        try:
            with urlopen(f"{url}/v1/models", timeout=30) as answer:
                status = answer.status
        except HTTPError as error:
            with error:
                status = error.code
        assert status == (401 if key else 200)
        process.terminate()
        assert process.communicate(timeout=30)[1] == "", "there is no log"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--api-key", ""], "empty"),
        (["--api-key", "two words"], "spaces"),
        (["--api-keys-file", "nowhere.json"], "miaotui keys create"),
        (["--metrics-without-key"], "Leave it out"),
        (["--log-prompts", "--no-access-log"], "--no-access-log"),
        (["--allowed-origins", "example.org"], "https://"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from miaotui.cli.main import main

    monkeypatch.delenv("MIAOTUI_API_KEY", raising=False)
    assert main(["serve", "no-such-model", *flags]) == 2
    message = capsys.readouterr().err
    assert told in message
    assert "two words" not in message, "a key is not repeated"
